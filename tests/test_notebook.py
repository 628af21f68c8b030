"""The notebook in results/ runs on a real run's predictions, and what it has saved is small and names no machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.score_shard import ShardScorer
from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_dataset

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "results" / "query_predictions.ipynb"
KEPT_BYTES = 100_000


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    """Classify drawn cars and broken files with an untrained network, in this process."""
    import numpy as np
    import torch

    from carray.bundle.bundle_folder import open_bundle
    from carray.bundle.pack import pack_bundle
    from carray.classify.plan import describe_run, plan_run
    from carray.images.pixels import PixelSettings
    from carray.search.train.hyperparameters import CnnHyper
    from carray.search.train.nets import build_net

    torch.manual_seed(0)
    hyper, bundle, out = CnnHyper(input_size=40, stages=2, width=4), str(tmp_path / "bundle"), str(tmp_path / "out")
    pack_bundle(
        build_net(hyper, class_count=len(DEMO_CLASSES)),
        bundle,
        classes=list(DEMO_CLASSES),
        pixels=PixelSettings(decode_size=48, input_size=40),
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=hyper.model_dump(mode="json"),
        search_note={"trial_id": "none"},
        parity_pixels_NHWC=np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8),
    )
    draw_dataset(tmp_path / "bucket", images_per_class=3)
    draw_broken_files(tmp_path / "bucket" / "broken")
    settings, info = ClassifySettings(), open_bundle(bundle)
    wanted = describe_run(info, bundle, str(tmp_path / "bucket"), settings)
    run, totals = plan_run(out, wanted, settings, uses_boxes=False)
    scorer = ShardScorer(bundle, out=out, run=run, settings=settings)
    for shard in range(totals.shards):
        scorer.score_shard(shard)
    return out


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_cell_runs(notebook: Any, predictions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("CARRAY_PREDICTIONS", predictions)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    said = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "decode_error" in said and "reads outside its tables" in said
    assert all(cell.outputs for cell in notebook.cells[3:] if cell.cell_type == "code")


def test_what_is_saved_is_a_whole_run_small_and_names_no_machine(notebook: Any) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert NOTEBOOK.stat().st_size < KEPT_BYTES
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) >= len(code) - 2
    assert {output.output_type for output in outputs} <= {"stream", "execute_result"}
    assert not any("image" in kind for output in outputs for kind in output.get("data", {})), "no photograph"
    said = json.dumps([*outputs, notebook.metadata])
    assert re.findall(r"(?<![\w.<])/(?:home|root|tmp|work|usr|mnt|var|Users)\b", said) == []
