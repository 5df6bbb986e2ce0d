"""The bounds of this machine, measured: products per second and bytes read per second.

    python -m benchmarks.ceiling [--isa NAME] [--seconds 2] [--threads N] [--json]

Products: the instruction that carries them in our kernels, out of registers, on torch.get_num_threads()
threads at once. "half" is the arithmetic of bf16 and int8 caches (``vdpbf16ps``, or pairs of int16 on
AVX2 and on AVX-512 with VNNI), "full" that of fp32 caches. Memory: torch sums a tensor larger than any cache.

A bound is the best of many short samples: whatever disturbs a sample only lowers it. The other benchmarks
take some between the turns of their contenders, so that kernel and bound have seen the same machine.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks import timing
from mla.ops import native

SAMPLE = 4e-3  # seconds of one sample of products
EVERY = 0.4  # seconds between samples while contenders take turns
# Workers of OpenMP spin some milliseconds after their work, on the cores that are to be sampled.
REST = 20e-3

# The arithmetic of a cache format.
ARITHMETIC = {"bf16": "half", "int8": "half", "fp32": "full"}


class Ceiling:
    """Operations per second of one instruction set, the best and all samples so far."""

    def __init__(self, isa: str, arithmetic: str = "half") -> None:
        self.isa = isa
        self.arithmetic = arithmetic
        self.threads = torch.get_num_threads()
        self.samples: list[float] = []
        self._pool = ThreadPoolExecutor(self.threads)
        self._start = threading.Barrier(self.threads)
        self._rounds = 1000
        while self._time(self._rounds)[1] < SAMPLE / 2:
            self._rounds *= 2
        self.sample()

    @property
    def best(self) -> float:
        return max(self.samples)

    @property
    def how(self) -> str:
        return f"{self.isa} {self.arithmetic}" if self._instruction else "fp32 torch matmul"

    @property
    def _instruction(self) -> bool:
        """Whether native.ceiling runs this arithmetic: it has that of half-precision caches only."""
        return self.arithmetic == "half" or self.isa == "generic"

    def since(self, count: int) -> dict[str, float]:
        """What the samples after the first ``count`` say."""
        later = self.samples[count:]
        return {"best": max(later), "median": statistics.median(later)}

    def sample(self) -> None:
        time.sleep(REST)
        for _ in range(3):
            done, seconds = self._time(self._rounds)
            self.samples.append(done / seconds)

    def _time(self, rounds: int) -> tuple[float, float]:
        """(operations, seconds) of ``rounds`` on every thread at once."""
        if not self._instruction:
            return _matmul(rounds)
        spans = list(self._pool.map(self._run, [rounds] * self.threads))
        seconds = max(ended for _, _, ended in spans) - min(started for _, started, _ in spans)
        return sum(done for done, _, _ in spans), seconds

    def _run(self, rounds: int) -> tuple[float, float, float]:
        self._start.wait()
        started = time.perf_counter()
        done = native.ceiling(self.isa, rounds)  # releases the GIL
        return done, started, time.perf_counter()


def _matmul(rounds: int) -> tuple[float, float]:
    """A stand-in for the fp32 instruction: the largest rate that torch's own product of matrices reaches."""
    size = 512
    a, b = torch.ones(2, size, size)
    out = torch.empty(size, size)
    count = max(1, rounds // 1000)
    return 2.0 * size**3 * count, count * timing.sample(lambda: torch.mm(a, b, out=out), count)


class Bandwidth:
    """Bytes read per second; a sample takes some ten milliseconds."""

    def __init__(self, size: int = 2**28) -> None:
        self.samples: list[float] = []
        self._numbers = torch.ones(size // 4)
        for _ in range(3):
            self.sample()

    @property
    def best(self) -> float:
        return max(self.samples)

    def sample(self) -> None:
        self.samples.append(self._numbers.nbytes / timing.sample(self._numbers.sum, 1))


class Ceilings:
    """The bounds that a benchmark of some cache formats needs, sampled together."""

    def __init__(self, isa: str, formats: list[str]) -> None:
        arithmetics = dict.fromkeys(ARITHMETIC[name] for name in formats)
        self._products = {name: Ceiling(isa, name) for name in arithmetics}
        self._memory = Bandwidth()
        self._sampled = time.perf_counter()

    def sample(self) -> None:
        """For every turn: samples the products where the last time was a while ago."""
        if time.perf_counter() - self._sampled > EVERY:
            self.sample_products()

    def sample_products(self) -> None:
        for product in self._products.values():
            product.sample()
        self._sampled = time.perf_counter()

    def sample_all(self) -> None:
        self.sample_products()
        self._memory.sample()

    def count(self) -> int:
        """Samples so far of each bound of products."""
        return min(len(product.samples) for product in self._products.values())

    def of(self, cache_format: str) -> Ceiling:
        return self._products[ARITHMETIC[cache_format]]

    def as_json(self) -> dict[str, Any]:
        products = {name: {"how": each.how, **each.since(0)} for name, each in self._products.items()}
        return {"flops": products, "memory_bytes_per_s": self._memory.best}

    def describe(self) -> str:
        products = [f"{product.how} {product.best / 1e9:.0f} GFLOP/s" for product in self._products.values()]
        return f"ceiling: {', '.join(products)}; memory read {self._memory.best / 1e9:.1f} GB/s"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--isa", nargs="+", help="instruction sets; all of this machine by default")
    parser.add_argument("--seconds", type=float, default=2.0, help="of sampling, per bound")
    timing.add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [timing.choose_isa(name) for name in options.isa or native.instruction_sets()]
    found: dict[str, Any] = {}
    for isa in names:
        for arithmetic in ("half", "full"):
            ceiling = Ceiling(isa, arithmetic)
            keep_sampling(ceiling.sample, options.seconds)
            found[f"{isa} {arithmetic}"] = {"how": ceiling.how, **ceiling.since(0)}
    memory = Bandwidth()
    keep_sampling(memory.sample, options.seconds)
    read = {"best": memory.best, "median": statistics.median(memory.samples)}
    machine = timing.machine()
    if options.json:
        print(json.dumps({"machine": machine, "flops": found, "memory_bytes_per_s": read}))
        return
    rows = [
        (name, each["how"], *(f"{each[which] / 1e9:.0f} GFLOP/s" for which in ("best", "median")))
        for name, each in found.items()
    ]
    rows.append(("memory read", "torch sum", *(f"{each / 1e9:.1f} GB/s" for each in read.values())))
    timing.print_table(timing.describe(machine), ["bound", "measured by", "best", "median"], rows, left=2)


def keep_sampling(sample: Callable[[], object], seconds: float) -> None:
    ended = time.perf_counter() + seconds
    while time.perf_counter() < ended:
        sample()


if __name__ == "__main__":
    main()
