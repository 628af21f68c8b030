"""What the machine says of itself, as a container leaves it: each check fails where its thing is short."""

from __future__ import annotations

import resource
from collections import namedtuple
from pathlib import Path

import pytest

from carray.core import cgroups
from carray.preflight import machine

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a function that writes files of /proc and of the control groups, and lets the checks read those."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)

    def write(**files: str) -> None:
        texts = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 12000000 kB\n", "proc/self/cgroup": "0::/\n"}
        texts |= {name.replace("__", "/").replace("_DOT_", "."): text for name, text in files.items()}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    write()
    return write


def test_cores_are_those_of_the_affinity(container):
    found = machine.check_cores()
    assert (found.status, found.seen) == ("ok", "8 of the machine's 16 (8 by affinity)")


def test_cores_are_those_of_the_quota_of_version_two_and_of_a_group_above(container):
    container(proc__self__cgroup="0::/pod/box\n", cgroup__pod__cpu_DOT_max="150000 100000\n")
    container(proc__self__cgroup="0::/pod/box\n", cgroup__cpu_DOT_max="max 100000\n")
    assert cgroups.usable_cores() == 1.5
    assert "1.5 by the container's quota" in machine.check_cores().seen


def test_cores_are_those_of_the_quota_of_version_one(container):
    container(
        proc__self__cgroup="4:cpu,cpuacct:/docker/x\n",
        cgroup__cpu__cpu_DOT_cfs_quota_us="50000\n",
        cgroup__cpu__cpu_DOT_cfs_period_us="100000\n",
    )
    found = machine.check_cores()
    assert found.status == "warn"
    assert found.seen.startswith("0.5 of the machine's 16")
    assert "at least one CPU" in found.remedy


@pytest.mark.parametrize(
    ("available_kb", "status", "words"),
    [
        (12_000_000, "ok", ""),
        (2_000_000, "warn", "use --workers 3"),
        (500_000, "fail", "even one worker needs 0.8 GB"),
    ],
)
def test_memory_is_enough_low_or_none(container, available_kb, status, words):
    container(proc__meminfo=f"MemTotal: 16000000 kB\nMemAvailable: {available_kb} kB\n")
    found = machine.check_memory()
    assert found.status == status
    assert words in found.remedy


def test_memory_is_what_the_container_may_have_less_what_it_uses(container):
    container(
        cgroup__memory_DOT_max="2000000000\n",
        cgroup__memory_DOT_current="1500000000\n",
        cgroup__memory_DOT_stat="anon 1\ninactive_file 500000000\n",
    )
    assert machine.memory_bytes() == (2_000_000_000, 1_000_000_000)


@pytest.mark.parametrize(("free", "status"), [(8e9, "ok"), (64e6, "warn")])
def test_shared_memory_is_held_against_what_ray_wants(container, monkeypatch, free, status):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    found = machine.check_shared_memory()
    assert found.status == status
    assert ("--shm-size=4.1g" in found.remedy) == (status == "warn")


@pytest.mark.parametrize(
    ("limits", "status"), [((1024, 1024), "warn"), ((1024, 65536), "ok"), ((1024, resource.RLIM_INFINITY), "ok")]
)
def test_open_files_count_as_far_as_ray_can_raise_them(monkeypatch, limits, status):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: limits)
    found = machine.check_files()
    assert found.status == status


@pytest.mark.parametrize(("free", "status"), [(9e9, "ok"), (2e9, "warn"), (1e8, "fail")])
def test_disks_have_room(monkeypatch, tmp_path, free, status):
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    cache, temporary = machine.check_disks()
    assert cache.status == temporary.status == status
    assert str(tmp_path / "not" / "yet") in cache.seen
    assert ("CARRAY_CACHE" in cache.remedy) == (status != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_on_a_read_only_disk_fails(monkeypatch):
    monkeypatch.setenv("CARRAY_CACHE", "/proc/carray")
    cache, _ = machine.check_disks()
    assert cache.status == "fail"
    assert "/proc/carray cannot be written" in cache.seen


@pytest.mark.parametrize(
    ("text", "status", "seen"),
    [
        ("model name : EPYC\nflags : avx2 avx512f avx512_vnni\n", "ok", "EPYC: AVX2, AVX-512, VNNI"),
        ("model name : old\nflags : sse avx2\n", "warn", "old: AVX2"),
        ("Features : fp asimddp\n", "ok", "of unknown name: dot product"),
    ],
)
def test_the_processor_has_eight_bit_products_or_not(container, text, status, seen):
    container(proc__cpuinfo=text)
    found = machine.check_instructions()
    assert (found.status, found.seen) == (status, seen)


@pytest.mark.parametrize(
    ("program", "status", "seen"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 550.54'", "ok", "1: NVIDIA H100, 81559 MiB, 550.54"),
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "warn", "finds none (NVIDIA-SMI has failed: no driver)"),
    ],
)
def test_gpus_are_what_nvidia_smi_says(monkeypatch, tmp_path, program, status, seen):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = machine.check_gpus()
    assert found.status == status
    assert seen in found.seen
