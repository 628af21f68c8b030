"""A small finished run, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_predictions import write_predictions


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    return write_predictions(str(tmp_path / "predictions"))
