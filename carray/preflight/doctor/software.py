"""Looks at the software: versions against what carray declares, and imports, each in a process of its own.

From: the installed distributions' metadata. To: findings.
Invariants: what cannot be imported, hangs or crashes takes no more than its own process with it; a machine that only
scores needs none of SEARCH_ONLY, and their absence is no failure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import carray
from carray.preflight.doctor.findings import Finding, one_line

__all__ = ["SEARCH_ONLY", "check_packages", "check_python", "look_in_process"]

SEARCH_ONLY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "optuna")
"""Distributions that only preparing a bundle needs: the search, its refit and its export."""
_NAMED = ("ray", "onnxruntime", "pyarrow", "torch", "timm")
"""Those whose versions are worth a place in the line."""
_REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?(?:>=\s*([\d.]+))?\)?")
ROOT = Path(carray.__file__).resolve().parents[1]


def check_python() -> Iterator[Finding]:
    """Say which Python and which carray this is."""
    wanted = (3, 11)
    seen = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < wanted:
        yield Finding("python", "fail", seen, f"carray needs {wanted[0]}.{wanted[1]} or newer")
    elif sys.platform != "linux":
        yield Finding("python", "warn", seen, "carray is tested on Linux only")
    else:
        yield Finding("python", "ok", seen)
    yield Finding("carray", "ok", f"{carray.__version__} in {ROOT}")


def check_packages() -> Iterator[Finding]:
    """Hold the installed distributions against the oldest versions that carray takes."""
    wanted = requirements()
    if not wanted:
        remedy = "install carray with pip, or run it in its clone"
        yield Finding("packages", "warn", f"what carray needs is not known in {ROOT}", remedy)
        return
    scoring = {name: oldest for name, oldest in wanted.items() if name not in SEARCH_ONLY}
    yield _of_group("packages", scoring, optional=False)
    yield _of_group("search packages", {name: wanted[name] for name in SEARCH_ONLY if name in wanted}, optional=True)


def requirements() -> dict[str, str]:
    """Give the oldest version that carray takes of each distribution, "" where any will do."""
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
        text = f"not here: {', '.join(missing)}; a search needs them, scoring does not"
        return Finding(name, "ok", text, absent=True)
    if missing or old:
        text = ", ".join([*old, *(f"{distribution} is missing" for distribution in missing)])
        names = [*missing, *(line.split()[0] for line in old)]
        install = " ".join(f"'{one}>={wanted[one]}'" if wanted[one] else one for one in names)
        return Finding(name, "fail", text, f"pip install {install}")
    return Finding(name, "ok", f"{', '.join(seen)}; all {len(wanted)} are new enough")


def _numbers(version: str) -> tuple[int, ...]:
    """Give a version's release numbers without its trailing zeros: (2, 6) of '2.6.0+cu124'."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]", version)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def look_in_process(name: str, *arguments: str, title: str, seconds: float) -> Iterator[Finding]:
    """Look at something in a process of its own (preflight.doctor.isolated), which may break or hang.

    Args:
        name: Of the function in `preflight.doctor.isolated`.
        arguments: For it.
        title: Of the finding, if the process says none.
        seconds: After which it is killed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "carray.preflight.doctor.isolated", name, *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding(title, "fail", f"no end within {seconds:.0f} s", "look whether it hangs by itself")
        return
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        yield from (Finding(**values) for values in json.loads(lines[-1]))
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = one_line(said[-1]) if said else "it said nothing"
    if done.returncode < 0:
        name_of = {number.value: number.name for number in signal.Signals}
        reason = f"its process died of {name_of.get(-done.returncode, -done.returncode)}"
    yield Finding(title, "fail", reason, _remedy(reason))


def _remedy(reason: str) -> str:
    """Give what helps against an import that fails, or a process that dies."""
    module = re.search(r"No module named '([\w]+)", reason)
    if module:
        return f"install what brings {module[1]}: pip install carray"
    return next((remedy for word, remedy in _REMEDIES.items() if word in reason), "reinstall what it names")


_REMEDIES = {
    "libGL": "keep opencv-python-headless and uninstall opencv-python, or install Debian's libgl1",
    "libgthread": "keep opencv-python-headless and uninstall opencv-python, or install Debian's libglib2.0-0",
    "libcud": "install the torch that belongs to this machine: pytorch.org tells the index for its CUDA, or for CPUs",
    "GLIBC": "the package is built for a newer Linux: take a newer base image",
    "SIGILL": "the package is built for a newer processor: take another machine, or an older build",
    "SIGKILL": "it was killed, most likely for its memory: free some",
}
