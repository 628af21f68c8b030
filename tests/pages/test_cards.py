"""Untrusted text on cards."""

from __future__ import annotations

import pytest

from carray.reports.predictions import card, last_part, readable
from carray.reports.thumbnails import Thumbnail
from carray.testing.predictions import failed, scored


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain & <b>bold</b> Käfer 車", "plain & <b>bold</b> Käfer 車"),
        ("two\nlines\tand\0", "two\\nlines\\tand\\x00"),
        ("gpj.\u202ecar.exe", "gpj.\\u202ecar.exe"),  # turns what follows round
        ("zero\u200bwidth\ufeff\u2028", "zero\\u200bwidth\\ufeff\\u2028"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_letters_that_do_not_show_are_spelled_out(text: object, shown: str) -> None:
    assert readable(text) == shown


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://b/2026/a.jpg", "a.jpg"),
        ("s3://b/2026/folder/", "folder"),
        ("s3://b/a//b.jpg", "b.jpg"),
        ("/p/two\nlines.jpg", "two\\nlines.jpg"),
        ("no folder.jpg", "no folder.jpg"),
    ],
)
def test_a_keys_own_name(uri: str, name: str) -> None:
    assert last_part(uri) == name


def test_a_card_of_nulls_is_a_card() -> None:
    row = {"picks": ["failed"], "top5_labels": None, "top5_scores": None, "etag": None, "make": None, "label": None}
    row |= {"size_bytes": None, "width": None, "height": None, "score": float("nan"), "margin": None}
    shown = card(failed("/p/x.jpg", "empty") | row, None)
    assert (shown["scored"], shown["score"], shown["top5"], shown["facts"]) == (False, None, [], "")
    assert shown["code"] == "empty" and shown["picture"] is None


def test_a_picture_that_could_not_be_read_leaves_its_reason() -> None:
    row = scored("/p/x.jpg") | {"picks": ["random"], "error_code": None, "error": None}
    shown = card(row, Thumbnail(reason="the file does not exist"))
    assert shown["picture"] is None and shown["reason"] == "the file does not exist"
    assert [label for label, _ in shown["top5"]] == row["top5_labels"]
