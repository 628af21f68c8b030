"""int8 with layers in floats: which blocks a network has, and what the search does where plain int8 loses too much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from carray.bundle import quantise
from carray.bundle.bundle_folder import BundleInfo, open_bundle, write_info
from carray.bundle.certificates import Views, add_int8
from carray.bundle.pack import pack_bundle
from carray.bundle.quantise import Quantiser
from carray.bundle.scorer import Scorer, resolve_runtime
from carray.images.pixels import PixelSettings
from carray.search.train.export import export_onnx
from carray.search.train.hyperparameters import CnnHyper
from carray.search.train.nets import build_net

SIZE, CLASSES = 32, ["blue", "green", "grey", "red"]
HYPER = CnnHyper(input_size=SIZE, stages=3, width=8, dropout=0)


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw noisy images, close to grey, of one colour a class: uint8 (count, 32, 32, 3), and the classes."""
    random = np.random.default_rng(seed)
    labels_N = np.arange(count) % len(CLASSES)
    colours = np.array([[140, 130, 130], [130, 140, 130], [130, 130, 140], [133, 133, 133]])
    noise = random.normal(0, 40, (count, SIZE, SIZE, 3))
    return (colours[labels_N][:, None, None] + noise).clip(0, 255).astype(np.uint8), labels_N


@pytest.fixture(scope="module")
def net() -> Any:
    """Train a small CNN for a second, until it tells most of the colours apart."""
    import torch

    torch.manual_seed(0)
    net = build_net(HYPER, class_count=len(CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    pixels_NHWC, labels_N = coloured(512, 1)
    for step in range(60):
        rows = slice(64 * (step % 8), 64 * (step % 8) + 64)
        logits_BK, _ = net(torch.from_numpy(pixels_NHWC[rows]).permute(0, 3, 1, 2).float())
        loss = torch.nn.functional.cross_entropy(logits_BK, torch.from_numpy(labels_N[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def uneven(net: Any) -> Any:
    """Make a channel between two convolutions a thousand times larger, and the second's weights as much smaller.

    The function stays the same, but one range for all channels then leaves the others a few of the 256 steps.
    """
    import torch

    changed = copy.deepcopy(net)
    body = [module for module in changed.trunk if hasattr(module, "body")][-1].body
    with torch.no_grad():
        body[1].weight[0] *= 1000
        body[1].bias[0] *= 1000
        body[3].weight[:, 0] /= 1000
    return changed


@pytest.fixture(scope="module")
def views() -> Views:
    calibration_NHWC, _ = coloured(64, 2)
    judging_NHWC, labels_N = coloured(200, 3)
    return Views(calibration_NHWC, judging_NHWC, labels_N)


@pytest.fixture(autouse=True)
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no measured rate decide: the networks here are too small."""
    monkeypatch.setattr(quantise, "LEAST_SPEEDUP", 0.0)


def packed(net: Any, folder: Path, views: Views) -> str:
    pack_bundle(
        net,
        str(folder),
        classes=CLASSES,
        pixels=PixelSettings(decode_size=SIZE, input_size=SIZE, view_crop=1.0),
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=HYPER.model_dump(mode="json"),
        search_note={},
        parity_pixels_NHWC=views.judging_NHWC[:8],
    )
    return str(folder)


def quantised_nodes(bundle: str) -> set[str]:
    """Name the nodes of a bundle's int8 network that read integers."""
    nodes = onnx.load(Path(bundle) / "model.int8.onnx").graph.node
    dequantised = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    return {node.name for node in nodes if node.op_type == "Conv" and dequantised.issuperset(node.input[:2])}


def test_a_block_ends_where_all_flows_through_one_tensor(net: Any, views: Views) -> None:
    model, _ = export_onnx(net, views.judging_NHWC[:8])
    quantiser = Quantiser(model, views.calibration_NHWC[:16])
    kinds = [sum("Conv" in name for name in block) for block in quantiser.blocks]
    assert kinds == [1, 2, 1, 2], "of nine convolutions three always stay in floats; a residual unit has two"


def test_layers_that_cost_labels_stay_in_floats(uneven: Any, views: Views, tmp_path: Path) -> None:
    bundle = packed(uneven, tmp_path / "bundle", views)
    found = add_int8(bundle, views).certificates["int8"]
    search = found.float_search
    assert search is not None
    assert (found.holds, found.reason, search.ended) == (True, "", "the certificate holds")
    assert search.steps[0].blocks_in_float == 0
    assert search.steps[0].agreement < 0.95 <= search.steps[-1].agreement == found.agreement
    assert 0 < search.steps[-1].blocks_in_float < search.blocks == len(search.tried) == 4
    worst = max(search.tried, key=lambda name: search.tried[name])
    assert worst in search.in_float
    integers = quantised_nodes(bundle)
    assert integers and not integers & set(search.in_float)
    assert open_bundle(bundle).certificates["int8"] == found
    assert Scorer(bundle, runtime="int8").runtime == "int8"


def test_what_holds_in_integers_is_not_searched(net: Any, views: Views, tmp_path: Path) -> None:
    found = add_int8(packed(net, tmp_path / "bundle", views), views).certificates["int8"]
    assert (found.holds, found.float_search) == (True, None)
