"""Fuzzes every reader of foreign files, and keeps the inputs that break one.

    python -m jobs.drills.fuzz pixels --seconds 300
    python -m jobs.drills.fuzz all --seconds 60

Each target of tests/fuzzing/targets.py runs in a child process under Atheris, which looks for inputs that reach new
lines of Python (the decoders' own C is not instrumented). An input that raises anything but a `CarrayError`, ends the
process, or takes over 10 seconds or 2 GB is written to tests/fuzzing/found/TARGET/, where the tests replay it. Appends
a row per target to results/fuzz.csv. Needs the extra `dev`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT, Program, run_python

FUZZING = ROOT / "tests" / "fuzzing"
PROGRAM = FUZZING / "run_target.py"
MOST_BYTES = 32_768
INPUT_SECONDS = 10
MEMORY_MB = 2048
MOST_FINDINGS = 5
"""Of one run: libFuzzer ends at the first, and is started again on what it has learned."""


def main() -> None:
    """Fuzz one target after another, and write the results."""
    program = Program(__doc__, "fuzz.csv")
    program.option("target", help="a target's name, or all")
    program.option("--seconds", default=60, type=int, help="for each target")
    program.option("--corpus", type=Path, help="folder that keeps interesting inputs for the next time")
    given = program.parse()
    names = run_python(PROGRAM, "--list").split()
    if given.target not in (*names, "all"):
        raise SystemExit(f"{given.target!r} is no target; there are {', '.join(names)} and all.")
    rows = []
    for name in names if given.target == "all" else [given.target]:
        rows.append(fuzz_target(name, seconds=given.seconds, corpus=given.corpus))
        program.record(rows[-1:])
    totals = {name: sum(row[name] for row in rows) for name in ("executions", "findings")}
    print(json.dumps({"targets": len(rows), **totals}))
    sys.exit(1 if totals["findings"] else 0)


def fuzz_target(name: str, *, seconds: int, corpus: Path | None) -> dict[str, Any]:
    """Fuzz a target for so many seconds, and return its row; findings are moved into the tests' folder."""
    found_folder = FUZZING / "found" / name
    executions = edges = 0
    kinds: list[str] = []
    with tempfile.TemporaryDirectory(prefix="carray-fuzz-") as scratch:
        inputs, artifacts = (corpus / name if corpus else Path(scratch, "corpus")), Path(scratch, "artifacts")
        inputs.mkdir(parents=True, exist_ok=True)
        artifacts.mkdir()
        until = time.monotonic() + seconds
        while (left := int(until - time.monotonic())) > 0 and len(kinds) < MOST_FINDINGS:
            text = _run(name, inputs, artifacts, left)
            counted = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+)", text)
            units = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
            executions += int(units[-1]) if units else int(counted[-1][0]) if counted else 0
            edges = max([edges, *(int(covered) for _, covered in counted)])
            found = list(artifacts.iterdir())
            if not found and not counted:
                raise SystemExit(f"fuzzing {name} ran no input:\n{text[-2000:]}")
            for path in found:
                kinds.append(_kind(path.name, text))
                found_folder.mkdir(parents=True, exist_ok=True)
                shutil.move(path, found_folder / path.name)
                print(f"{name}: {kinds[-1]} by {found_folder / path.name}\n{_last_stack(text)}", file=sys.stderr)
    figures = {"executions": executions, "edges": edges, "findings": len(kinds), "kinds": ", ".join(sorted(set(kinds)))}
    return {"target": name, "seconds": seconds, **figures}


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
    command = [sys.executable, str(PROGRAM), name, *arguments, str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds + 300, check=False)
    return done.stdout + done.stderr


def _kind(file: str, text: str) -> str:
    """Return what an input did: the exception that it raised, or how it ended the process."""
    raised = re.findall(r"^ === Uncaught Python exception: ===\n(\w[\w.]*)", text, flags=re.MULTILINE)
    return raised[-1] if raised and file.startswith("crash") else file.split("-")[0]


def _last_stack(text: str) -> str:
    start = text.rfind("Uncaught Python exception")
    return "\n".join(text[start:].splitlines()[:40]) if start >= 0 else text[-1500:]


if __name__ == "__main__":
    main()
