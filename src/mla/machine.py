"""What this machine has for us: its memory and cores, or what a container or a batch system leaves of them.
And by what names it calls itself.

psutil and os know the machine only. Limits are read from Linux's control groups, of either version. Level 0.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes that can be allocated now: what is free or soon would be, within every limit on this process."""
    import psutil  # the command line loads this module for its quota alone

    free: int = psutil.virtual_memory().available
    for limit, used in _memory_limits():
        free = min(free, max(0, limit - used))
    return free


def total_memory() -> int:
    """Bytes of memory that this process might have if it were alone."""
    import psutil

    total: int = psutil.virtual_memory().total
    return min([total, *(limit for limit, _ in _memory_limits())])


def allowed_cores() -> int:
    """Cores that this process may run on, of which torch makes its threads. SMT counts twice."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Cores that this process may keep busy: those above, or a container's quota where that is smaller."""
    return max(1, min([allowed_cores(), *(math.ceil(quota) for quota in _core_quotas())]))


def is_local(host: str) -> bool:
    """Whether an address or a name is one that on every machine means that machine itself."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may come to point anywhere
        return False


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used of it) of every group of this process that has one, without what files were read:
    it makes room."""
    for group in _groups("memory"):
        two = group / "memory.max"
        limit = _number(two if two.exists() else group / "memory.limit_in_bytes")
        used = _number(group / ("memory.current" if two.exists() else "memory.usage_in_bytes"))
        if limit is not None and used is not None:
            # Version 1 counts the files of groups within this one under other names.
            yield limit, used - sum(_files(group, "" if two.exists() else "total_"))


def _files(group: Path, prefix: str) -> Iterator[int]:
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
            yield int(value)


def _core_quotas() -> Iterator[float]:
    for group in _groups("cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = (_text(group / f"cpu.cfs_{each}_us") for each in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups that may have a limit, from the innermost to the outermost."""
    for line in _text(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _GROUPS
        elif controller in controllers.split(","):
            root = _GROUPS / controller
        else:
            continue
        # A container sees its own group as the root, whatever it is called outside.
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_dir():
                yield group
            if group == root:
                break


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None  # "max" is none


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
