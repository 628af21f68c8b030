"""The dependency audit: a package that could not be looked up does not count as safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.audit import verdict

ROOT = Path(__file__).resolve().parents[2]


def package(name: str, *advisories: tuple[str, list[str]]) -> dict[str, Any]:
    vulns = [{"id": advisory, "fix_versions": versions} for advisory, versions in advisories]
    return {"name": name, "version": "1.0", "vulns": vulns}


UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.14.1)"}


@pytest.mark.parametrize(
    ("packages", "line", "bad"),
    [
        ([package("a"), package("b")], "2 of 2 packages looked up, 0 known vulnerabilities", False),
        ([package("a"), UNKNOWN], "1 of 2 packages looked up", False),
        ([package("a", ("PYSEC-1", ["1.1"]))], "a 1.0 has PYSEC-1, fixed in 1.1", True),
        ([package("a", ("PYSEC-1", []))], "no fixed version yet of a (PYSEC-1)", False),
        ([package("a", ("X", [])), package("b", ("Y", ["2"]))], "b 1.0 has Y, fixed in 2", True),
    ],
)
def test_an_advisory_with_a_mended_version_fails_the_check(packages: list[Any], line: str, bad: bool) -> None:
    text, is_bad = verdict(json.dumps({"dependencies": packages, "fixes": []}))
    assert line in text and is_bad is bad


@pytest.mark.parametrize("text", ["", "ERROR: no connection", "[]", "{}"])
def test_a_database_that_breaks_off_is_no_finding_and_no_all_clear(text: str) -> None:
    assert verdict(text) == ("the database broke off, so nothing is known", False)


def test_without_a_network_the_audit_says_so_and_passes() -> None:
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "audit.py"],
        capture_output=True,
        text=True,
        env=os.environ | nowhere,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == (
        "audit: no answer from the database of known vulnerabilities, so nothing was looked up in it\n"
    )
