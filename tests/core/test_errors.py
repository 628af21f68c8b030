"""The table of error codes holds every code that a row may carry, with the status of the error that carries it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import carray
from carray.core.errors import ERROR_CODES, DecodeError, FetchError

STATUSES = {"FetchError": "fetch_error", "DecodeError": "decode_error"}
SOURCES = [path for path in Path(carray.__file__).parent.rglob("*.py") if path.name != "errors.py"]


def test_every_code_that_is_raised_is_in_the_table_and_every_code_of_the_table_is_used() -> None:
    raised, words = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in STATUSES and node.args:
                raised |= {(code.value, STATUSES[node.func.id]) for code in node.args[:1] if type(code) is ast.Constant}
    assert len(raised) > 8
    assert raised <= {(code, found.status) for code, found in ERROR_CODES.items()}
    assert set(ERROR_CODES) <= words
    assert all(found.meaning and found.remedy for found in ERROR_CODES.values())


@pytest.mark.parametrize("kind", [FetchError, DecodeError])
def test_an_image_error_keeps_its_code_on_its_way_between_processes(kind: type[FetchError]) -> None:
    error = kind("denied", "the store refused it")
    make, values = error.__reduce__()
    assert (make(*values).code, str(make(*values))) == ("denied", "the store refused it")
