"""int8 with layers in floats: which blocks a network has, and what the search does where plain int8 loses too much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from carray.bundle import quantise
from carray.bundle.bundle_folder import open_bundle
from carray.bundle.certificates import Views, add_int8
from carray.bundle.pack import pack_bundle
from carray.bundle.quantise import Quantiser, order_by_worth
from carray.bundle.runtimes import OnnxRuntime
from carray.bundle.scorer import Scorer
from carray.images.pixels import PixelSettings
from carray.search.train.export import export_onnx
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
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
    """Make a channel between two convolutions ten thousand times larger, and the second's weights as much smaller.

    The function stays the same, but one range for all channels then leaves the others a few of the 256 steps.
    """
    import torch

    changed = copy.deepcopy(net)
    body = [module for module in changed.trunk if hasattr(module, "body")][-1].body
    with torch.no_grad():
        body[1].weight[0] *= 10_000
        body[1].bias[0] *= 10_000
        body[3].weight[:, 0] /= 10_000
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
    layers = [len(block) for block in quantiser.blocks]
    assert layers == [1, 2, 1, 2], "of nine convolutions three always stay in floats; a residual unit has two"


def test_layers_that_cost_labels_stay_in_floats(uneven: Any, views: Views, tmp_path: Path) -> None:
    bundle = packed(uneven, tmp_path / "bundle", views)
    found = add_int8(bundle, views).certificates["int8"]
    search = found.float_search
    assert search is not None
    assert (found.holds, found.reason, search.ended) == (True, "", "the certificate holds")
    assert search.steps[0].blocks_in_float == 0
    assert search.steps[0].agreement < search.steps[-1].agreement == found.agreement
    assert search.steps[0].rms > 3 * search.steps[-1].rms
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


def test_what_stays_slow_is_left_out_and_says_what_was_tried(
    uneven: Any, views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "LEAST_SPEEDUP", 1e9)
    bundle = packed(uneven, tmp_path / "bundle", views)
    found = add_int8(bundle, views).certificates["int8"]
    assert not found.holds and found.float_search is not None
    assert found.reason.endswith("; int8 is less than 1000000000.0 times as fast as fp32 here")
    assert (found.float_search.in_float, len(found.float_search.steps)) == ([], 1)
    assert not (tmp_path / "bundle" / "model.int8.onnx").exists()


def test_a_search_ends_when_its_time_is_up(
    uneven: Any, views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "SEARCH_SECONDS", 0.0)
    found = add_int8(packed(uneven, tmp_path / "bundle", views), views).certificates["int8"]
    assert not found.holds
    assert found.reason.endswith("; the search's time, 0 s of a core, was up")


def test_outputs_have_the_mean_of_fp32(uneven: Any, views: Views) -> None:
    model, _ = export_onnx(uneven, views.judging_NHWC[:8])
    quantised = Quantiser(model, views.calibration_NHWC).quantise()
    fp32, int8 = (OnnxRuntime(data).score(views.calibration_NHWC) for data in (model, quantised))
    for wanted, found in zip(fp32, int8, strict=True):
        assert np.abs(wanted - found).max() > 0.1 * wanted.std()
        assert np.abs(wanted.mean(axis=0) - found.mean(axis=0)).max() < 1e-3 * np.abs(wanted).max()


def test_neighbours_in_floats_cost_less() -> None:
    alone, beside_floats = 3.0, 1.0
    assert order_by_worth([beside_floats, 0, 0, alone, 0, 0], [1] * 6)[:2] == [0, 3]
    assert order_by_worth([0, beside_floats, 0, alone, 0, 0], [1] * 6)[0] == 3
    assert order_by_worth([1.0, 1.0, 1.0], [3, 1, 2]) == [2, 1, 0], "the head's side first, since it has fewer layers"


def test_a_transformer_multiplies_activations_in_floats() -> None:
    import torch

    torch.manual_seed(0)
    hyper = TransferHyper(backbone="test_vit", weights="none", input_size=SIZE)
    pixels_NHWC, _ = coloured(16, 4)
    model, _ = export_onnx(build_net(hyper, class_count=4).eval(), pixels_NHWC, fast=True)
    quantiser = Quantiser(model, pixels_NHWC)
    graph = onnx.load_model_from_string(quantiser.quantise()).graph
    dequantised = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    readers = {node.op_type for node in graph.node if dequantised.intersection(node.input)}
    assert readers == {"MatMul"} | (readers & {"Add", "Gemm", "QuantizeLinear"})
    assert "Softmax" not in readers
    between = [node for node in graph.node if node.op_type == "MatMul" and not dequantised.intersection(node.input)]
    assert len(between) >= 2, "the products of activations"
    assert len(quantiser.blocks) > 4
