"""A small finished run, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from carray.testing.predictions import SHARDS, write_predictions


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    return write_predictions(str(tmp_path / "predictions"))


@pytest.fixture
def placed(tmp_path: Path) -> str:
    """The same run over images in `tmp_path`, under whole paths, as classify writes them."""
    shards = [[row | {"uri": f"{tmp_path}/{row['uri']}"} for row in rows] for rows in SHARDS]
    return write_predictions(str(tmp_path / "placed"), shards)
