"""Memory, bandwidth and arithmetic of a machine: from the table, or measured here without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mla.errors import MLAError
from mla.machine import free_memory, total_memory, usable_cores
from mla.plan.known import find_hardware, known_hardware, plain

_THIS = {"thismachine", "this", "here", "local", "localhost"}
#: Operations per clock and core of the widest instruction that the CPU's flags promise: fp32, bf16. A
#: processor that splits 512-bit instructions (Zen 4) does half of it, one with two full units (servers) all.
_PER_CLOCK = (
    ("amx_bf16", 64, 1024, "AMX"),
    ("avx512_bf16", 32, 64, "AVX-512 with bf16 dot products, one per clock"),
    ("avx512f", 32, None, "AVX-512, one multiply-add per clock"),
    ("fma", 32, None, "AVX2, two multiply-adds per clock"),
    ("bf16", 16, 64, "NEON with bf16 matrix products, two pipes"),
    ("asimd", 16, None, "NEON, two multiply-adds per clock"),
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device. ``memory`` in bytes, ``bandwidth`` in B/s, ``flops`` in operations/s by number format.

    ``source`` says where the figures come from, measured or published; ``note`` how they were derived.
    """

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    source: str
    note: str = ""

    def peak(self, number_format: str) -> float:
        """Operations/s of dense products in a format, or in the next one the device has.

        Weights in int8 or int4 are taken to be unpacked to bf16; fp8 counts only where the device has it.
        """
        wanted = {"fp8": ("fp8", "bf16", "fp16"), "fp16": ("fp16", "bf16"), "fp32": ("fp32",)}
        for candidate in (*wanted.get(number_format, ("bf16", "fp16")), "fp32"):
            if candidate in self.flops:
                return self.flops[candidate]
        return max(self.flops.values())


def get_hardware(name: str) -> Hardware:
    """A known machine by a forgiving name, or "this machine", measured.

    Raises:
        MLAError: an unknown name; the nearest ones are told.
    """
    if plain(name) in _THIS:
        return measure_this_machine()
    return _from_table(find_hardware(name))


def all_hardware() -> list[Hardware]:
    """Every known machine, in the table's order."""
    return [_from_table(key) for key in known_hardware()]


def _from_table(key: str) -> Hardware:
    row = known_hardware()[key]
    fields = {name: row[name] for name in ("memory", "bandwidth", "flops", "source")}
    return Hardware(name=row["title"], note=row.get("note", ""), **fields)


#: What each core copies, larger than its share of any cache, and how often.
_MEBIBYTES, _REPEATS = 64, 4


def measure_this_machine() -> Hardware:
    """Memory as the system reports it, bandwidth measured by copying, arithmetic estimated; about a second.

    Bandwidth: one thread per core copies its own buffer of 64 MiB (less where little memory is free) with
    memmove, which reads and writes: twice the bytes copied, the best of four. Arithmetic is not measured but
    estimated: cores × clock × operations per clock of the instruction set. Other programs lower the first,
    not the second.
    """
    import psutil

    usable = usable_cores()
    cores = min(psutil.cpu_count(logical=False) or usable, usable)
    # An eighth of what is free at most, both buffers of all cores together.
    size = max(1 << 16, min(_MEBIBYTES << 20, free_memory() // (16 * cores)))
    bandwidth = _copy_bandwidth(cores, size)
    clock, clock_source = _clock()
    fp32, bf16, kind = _operations_per_clock()
    flops = {"fp32": cores * clock * fp32}
    if bf16:
        flops["bf16"] = cores * clock * bf16
    per_core = bf16 or fp32
    return Hardware(
        name="this machine",
        memory=total_memory(),
        bandwidth=bandwidth,
        flops=flops,
        source="memory: the operating system; bandwidth: measured; arithmetic: estimated, not measured",
        note=(
            f"{cores} threads copied {size >> 20} MiB each, bytes read and written, best of {_REPEATS}; "
            f"{cores} cores x {clock / 1e9:.2f} GHz ({clock_source}) x {per_core} operations ({kind})"
        ),
    )


def _copy_bandwidth(threads: int, size: int) -> float:
    """Bytes per second, read plus written, of ``threads`` copies of ``size`` bytes at once."""
    import ctypes
    import threading
    import time

    barrier = threading.Barrier(threads + 1)

    def copy() -> None:
        # Made by the thread that copies them: where there are several memory nodes they lie on its own.
        try:
            buffers = bytearray(size), bytearray(size)
        except MemoryError:
            barrier.abort()
            return
        target, source = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in buffers)
        for _ in range(_REPEATS):
            barrier.wait()
            # Lets other threads run meanwhile; a slice assignment would hold the interpreter's lock.
            ctypes.memmove(target, source, size)
            barrier.wait()

    workers = [threading.Thread(target=copy, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    best = 0.0
    try:
        for _ in range(_REPEATS):
            barrier.wait()
            started = time.perf_counter()
            barrier.wait()
            best = max(best, 2 * size * threads / (time.perf_counter() - started))
    except threading.BrokenBarrierError as error:
        raise MLAError(
            f"this machine cannot be measured: no memory for {threads} x 2 buffers of {size >> 10} KiB; end "
            "other programs, or name another --hardware"
        ) from error
    return best


def _clock() -> tuple[float, str]:
    import psutil

    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        frequency = None
    if frequency and frequency.max:
        return frequency.max * 1e6, "highest clock reported"
    if frequency and frequency.current:
        return frequency.current * 1e6, "clock now reported"
    return 2.5e9, "assumed: the system reports none"


def _operations_per_clock() -> tuple[int, int | None, str]:
    import platform

    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = {"asimd"} if platform.machine().lower() in ("arm64", "aarch64") else {"fma"}
    for flag, fp32, bf16, kind in _PER_CLOCK:
        if flag in flags:
            return fp32, bf16, kind
    return 8, None, "SSE2, one multiply-add of four per clock"
