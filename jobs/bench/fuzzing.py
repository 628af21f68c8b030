"""Runs one target of tests/fuzzing under Atheris, in a child process that its inputs may end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT

__all__ = ["COLUMNS", "fuzz_target", "target_names"]

COLUMNS = ["target", "seconds", "executions", "edges", "findings", "kinds"]

FUZZING = ROOT / "tests" / "fuzzing"
MOST_BYTES = 32_768
INPUT_SECONDS = 10
MEMORY_MB = 2048
MOST_FINDINGS = 5
"""Of one run: libFuzzer ends at the first, and is started again on what it has learned."""


def target_names() -> list[str]:
    """Name the targets, in their order."""
    from targets import TARGETS  # type: ignore[import-not-found]  # found once jobs/fuzz.py runs

    return list(TARGETS)


def fuzz_target(name: str, *, seconds: int, corpus: Path | None) -> dict[str, Any]:
    """Fuzz a target for so many seconds, and give its row; what it finds is written into the tests' folder."""
    kept = FUZZING / "found" / name
    executions = edges = 0
    kinds: list[str] = []
    with tempfile.TemporaryDirectory(prefix="carray-fuzz-") as scratch:
        place, artifacts = (corpus / name if corpus else Path(scratch, "corpus")), Path(scratch, "artifacts")
        _sow(place, name)
        artifacts.mkdir()
        until = time.monotonic() + seconds
        while (left := int(until - time.monotonic())) > 0 and len(kinds) < MOST_FINDINGS:
            text = _run(name, place, artifacts, left)
            counted = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+)", text)
            units = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
            executions += int(units[-1]) if units else int(counted[-1][0]) if counted else 0
            edges = max([edges, *(int(covered) for _, covered in counted)])
            found = list(artifacts.iterdir())
            if not found and not counted:
                raise SystemExit(f"fuzzing {name} came to nothing:\n{text[-2000:]}")
            for path in found:
                kinds.append(_kind(path.name, text))
                kept.mkdir(parents=True, exist_ok=True)
                shutil.move(path, kept / path.name)
                print(f"{name}: {kinds[-1]} by {kept / path.name}\n{_last_stack(text)}", file=sys.stderr)
    unlike = ", ".join(sorted(set(kinds)))
    return {
        "target": name,
        "seconds": seconds,
        "executions": executions,
        "edges": edges,
        "findings": len(kinds),
        "kinds": unlike,
    }


def _sow(place: Path, name: str) -> None:
    from seeds import seeds_of  # type: ignore[import-not-found]  # the same

    place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds_of(name)):
        (place / f"seed-{number}").write_bytes(seed)


def _run(name: str, corpus: Path, artifacts: Path, seconds: int) -> str:
    flags = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MB,
        "print_final_stats": 1,
        "artifact_prefix": f"{artifacts}/",
    }
    arguments = [f"-{flag}={value}" for flag, value in flags.items()]
    command = [sys.executable, str(FUZZING / "run_target.py"), name, *arguments, str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds + 300, check=False)
    return done.stdout + done.stderr


def _kind(file: str, text: str) -> str:
    """Say what an input did: the exception that it raised, or how it ended the process."""
    raised = re.findall(r"^ === Uncaught Python exception: ===\n(\w[\w.]*)", text, flags=re.MULTILINE)
    return raised[-1] if raised and file.startswith("crash") else file.split("-")[0]


def _last_stack(text: str) -> str:
    start = text.rfind("Uncaught Python exception")
    return "\n".join(text[start:].splitlines()[:40]) if start >= 0 else text[-1500:]
