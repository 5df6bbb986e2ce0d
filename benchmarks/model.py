"""A whole model absorbed against itself as stock Transformers runs it: time per token, prefill, cache bytes.

    python -m benchmarks.model [--layers 4] [--heads 16] [--context 512 2048 4096] [--dtype float32]
                               [--cache-format int8] [--profile] [--threads N] [--json]

Random weights, the attention dimensions of DeepSeek-V2-Lite. Both models are built in one process, their
logits are compared first, and the timed steps alternate between them. ``--cache-format`` is that of the
absorbed model's cache; without it, latents are kept as the model computes them. ``--profile`` shows where an
absorbed decode step at the longest context spends its time, operator by operator.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from benchmarks import timing
from mla import LatentCache, MLAConfig, absorb
from mla.formats import CACHE_FORMATS

# Root mean square of the difference over that of the logits; bf16 models differ from themselves by about 1e-2
# when the order of a sum changes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# What a cache that rounds may add.
ROUNDED = {None: 0.0, "fp32": 0.0, "fp16": 2e-3, "bf16": 1e-2, "int8": 3e-2}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


def build(layers: int, heads: int, context: int, dtype: torch.dtype, **others: Any) -> DeepseekV3ForCausalLM:
    """Random weights; ``others`` are fields of the configuration."""
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "n_routed_experts": 1,
        "q_lora_rank": None,
        **others,
    }
    config = DeepseekV3Config(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        first_k_dense_replace=layers,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=max(context, 4096) + 64,
        **sizes,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).to(dtype).eval()


def new_cache(model: Any, absorbed: bool, capacity: int, cache_format: str | None) -> Any:
    if absorbed:
        return LatentCache(model.config, capacity=capacity, format=cache_format)
    return DynamicCache(config=model.config)


@torch.no_grad()
def measure(
    models: dict[str, Any], context: int, steps: int, cache_format: str | None
) -> dict[str, dict[str, float]]:
    """Seconds of one prefill and median seconds of a decode step, at ``context`` tokens."""
    ids = torch.randint(1024, (1, context), generator=torch.Generator().manual_seed(1))
    results: dict[str, dict[str, float]] = {}
    caches, logits = {}, {}
    for name, model in models.items():
        caches[name] = new_cache(model, name == "absorbed", context + steps, cache_format)
        model(ids[:, :32])
        started = time.perf_counter()
        logits[name] = model(ids, past_key_values=caches[name], logits_to_keep=1).logits
        results[name] = {"prefill_s": time.perf_counter() - started}
    check(logits, cache_format)
    times: dict[str, list[float]] = {name: [] for name in models}
    token = logits["stock"][:, -1].argmax(-1, keepdim=True)
    for _ in range(steps):
        for name, model in models.items():
            started = time.perf_counter()
            logits[name] = model(token, past_key_values=caches[name]).logits
            times[name].append(time.perf_counter() - started)
        check(logits, cache_format)
        token = logits["stock"][:, -1].argmax(-1, keepdim=True)
    for name in models:
        results[name]["decode_s"] = statistics.median(times[name])
    cache = caches["absorbed"]
    held = cache.get_seq_length() * len(cache.latent_layers)
    results["absorbed"]["bytes_per_token_and_layer"] = cache.nbytes / held
    return results


@torch.no_grad()
def profile_step(model: Any, context: int, cache_format: str | None) -> dict[str, Any]:
    """Self time of the operators in one decode step. The profiler itself slows a step by some percent."""
    ids = torch.randint(1024, (1, context), generator=torch.Generator().manual_seed(1))
    cache = new_cache(model, True, context + 4, cache_format)
    model(ids, past_key_values=cache, logits_to_keep=1)
    for _ in range(3):
        model(ids[:, :1], past_key_values=cache)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        model(ids[:, :1], past_key_values=cache)
        wall = time.perf_counter() - started
    operators = [
        {"name": each.key, "calls": each.count, "self_s": each.self_cpu_time_total * 1e-6}
        for each in profiler.key_averages()
    ]
    operators.sort(key=lambda each: -each["self_s"])
    kernels = sum(each["self_s"] for each in operators if each["name"].startswith("mla::"))
    products = sum(each["self_s"] for each in operators if each["name"] in PRODUCTS)
    inside = sum(each["self_s"] for each in operators)
    split = {
        "attention kernels": kernels,
        "matrix products": products,
        "other operators": inside - kernels - products,
        "outside operators": wall - inside,
    }
    return {"context": context, "step_s": wall, "split": split, "operators": operators}


def show_profile(found: dict[str, Any]) -> None:
    step = found["step_s"]
    timing.print_table(
        f"one absorbed step at {found['context']} tokens, {step * 1e3:.1f} ms under the profiler",
        ["operator", "calls", "ms", "share"],
        (
            (each["name"], str(each["calls"]), f"{each['self_s'] * 1e3:.3f}", f"{each['self_s'] / step:.1%}")
            for each in found["operators"][:20]
        ),
    )
    print(", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in found["split"].items()))


def check(logits: dict[str, torch.Tensor], cache_format: str | None) -> None:
    """No green check, no number."""
    error = timing.relative_error(logits["absorbed"], logits["stock"])
    if not error <= TOLERANCE[logits["stock"].dtype] + ROUNDED[cache_format]:
        sys.exit(f"the logits of both models differ by {error:.1e}: no figures")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cache-format", choices=CACHE_FORMATS)
    parser.add_argument("--profile", action="store_true", help="operators of one absorbed decode step")
    timing.add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    stock = build(options.layers, options.heads, max(options.context), dtype)
    models = {"stock": stock, "absorbed": absorb(copy.deepcopy(stock))}
    config = MLAConfig.from_transformers(stock.config)
    rows = {
        context: measure(models, context, options.steps, options.cache_format) for context in options.context
    }
    profiled = None
    if options.profile:
        profiled = profile_step(models["absorbed"], max(options.context), options.cache_format)
    machine = timing.machine()
    if options.json:
        sizes = {name: getattr(options, name) for name in ("layers", "heads", "dtype", "cache_format")}
        print(json.dumps({"machine": machine, **sizes, "contexts": rows, "profile": profiled}))
        return
    cache = f", {options.cache_format} cache" if options.cache_format else ""
    timing.print_table(
        f"{options.layers} layers, {options.heads} heads, {config.kv_lora_rank}+{config.qk_rope_head_dim}, "
        f"{options.dtype}{cache}, threads: {torch.get_num_threads()}",
        ["context", "decode stock", "absorbed", "times", "prefill stock", "absorbed", "times", "bytes"],
        (
            (
                str(context),
                f"{row['stock']['decode_s'] * 1e3:.1f} ms",
                f"{row['absorbed']['decode_s'] * 1e3:.1f} ms",
                f"{row['stock']['decode_s'] / row['absorbed']['decode_s']:.1f}",
                f"{row['stock']['prefill_s']:.2f} s",
                f"{row['absorbed']['prefill_s']:.2f} s",
                f"{row['stock']['prefill_s'] / row['absorbed']['prefill_s']:.2f}",
                f"{row['absorbed']['bytes_per_token_and_layer']:.0f}",
            )
            for context, row in rows.items()
        ),
        left=0,
    )
    if profiled:
        show_profile(profiled)
    print(timing.describe(machine))


if __name__ == "__main__":
    main()
