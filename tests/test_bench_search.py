"""The search's benchmarks: how soon a search with ASHA reached an accuracy; what the GPU benchmark says is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

from jobs.bench.rows import columns_of
from jobs.bench.search import curves, gpu
from jobs.bench.search.arms import Measured


def test_the_search_on_a_gpu_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "sees no GPU; run it on a machine with one" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_both_arms_are_compared_when_they_reached_what_both_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def epochs(*pairs: tuple[float, float | None]) -> list[dict[str, float | None]]:
        return [{"clock_seconds": seconds, "val_top1": top1} for seconds, top1 in pairs]

    class Plan(curves.Plan):
        def images(self, manifest: str, work: Path) -> object:
            return type("Images", (), {"uri": manifest})

        def configurations(self) -> list[dict[str, object]]:
            return []

    live = Measured(1.0, epochs((10.0, 0.2), (30.0, 0.6), (40.0, None)), "")
    monkeypatch.setattr(curves, "measure", lambda arm, folder: live)
    pd.DataFrame(epochs((12.0, 0.3), (60.0, 0.6), (90.0, 0.9))).to_csv(tmp_path / "curves.csv", index=False)
    asha, unpruned = curves.run_live(Plan(), "m", tmp_path, tmp_path)
    assert (asha["target_val_top1"], asha["seconds_to_target"], unpruned["seconds_to_target"]) == (0.6, 30.0, 60.0)
    assert (asha["sooner_times"], asha["wall_seconds"], unpruned["val_top1"]) == (2.0, 40.0, 0.9)
    assert set(asha) <= set(columns_of("tune.csv"))
