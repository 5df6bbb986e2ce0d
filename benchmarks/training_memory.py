"""Memory that training a stack of ``MultiheadLatentAttention`` needs, with and without ``recompute_kv``.

Run as ``python -m benchmarks.training_memory``. Before a row is printed, the gradients of both ways are
compared. Two figures per way, both exact counts of tensor bytes and no estimates:

    kept   what autograd holds between the forward and the backward pass, parameters apart
    peak   the most that was alive at any moment of both passes, parameters and their gradients apart

Scratch inside one operation is not counted. The column "transformers" is DeepseekV3Attention with the same
weights and its "sdpa" attention: what a training run needs without this package.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from mla.config import MLAConfig
from mla.nn import MultiheadLatentAttention


def bytes_kept_for_backward(run: Callable[[], Tensor], module: nn.Module) -> tuple[Tensor, int]:
    """The result of ``run`` and the bytes of the storages saved for its backward pass, parameters apart."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    alive = []  # a storage that is freed would give its address to the next one

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(storage)
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return out, sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(storage)
                size = storage.nbytes()
                self.alive += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, size: int) -> None:
        self.alive -= size


#: Transformers' module, ours, and ours with recompute_kv.
WAYS = ("transformers", "ordinary", "recompute")


class Stack(nn.Module):
    """Layers with a residual, so that what one layer keeps adds to what the others keep."""

    def __init__(self, layers: list[nn.Module], attend: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._attend = attend

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self._attend(layer, x)
        return x


def make_stacks(options: argparse.Namespace) -> dict[str, Stack]:
    config = DeepseekV3Config(
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        q_lora_rank=None,
        kv_lora_rank=options.rank,
        qk_nope_head_dim=options.nope,
        qk_rope_head_dim=options.rope,
        v_head_dim=options.value,
        num_hidden_layers=options.layers,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    rotary = DeepseekV3RotaryEmbedding(config)

    def theirs(layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x, rotary(x, torch.arange(x.shape[1])[None]), None)[0]
        return out

    def ours(layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out

    own = MLAConfig.from_transformers(config)
    layers = range(options.layers)
    stacks = {
        "transformers": Stack([DeepseekV3Attention(config, i) for i in layers], theirs),
        "ordinary": Stack([MultiheadLatentAttention(own) for _ in layers], ours),
        "recompute": Stack([MultiheadLatentAttention(own, recompute_kv=True) for _ in layers], ours),
    }
    for name in ("ordinary", "recompute"):
        stacks[name].load_state_dict(stacks["transformers"].state_dict(), strict=True)
    return stacks


def measure(stack: Stack, x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Gradients of one step, bytes kept, and the peak."""
    stack.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out, kept = bytes_kept_for_backward(lambda: stack(x), stack)
    (out * weight).sum().backward()
    leaves = [x, *stack.parameters()]
    buffers = [leaf.grad for leaf in leaves if leaf.grad is not None]
    gradients = [buffer.clone() for buffer in buffers]

    counter = PeakBytes()
    counter.ignore(*leaves, *buffers)  # the second pass adds into the same gradients
    with counter:
        (stack(x) * weight).sum().backward()
    return {"gradients": gradients, "kept": kept, "peak": counter.peak}


def largest_difference(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest error over all gradients, each relative to the largest entry of its own tensor."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, want, strict=True)]
    return float(torch.stack(errors).max())  # NaN where one is, which Python's maximum may pass over


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    stacks = make_stacks(options)
    rows = []
    for tokens in options.tokens:
        x, weight = torch.randn(2, options.batch, tokens, options.hidden)
        found = {name: measure(stack, x, weight) for name, stack in stacks.items()}
        row: dict[str, Any] = {"tokens": tokens, "batch": options.batch, "layers": options.layers}
        for name, result in found.items():
            difference = largest_difference(result["gradients"], found["transformers"]["gradients"])
            if not difference <= 1e-4:
                raise SystemExit(f"{tokens} tokens: gradients of {name} differ by {difference:.1e}; no table")
            row[name] = {"kept": result["kept"], "peak": result["peak"], "gradient_error": difference}
        row["kept_ratio"] = row["ordinary"]["kept"] / row["recompute"]["kept"]
        row["peak_ratio"] = row["ordinary"]["peak"] / row["recompute"]["peak"]
        rows.append(row)
    return rows


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--nope", type=int, default=128)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--value", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    rows = run(options)
    if options.json:
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    error = max(row[name]["gradient_error"] for row in rows for name in WAYS)
    table = Table(
        title=f"{options.layers} layers, {options.heads} heads, {options.rank}+{options.rope}/{options.nope}/"
        f"{options.value}, batch {options.batch}, fp32; MiB",
        caption=f"times less: ordinary over recompute. Gradients agree to {error:.0e}.",
    )
    for heading in ("tokens", "figure", *WAYS, "times less"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in rows:
        for figure in ("kept", "peak"):
            sizes = [f"{row[way][figure] / 2**20:.1f}" for way in WAYS]
            table.add_row(str(row["tokens"]), figure, *sizes, f"{row[f'{figure}_ratio']:.1f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
