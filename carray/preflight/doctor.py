"""Examines everything at once: the machine, its software, storage, and the Ray that there is.

From: the places to read and to write. To: findings, in the order of the report.
Cost: the slowest check; importing torch takes 5 to 15 s, a store that is away up to 25.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from carray.preflight import machine, storage
from carray.preflight.findings import Check, Finding, one_line, run_checks

__all__ = ["examine", "examine_cluster", "look_in_process"]

_PROCESS_SECONDS = 60.0
_RAY_SECONDS = 110.0
"""Of Ray's own connecting, and of what each machine may take (cluster_on_ray.NODE_SECONDS)."""
_KILL_SECONDS = 5.0
"""A process is killed so much earlier than its check would be given up, so that the line says what happened."""


def examine(reads: Sequence[str], writes: Sequence[str], *, ray: bool = True) -> Iterator[Finding]:
    """Examine this machine.

    Args:
        reads: Places that a job is to read: folders, prefixes, tables.
        writes: Places that it is to write to; a small object is written there and deleted.
        ray: Whether to look at the Ray of the environment, too.
    """
    checks = [
        Check("python", machine.check_python),
        Check("packages", machine.check_packages),
        Check("cores", machine.check_cores),
        Check("memory", machine.check_memory),
        Check("shared memory", machine.check_shared_memory),
        Check("open files", machine.check_files),
        Check("disks", machine.check_disks),
        Check("processor", machine.check_instructions),
        Check("GPUs", machine.check_gpus),
        _in_process("decoders"),
        _in_process("scoring"),
        _in_process("training"),
    ]
    for write, uris in ((False, reads), (True, writes)):
        title = "writes" if write else "reads"
        for uri in uris:
            look = partial(storage.check_place, uri, write=write)
            checks.append(Check(title, look, storage.SECONDS, storage=True))
    yield from run_checks(checks + (_of_ray() if ray else []))


def examine_cluster(reads: Sequence[str], writes: Sequence[str]) -> Iterator[Finding]:
    """Let every machine of RAY_ADDRESS's cluster examine itself; trouble of one is a line that names it."""
    wanted = json.dumps({"reads": list(reads), "writes": list(writes)})
    yield from run_checks([*_of_ray(), _in_process("machines", wanted, seconds=_RAY_SECONDS)])


def _of_ray() -> list[Check]:
    address, jobs = os.environ.get("RAY_ADDRESS", ""), os.environ.get("RAY_API_SERVER_ADDRESS", "")
    checks = []
    if address.startswith(("http://", "https://")):
        # `ray job submit` takes it from there, too; the commands themselves refuse it.
        jobs = jobs or address
    elif address in ("", "local"):
        checks.append(Check("Ray", _private))
    else:
        checks.append(_in_process("ray", title="Ray", seconds=_RAY_SECONDS))
    return checks + ([_in_process("jobs", jobs, title="Ray jobs")] if jobs else [])


def _private() -> Iterator[Finding]:
    cores = machine.usable_cores()
    seen = f"RAY_ADDRESS names none: a private one would start on this machine, with {max(1, int(cores))} CPUs"
    yield Finding("Ray", "ok", seen)


def _in_process(name: str, *arguments: str, title: str = "", seconds: float = _PROCESS_SECONDS) -> Check:
    title = title or name
    look = partial(look_in_process, name, *arguments, title=title, seconds=seconds - _KILL_SECONDS)
    return Check(title, look, seconds)


def look_in_process(name: str, *arguments: str, title: str, seconds: float) -> Iterator[Finding]:
    """Look at something in a process of its own (preflight.isolated), which may break or hang.

    Args:
        name: Of the function in `preflight.isolated`.
        arguments: For it.
        title: Of the finding, if the process says none.
        seconds: After which it is killed.
    """
    paths = [str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "carray.preflight.isolated", name, *arguments]
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
