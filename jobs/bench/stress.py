"""Runs `carray stress` for a benchmark and gives its tables as rows of results/*.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from carray.evaluation.stress import stress

__all__ = ["measure"]


def measure(
    bundle: Path, manifest: Path, *, outside: Path, out: Path, images: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Give the rows of `robustness` and `outliers`, each with the bundle, its network and the split's images."""
    found = stress(str(bundle), str(manifest), out=str(out), outside=str(outside), images=images or None, seed=seed)
    return {name: _rows(out / f"{name}.parquet", found[name]) for name in ("robustness", "outliers")}


def _rows(table: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    same = {"bundle_id": about["bundle_id"], "runtime": about["runtime"], "seed": about["seed"]}
    rows = pd.read_parquet(table).astype(object).where(lambda values: values.notna(), None)
    return [same | {str(name): _rounded(value) for name, value in row.items()} for row in rows.to_dict("records")]


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
