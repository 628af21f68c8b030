"""Findings of checks: ok, warn or fail in one line, with a remedy.

A check that raises or hangs is a finding, too. No finding contains the password of an address, or a control character.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

__all__ = [
    "Check",
    "Finding",
    "as_json",
    "exit_code",
    "finding_text",
    "judge",
    "merge_hosts",
    "one_line",
    "run_checks",
    "summary",
]

Status = Literal["ok", "warn", "fail"]
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")
_NAME_LETTERS = 17
_MOST_LETTERS = 300
"""Of a library's message; its beginning is enough."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report."""

    name: str
    """What was checked: cores, memory, ..."""
    status: Status
    seen: str
    remedy: str = ""
    """What to do; empty if ok."""
    absent: bool = False
    """Whether an optional part is missing, which is no failure."""
    storage: bool = False
    """Whether it is about storage, whose failures have their own exit code."""
    host: str = ""
    """The machine of the cluster; empty for this one."""


def judge(name: str, seen: str, *, warn: str = "", fail: str = "", storage: bool = False) -> Finding:
    """Make a finding: a failure or a warning if there is a remedy for one, else ok."""
    return Finding(name, "fail" if fail else "warn" if warn else "ok", seen, fail or warn, storage=storage)


@dataclass(frozen=True, slots=True)
class Check:
    """A check and its time limit."""

    name: str
    run: Callable[[], Finding | Iterable[Finding]]
    seconds: float = 10.0
    storage: bool = False


def run_checks(checks: Sequence[Check]) -> Iterator[Finding]:
    """Run checks side by side; yield their findings in the checks' order, each as soon as it is known."""
    found: dict[int, list[Finding]] = {}
    started = time.monotonic()

    def run(number: int, check: Check) -> None:
        try:
            result = check.run()
            found[number] = [result] if isinstance(result, Finding) else list(result)
        except Exception as err:  # a broken machine may raise anything, and the other findings still count
            reason = f"could not be checked ({type(err).__name__}: {one_line(err)})"
            found[number] = [_broken(check, reason, "fix that, and run doctor again")]

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(checks)]
    for thread in threads:
        thread.start()
    for number, (thread, check) in enumerate(zip(threads, checks, strict=True)):
        thread.join(max(0.0, started + check.seconds - time.monotonic()))
        late = f"no answer within {check.seconds:.0f} s"
        yield from found.get(number) or [_broken(check, late, "run it alone to see whether it hangs")]


def _broken(check: Check, seen: str, remedy: str) -> Finding:
    return Finding(check.name, "fail", seen, remedy, storage=check.storage)


def finding_text(found: Finding) -> str:
    """Format a finding: status, name, what was seen; what to do."""
    seen = f"{found.seen}; {found.remedy}" if found.remedy else found.seen
    where = f" [{found.host}]" if found.host else ""
    return one_line(f"{found.status:<4}  {found.name:<{_NAME_LETTERS}} {seen}{where}", most=10_000, keep_spaces=True)


def one_line(text: object, *, most: int = _MOST_LETTERS, keep_spaces: bool = False) -> str:
    """Shorten a text to one line, without control characters and the password of an address."""
    line = str(text) if keep_spaces else " ".join(str(text).split())
    line = re.sub(r"//[^/@\s]*@", "//…@", line)
    return "".join(char if char.isprintable() else "?" for char in line)[:most]


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """Count the findings, and tell whether this machine can search and score."""
    counts: dict[str, Any] = {status: sum(found.status == status for found in findings) for status in STATUSES}
    bad = {found.name for found in findings if found.status == "fail" or found.absent}
    scoring = not bad & {"python", "packages", "decoders", "scoring"}
    return {**counts, "scoring": scoring, "search": scoring and not bad & {"search packages", "training"}}


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 if nothing failed, 4 if only storage failed, as a job would, else 2."""
    failed = [found for found in findings if found.status == "fail"]
    return 0 if not failed else 4 if all(found.storage for found in failed) else 2


def merge_hosts(by_host: dict[str, list[Finding]]) -> list[Finding]:
    """Merge the findings of several machines: equal ones become one line that names its machines."""
    merged: list[Finding] = []
    names = list(dict.fromkeys(found.name for findings in by_host.values() for found in findings))
    for name in names:
        groups: dict[Finding, list[str]] = {}
        fine: list[str] = []
        for host, findings in by_host.items():
            for found in (one for one in findings if one.name == name):
                if found.status == "ok":
                    fine.append(host)
                groups.setdefault(found, []).append(host)
        well = [found for found in groups if found.status == "ok"]
        if len(well) > 1:  # machines may differ where all is well: the first one is shown
            merged.append(replace(well[0], host=_hosts([groups[well[0]][0]], others=len(set(fine)) - 1)))
        elif well:
            merged.append(replace(well[0], host=_hosts(groups[well[0]])))
        merged += [replace(found, host=_hosts(hosts)) for found, hosts in groups.items() if found.status != "ok"]
    return merged


def _hosts(hosts: Sequence[str], *, others: int = 0) -> str:
    if others:
        return f"{hosts[0]}; {others} other{'s' if others > 1 else ''} ok, too"
    return f"all {len(hosts)} machines" if len(hosts) > 3 else ", ".join(hosts)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Convert findings for JSON, without empty values."""
    return [{name: value for name, value in asdict(found).items() if value} for found in findings]
