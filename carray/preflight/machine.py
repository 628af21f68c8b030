"""Checks this machine: cores, memory, disks, limits, the processor, GPUs, and the versions of installed packages.

Sources: /proc, this process's control groups, nvidia-smi, and the metadata of installed distributions. A container's
limits count, not the host's. Imports nothing that could be missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import carray
from carray.core.cgroups import PROC, control_groups, cpu_quota, read_number, read_text, usable_cores
from carray.preflight.findings import Finding, judge, one_line

__all__ = [
    "ROOT",
    "SEARCH_ONLY",
    "check_cores",
    "check_disks",
    "check_files",
    "check_gpus",
    "check_instructions",
    "check_memory",
    "check_packages",
    "check_python",
    "check_shared_memory",
    "requirements",
]

SHARED = Path("/dev/shm")
GB = 1e9

WORKER_BYTES, DRIVER_BYTES = 0.5 * GB, 0.3 * GB
"""Most memory of a scoring worker and of the driver (results/README.md)."""
_RAY_SHARE, _RAY_MOST = 0.3, 10 * GB
"""Size of Ray's object store, as a fraction of memory and at most; if /dev/shm is smaller, Ray uses the disk."""
_FILES_WANTED, _FILES_RAISED = 8192, 65536
"""What Ray wants at least, and up to which it raises the soft limit itself."""
_DISK_LOW, _DISK_NONE = 5 * GB, 0.5 * GB


def check_cores() -> Finding:
    """Check how many cores this process may use."""
    machine, allowed, quota, cores = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cpu_quota(), usable_cores()
    limits = [f"{allowed} by affinity"] if allowed < machine else []
    limits += [f"{quota:g} by the container's quota"] if quota is not None and quota < machine else []
    why = f" of the machine's {machine} ({', '.join(limits)})" if limits else ""
    few = "give the container at least one CPU: a worker needs one" if cores < 1 else ""
    return judge("cores", f"{cores:g}{why}", warn=few)


def check_memory() -> Finding:
    """Check total and free memory."""
    total, free = memory_bytes()
    least, wanted = DRIVER_BYTES + WORKER_BYTES, DRIVER_BYTES + WORKER_BYTES * max(1, int(usable_cores()))
    none = f"free some memory: even one worker needs {_gb(least)}" if free < least else ""
    fewer = int((free - DRIVER_BYTES) / WORKER_BYTES)
    low = f"a worker on each core may need {_gb(wanted)} in all: use --workers {fewer}" if free < wanted else ""
    return judge("memory", f"{_gb(free)} free of {_gb(total)}", warn=low, fail=none)


def memory_bytes() -> tuple[int, int]:
    """Measure (total, free) memory in bytes, within a container's limits."""
    lines = dict(line.split(":", 1) for line in read_text(PROC / "meminfo").splitlines() if ":" in line)
    total, free = (int(lines.get(name, "0").split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for folder in control_groups("memory"):
        limit = read_number(folder / "memory.max") or read_number(folder / "memory.limit_in_bytes")
        used = read_number(folder / "memory.current") or read_number(folder / "memory.usage_in_bytes") or 0
        stats = dict(line.split() for line in read_text(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        used -= int(stats.get("inactive_file", stats.get("total_inactive_file", 0)))  # reclaimable
        if limit and limit < total:
            total, free = limit, max(0, min(free, limit - used))
    return total, free


def check_shared_memory() -> Finding:
    """Check whether /dev/shm is large enough for Ray's object store, by Ray's own rule."""
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError as err:
        return judge("shared memory", f"{SHARED} is not there ({err.strerror})", warn="Ray uses its disk, slowly")
    wanted = min(_RAY_SHARE * memory_bytes()[1], _RAY_MOST)
    low = (
        f"Ray would put its object store of {_gb(wanted)} on the disk: start the container with "
        f"--shm-size={wanted / GB * 1.1:.1f}g, or in Kubernetes mount an emptyDir of medium Memory there"
    )
    return judge("shared memory", f"{_gb(free)} free in {SHARED}", warn=low if free < wanted else "")


def check_files() -> Finding:
    """Check how many files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    reached = max(soft, _FILES_RAISED if unlimited else min(hard, _FILES_RAISED))
    if reached < _FILES_WANTED:
        few = f"Ray wants {_FILES_WANTED:,}: raise the hard limit (ulimit -Hn, or the container's --ulimit nofile)"
        return judge("open files", f"{hard:,} at most", warn=few)
    raised = f"; Ray raises that to {reached:,}" if reached > soft else ""
    return judge("open files", f"{soft:,} at once{raised}")


def check_disks() -> Iterator[Finding]:
    """Check the free space of the cache and the temporary folder, and whether they are writable."""
    from carray.core.environment import cache_home

    folders = {"cache": (cache_home(), "CARRAY_CACHE"), "temporary folder": (Path(tempfile.gettempdir()), "TMPDIR")}
    for name, (folder, variable) in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        try:
            with tempfile.NamedTemporaryFile(dir=there, prefix=".carray-doctor-"):
                free = shutil.disk_usage(there).free
        except OSError as err:
            seen = f"{folder} cannot be written ({err.strerror})"
            yield judge(name, seen, fail=f"make it writable, or set {variable} to a folder that is")
            continue
        remedy = f"free space there, or set {variable} to a larger disk"
        low, none = (remedy if free < least else "" for least in (_DISK_LOW, _DISK_NONE))
        yield judge(name, f"{_gb(free)} free in {folder}", warn=low, fail=none)


def check_instructions() -> Finding:
    """Check whether the processor has the instructions for fast int8 scoring."""
    pairs = [line.split(":", 1) for line in read_text(PROC / "cpuinfo").splitlines() if ":" in line]
    about = {key.strip(): value.strip() for key, value in reversed(pairs)}
    name, flags = about.get("model name", "of unknown name"), set(about.get("flags", about.get("Features", "")).split())
    has = [title for flag, title in _INSTRUCTIONS.items() if flag in flags]
    seen = f"{name}: {', '.join(has) or 'none of ' + ', '.join(dict.fromkeys(_INSTRUCTIONS.values()))}"
    lacking = (
        "it lacks instructions for 8-bit products, so int8 may not be faster here, or compute other results, "
        "which workers detect; then use --runtime fp32"
    )
    return judge("processor", seen, warn="" if flags & _EIGHT_BITS else lacking)


_INSTRUCTIONS = {
    **{"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "avx512_bf16": "BF16"},
    **{"amx_int8": "AMX", "asimddp": "dot product", "i8mm": "int8 matrices"},
}
_EIGHT_BITS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def check_gpus() -> Finding:
    """List the GPUs and their driver, by nvidia-smi."""
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi")
    if program is None and devices:
        remedy = "install the driver's tools, or give the container the utility capability"
        return judge("GPUs", f"{len(devices)} in /dev, but no nvidia-smi", warn=remedy)
    if program is None:
        return judge("GPUs", "none: training and scoring run on the processor")
    asked = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=8, check=False)
    cards = [one_line(line) for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not cards:
        reason = one_line(done.stdout or done.stderr) or f"exit code {done.returncode}"
        remedy = "repair the driver (a reboot after its update often helps), or give the container the GPU"
        return judge("GPUs", f"nvidia-smi finds none ({reason})", warn=remedy)
    return judge("GPUs", f"{len(cards)}: {'; '.join(dict.fromkeys(cards))}")


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.0f} MB"


SEARCH_ONLY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "optuna")
"""Distributions that only the search, refit and export need."""
_NAMED = ("ray", "onnxruntime", "pyarrow", "torch", "timm")
"""Distributions whose versions are shown."""
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?(?:>=\s*([\d.]+))?\)?")
ROOT = Path(carray.__file__).resolve().parents[1]


def check_python() -> Iterator[Finding]:
    """Check the version of Python, and name that of carray."""
    old = "" if sys.version_info >= (3, 11) else "carray needs 3.11 or newer"
    other = "" if sys.platform == "linux" else "carray is tested on Linux only"
    seen = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield judge("python", seen, warn=other, fail=old)
    yield judge("carray", f"{carray.__version__} in {ROOT}")


def check_packages() -> Iterator[Finding]:
    """Compare the installed distributions with the oldest versions that carray supports."""
    wanted = requirements()
    if not wanted:
        remedy = "install carray with pip, or run it in its clone"
        yield judge("packages", f"the requirements of carray are not known in {ROOT}", warn=remedy)
        return
    scoring = {name: oldest for name, oldest in wanted.items() if name not in SEARCH_ONLY}
    yield _of_group("packages", scoring, optional=False)
    yield _of_group("search packages", {name: wanted[name] for name in SEARCH_ONLY if name in wanted}, optional=True)


def requirements() -> dict[str, str]:
    """Read the oldest version that carray supports of each distribution; "" for any."""
    try:
        lines = importlib.metadata.requires("carray") or []
        lines = [line for line in lines if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:  # run from a clone, or from a job's working directory
        place = ROOT / "pyproject.toml"
        lines = tomllib.loads(place.read_text())["project"]["dependencies"] if place.exists() else []
    matches = [_REQUIREMENT.match(line) for line in lines]
    return {match[1]: match[2] or "" for match in matches if match}


def _of_group(name: str, wanted: dict[str, str], *, optional: bool) -> Finding:
    missing, old, seen = [], [], []
    for distribution, oldest in wanted.items():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            missing.append(distribution)
            continue
        if _numbers(version) < _numbers(oldest):
            old.append(f"{distribution} {version} is below {oldest}")
        if distribution in _NAMED:
            seen.append(f"{distribution} {version}")
    if optional and missing and not old:
        text = f"not installed: {', '.join(missing)}; a search needs them, scoring does not"
        return Finding(name, "ok", text, absent=True)
    if missing or old:
        text = ", ".join([*old, *(f"{distribution} is missing" for distribution in missing)])
        names = [*missing, *(line.split()[0] for line in old)]
        install = " ".join(f"'{one}>={wanted[one]}'" if wanted[one] else one for one in names)
        return Finding(name, "fail", text, f"pip install {install}")
    return Finding(name, "ok", f"{', '.join(seen)}; all {len(wanted)} are recent enough")


def _numbers(version: str) -> tuple[int, ...]:
    """Parse a version's release numbers without trailing zeros: (2, 6) of '2.6.0+cu124'."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
