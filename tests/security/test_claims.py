"""SECURITY.md claims what tests show: every test that it names exists, and every claim names a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_the_test_behind_a_claim_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_claim_of_the_tables_names_its_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    claims = [line for line in rows if not line.startswith(("| comes in ", "| goes out "))]
    assert len(claims) > 25
    assert [line for line in claims if "::test_" not in line.rsplit("|", 2)[1]] == []


def test_every_test_of_a_hostile_thing_is_a_claim() -> None:
    """A file of tests here that SECURITY.md does not name would be forgotten; this file and the audit are exempt."""
    here = {
        node.name: path.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    claimed = {name for _, name in NAMED}
    assert {file for name, file in here.items() if name in claimed} >= set(here.values()) - {
        "test_claims.py",
        "test_audit.py",
    }


def test_it_stays_short() -> None:
    assert len(TEXT.splitlines()) <= 120
