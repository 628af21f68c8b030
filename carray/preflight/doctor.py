"""Runs all checks side by side: the machine, its software, storage, and Ray; yields findings in the report's order.

Cost: that of the slowest check; importing torch takes 5 to 15 s, a store that does not answer up to 25.
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

from carray.core.cgroups import usable_cores
from carray.preflight import machine, storage
from carray.preflight.findings import Check, Finding, judge, one_line, run_checks

__all__ = ["examine", "examine_cluster", "look_in_process"]

_PROCESS_SECONDS = 60.0
_RAY_SECONDS = 110.0
"""Connecting to Ray, and the checks of a machine (cluster_on_ray.NODE_SECONDS)."""
_KILL_SECONDS = 5.0
"""A process is killed this long before its check times out, so that the finding tells what happened."""


def examine(reads: Sequence[str], writes: Sequence[str], *, ray: bool = True) -> Iterator[Finding]:
    """Examine this machine.

    Args:
        reads: URIs that a job would read: folders, prefixes, tables.
        writes: Folders that it would write to; a small object is written there and deleted.
        ray: Whether to check the Ray of the environment, too.
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
            look = partial(storage.check_uri, uri, write=write)
            checks.append(Check(title, look, storage.SECONDS, storage=True))
    yield from run_checks(checks + (_of_ray() if ray else []))


def examine_cluster(reads: Sequence[str], writes: Sequence[str]) -> Iterator[Finding]:
    """Run the checks on every machine of the cluster at RAY_ADDRESS; a finding names its machine."""
    wanted = json.dumps({"reads": list(reads), "writes": list(writes)})
    yield from run_checks([*_of_ray(), _in_process("machines", wanted, seconds=_RAY_SECONDS)])


def _of_ray() -> list[Check]:
    address, jobs = os.environ.get("RAY_ADDRESS", ""), os.environ.get("RAY_API_SERVER_ADDRESS", "")
    checks = []
    if address.startswith(("http://", "https://")):
        # `ray job submit` accepts such an address, too; carray's commands refuse it.
        jobs = jobs or address
    elif address in ("", "local"):
        cpus = max(1, int(usable_cores()))
        seen = f"RAY_ADDRESS is not set: tune would start a private Ray on this machine, with {cpus} CPUs"
        checks.append(Check("Ray", lambda: judge("Ray", seen)))
    else:
        checks.append(_in_process("ray", title="Ray", seconds=_RAY_SECONDS))
    return checks + ([_in_process("jobs", jobs, title="Ray jobs")] if jobs else [])


def _in_process(name: str, *arguments: str, title: str = "", seconds: float = _PROCESS_SECONDS) -> Check:
    title = title or name
    look = partial(look_in_process, name, *arguments, title=title, seconds=seconds - _KILL_SECONDS)
    return Check(title, look, seconds)


def look_in_process(name: str, *arguments: str, title: str, seconds: float) -> Iterator[Finding]:
    """Run a check in a process of its own (preflight.isolated), since it may crash or hang.

    Args:
        name: Key of the check in `isolated.PARTS`.
        arguments: Its arguments.
        title: Name of the finding if the process fails.
        seconds: Time limit.
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
        yield Finding(title, "fail", f"not finished within {seconds:.0f} s", "run it alone to see whether it hangs")
        return
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        yield from (Finding(**values) for values in json.loads(lines[-1]))
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = one_line(said[-1]) if said else "no message"
    if done.returncode < 0:
        name_of = {number.value: number.name for number in signal.Signals}
        reason = f"its process died of {name_of.get(-done.returncode, -done.returncode)}"
    yield Finding(title, "fail", reason, _remedy(reason))


def _remedy(reason: str) -> str:
    """Suggest a remedy for a failed import or a process that died."""
    module = re.search(r"No module named '([\w]+)", reason)
    if module:
        return f"install the package of {module[1]}: pip install carray"
    return next((remedy for word, remedy in _REMEDIES.items() if word in reason), "reinstall that package")


_REMEDIES = {
    "libGL": "keep opencv-python-headless and uninstall opencv-python, or install Debian's libgl1",
    "libgthread": "keep opencv-python-headless and uninstall opencv-python, or install Debian's libglib2.0-0",
    "libcud": "install the torch build for this machine's CUDA, or for CPUs; see pytorch.org",
    "GLIBC": "the package is built for a newer Linux: use a newer base image",
    "SIGILL": "the package is built for a newer processor: use another machine, or an older build",
    "SIGKILL": "it was killed, probably for lack of memory: free some",
}
