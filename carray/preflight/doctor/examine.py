"""Examines everything at once: the machine, its software, storage, and the Ray that there is.

From: the places to read and to write. To: findings, in the order of the report.
Cost: the slowest check; importing torch takes 5 to 15 s, a store that is away up to 25.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial

from carray.preflight.doctor import machine, software, storage
from carray.preflight.doctor.findings import Check, Finding, run_checks

__all__ = ["examine", "examine_cluster"]

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
        Check("python", software.check_python),
        Check("packages", software.check_packages),
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
    look = partial(software.look_in_process, name, *arguments, title=title, seconds=seconds - _KILL_SECONDS)
    return Check(title, look, seconds)
