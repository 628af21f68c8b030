"""What this process may use of its machine: the limits of its control groups, which containers set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["control_groups", "cpu_quota", "read_number", "read_text", "usable_cores"]

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def usable_cores() -> float:
    """Count the cores that this process may use, by affinity and by a container's quota."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return min(float(allowed), quota) if quota is not None else float(allowed)


def cpu_quota() -> float | None:
    """Read the CPU quota of the control groups; None without a limit."""
    quotas = []
    for folder in control_groups("cpu"):
        whole = read_text(folder / "cpu.max").split()  # version 2: quota and period, or max
        if len(whole) == 2 and whole[0] != "max":
            quotas.append(int(whole[0]) / int(whole[1]))
        quota, period = read_number(folder / "cpu.cfs_quota_us"), read_number(folder / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def control_groups(controller: str) -> Iterator[Path]:
    """List the folders of this process's control groups and their parents, of cgroup versions 1 and 2."""
    for line in read_text(PROC / "self" / "cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" or controller in names.split(","):
            root = CGROUPS if number == "0" else CGROUPS / controller
            own = root / path.strip("/")
            # A container sees its own group as the root, whatever the path says.
            yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def read_text(path: Path) -> str:
    """Read a file of the kernel; empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_number(path: Path) -> int | None:
    """Read a file of the kernel that holds a number; None where there is none."""
    text = read_text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None
