"""What the benchmarks share: times taken in turns, relative errors, tables, and the machine in words.

Neighbours on a shared machine change its speed from one second to the next. So contenders take turns, A B C
A B C, and every figure is given twice: the median, and the best, which is what an idle machine would show.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mla.machine import allowed_cores
from mla.ops import native

# Relative error of our own kernels per cache format: norm of the difference over that of the reference.
# Over int8 latents AVX-512 rounds queries and probabilities to 8 bits, too.
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-3, "int8": 1e-2}
SHORTEST = 1e-3  # seconds of one sample: a shorter call is repeated
WARM_UP = 30e-3  # a longer call finds nothing of its own in the caches anyway

# What decides which kernels run.
FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimddp",
    "bf16",
    "sve",
)


@dataclass
class Times:
    """Seconds per call, one number per sample."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def as_json(self) -> dict[str, float | int]:
        return {"median_s": self.median, "best_s": self.best, "samples": len(self.seconds)}


def take_turns(
    runs: dict[str, Callable[[], object]],
    seconds: float,
    *,
    between: Callable[[], object] = lambda: None,
    least: int = 3,
    most: int = 100,
) -> dict[str, Times]:
    """Time the contenders in turns until about ``seconds`` have passed.

    A short call is made once before its sample, so that it is not charged for the caches that the contender
    before it has filled. One that is much slower than the others has used its share of the time early: it
    stops after at least ``least`` samples and leaves the rest to them.

    Args:
        runs: the contenders by name; each has been called at least once before.
        between: called once per turn (the ceiling is measured there).
        least, most: bounds on the samples of each.
    """
    estimates = {name: sample(run, 1) for name, run in runs.items()}
    repeats = {name: max(1, min(100, round(SHORTEST / each))) for name, each in estimates.items()}
    times = {name: Times() for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(most):
        waiting = [
            name for name in runs if spent[name] < seconds / len(runs) or len(times[name].seconds) < least
        ]
        if not waiting:
            break
        between()
        for name in waiting:
            started = time.perf_counter()
            if estimates[name] < WARM_UP:
                runs[name]()
            times[name].seconds.append(sample(runs[name], repeats[name]))
            spent[name] += time.perf_counter() - started
    return times


def sample(run: Callable[[], object], count: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``; NaN anywhere gives NaN, which passes no check."""
    got, want = got.float().flatten(), want.float().flatten()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def machine() -> dict[str, Any]:
    """What figures depend on; every JSON output carries it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(told.get("flags", told.get("Features", "")).split())
    return {
        "cpu": told.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": allowed_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_sets": list(native.instruction_sets()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(found: dict[str, Any]) -> str:
    """:func:`machine` in one line."""
    return (
        f"{found['cpu']}, cores: {found['cores']}, threads: {found['threads']}, "
        f"{found['memory_bytes'] / 2**30:.0f} GiB, {' '.join(found['flags'])}; torch {found['torch']}"
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; torch's own number by default")


def add_kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", help="instruction set of our kernels; the best one by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case, checks apart")
    parser.add_argument("--peers", action="store_true", help="time what else can do it, in the same turns")


def choose_isa(name: str | None) -> str:
    """An instruction set that runs here, or the end of the program with one line."""
    isa = name or native.best()
    if isa not in native.instruction_sets():
        have = ", ".join(native.instruction_sets()) or "none: the package was built without a compiler"
        raise SystemExit(f"--isa: expected an instruction set of this machine ({have}), got {isa}")
    return isa


def print_table(title: str, columns: list[str], rows: Iterable[Iterable[str]], left: int = 1) -> None:
    """``left`` columns of words, then figures."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print(title)  # rich would wrap it at the table's width
    # Rather lines that wrap than figures cut short.
    Console(width=max(Console().width, 150)).print(table)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"
