"""Limits of containers and batch systems, read from made-up control groups."""

import os
from types import SimpleNamespace

import psutil
import pytest

from mla import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """``groups(own, {file: text})`` lays out what this process belongs to; the machine: 64 GiB, 8 cores."""

    def lay_out(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "fs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    memory = SimpleNamespace(available=40 * GIB, total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return lay_out


def found():
    return machine.free_memory(), machine.total_memory(), machine.usable_cores()


def test_a_machine_without_groups(groups):
    assert found() == (40 * GIB, 64 * GIB, 8)


def test_a_container(groups):
    stat = f"anon 7\ninactive_file {GIB}\nactive_file {GIB // 2}"
    files = {"memory.max": f"{4 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": stat}
    groups("0::/", files | {"cpu.max": "150000 100000"})
    assert found() == (5 * GIB // 2, 4 * GIB, 2)


def test_no_limit_is_the_machines(groups):
    groups("0::/", {"memory.max": "max", "memory.current": "5", "cpu.max": "max 100000"})
    assert found() == (40 * GIB, 64 * GIB, 8)


def test_the_tightest_of_nested_groups_counts(groups):
    inner = {"a/b/memory.max": f"{30 * GIB}", "a/b/memory.current": "0", "a/b/cpu.max": "400000 100000"}
    outer = {"a/memory.max": f"{9 * GIB}", "a/memory.current": f"{10 * GIB}", "a/cpu.max": "300000 100000"}
    groups("0::/a/b", inner | outer)
    assert found() == (0, 9 * GIB, 3)


def test_groups_of_the_first_version(groups):
    files = {
        "memory/job/memory.limit_in_bytes": f"{8 * GIB}",
        "memory/job/memory.usage_in_bytes": f"{6 * GIB}",
        "memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0",
        "cpu/job/cpu.cfs_quota_us": "-1",
        "cpu/job/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
    }
    groups("9:cpu,cpuacct:/job\n4:memory:/job\n3:pids:/job", files)
    assert found() == (3 * GIB, 8 * GIB, 1)
