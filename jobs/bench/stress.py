"""Runs `carray stress` for a benchmark and gives its tables as rows of results/*.csv."""

from __future__ import annotations

from collections.abc import Iterator
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
    same = {name: found["robustness"][name] for name in ("bundle_id", "runtime", "seed")}
    corrupted = pd.read_parquet(out / "robustness.parquet").astype(object).where(lambda values: values.notna(), None)
    rows: dict[str, list[dict[Any, Any]]] = {
        "robustness": corrupted.to_dict("records"),
        "outliers": list(_outliers(found["outside"])),
    }
    return {
        table: [same | {str(name): _rounded(value) for name, value in row.items()} for row in of_table]
        for table, of_table in rows.items()
    }


def _outliers(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, own in found["kinds"].items():
        yield {
            "kind": kind,
            "score": "centred_energy",  # the name of ood_score in earlier rows, which had others beside it
            **{name: own[name] for name in ("auroc", "auroc_low", "auroc_high")},
            "fpr_at_95_tpr": None,
            "inside_images": found["inside_images"],
            "outside_images": own["scored"],
            "outside_sources": own["sources"],
        }


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
