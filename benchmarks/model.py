"""A whole model absorbed against itself as stock Transformers runs it: time per token, prefill, cache bytes.

    python -m benchmarks.model [--layers 4] [--heads 16] [--context 512 2048 4096] [--dtype float32] [--json]

Random weights, the attention dimensions of DeepSeek-V2-Lite. Both models are built in one process, their
logits are compared first, and the timed steps alternate between them.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from mla import LatentCache, MLAConfig, absorb

# Root mean square of the difference over that of the logits; bf16 models differ from themselves by about 1e-2
# when the order of a sum changes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def build(layers: int, heads: int, context: int, dtype: torch.dtype) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        first_k_dense_replace=layers,
        n_routed_experts=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=max(context, 4096) + 64,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).to(dtype).eval()


def new_cache(model: Any, absorbed: bool, capacity: int) -> Any:
    return LatentCache(model.config, capacity=capacity) if absorbed else DynamicCache(config=model.config)


@torch.no_grad()
def measure(models: dict[str, Any], context: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of one prefill and median seconds of a decode step, at ``context`` tokens."""
    ids = torch.randint(1024, (1, context), generator=torch.Generator().manual_seed(1))
    results: dict[str, dict[str, float]] = {}
    caches, logits = {}, {}
    for name, model in models.items():
        caches[name] = new_cache(model, name == "absorbed", context + steps)
        model(ids[:, :32])
        started = time.perf_counter()
        logits[name] = model(ids, past_key_values=caches[name], logits_to_keep=1).logits
        results[name] = {"prefill_s": time.perf_counter() - started}
    check(logits)
    times: dict[str, list[float]] = {name: [] for name in models}
    token = logits["stock"][:, -1].argmax(-1, keepdim=True)
    for _ in range(steps):
        for name, model in models.items():
            started = time.perf_counter()
            logits[name] = model(token, past_key_values=caches[name]).logits
            times[name].append(time.perf_counter() - started)
        check(logits)
        token = logits["stock"][:, -1].argmax(-1, keepdim=True)
    for name in models:
        results[name]["decode_s"] = statistics.median(times[name])
    cache = caches["absorbed"]
    held = cache.get_seq_length() * len(cache.latent_layers)
    results["absorbed"]["bytes_per_token_and_layer"] = cache.nbytes / held
    return results


def check(logits: dict[str, torch.Tensor]) -> None:
    """No green check, no number."""
    stock, absorbed = logits["stock"].float(), logits["absorbed"].float()
    error = float((stock - absorbed).square().mean().sqrt() / stock.square().mean().sqrt())
    if not error <= TOLERANCE[logits["stock"].dtype]:
        sys.exit(f"the logits of both models differ by {error:.1e}: no figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    stock = build(arguments.layers, arguments.heads, max(arguments.context), dtype)
    models = {"stock": stock, "absorbed": absorb(copy.deepcopy(stock))}
    config = MLAConfig.from_transformers(stock.config)
    rows = {context: measure(models, context, arguments.steps) for context in arguments.context}
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "dtype": arguments.dtype, "contexts": rows}))
        return
    table = Table(
        title=f"{arguments.layers} layers, {arguments.heads} heads, {config.kv_lora_rank}+"
        f"{config.qk_rope_head_dim}, {arguments.dtype}, {torch.get_num_threads()} threads"
    )
    columns = ("context", "decode stock", "absorbed", "times", "prefill stock", "absorbed", "times", "bytes")
    for column in columns:
        table.add_column(column, justify="right")
    for context, row in rows.items():
        stock_row, absorbed_row = row["stock"], row["absorbed"]
        table.add_row(
            str(context),
            f"{stock_row['decode_s'] * 1e3:.1f} ms",
            f"{absorbed_row['decode_s'] * 1e3:.1f} ms",
            f"{stock_row['decode_s'] / absorbed_row['decode_s']:.1f}",
            f"{stock_row['prefill_s']:.2f} s",
            f"{absorbed_row['prefill_s']:.2f} s",
            f"{stock_row['prefill_s'] / absorbed_row['prefill_s']:.2f}",
            f"{absorbed_row['bytes_per_token_and_layer']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
