"""A bundle, a checkpoint and a weights file are data: nothing in them is executed, whoever made them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from carray.bundle.bundle_folder import MODEL, WEIGHTS, bundle_id_of, open_bundle
from carray.bundle.runtimes import OpenVinoRuntime, bf16_obstacle, check_graph
from carray.bundle.scorer import Scorer
from carray.core.errors import BundleError, SettingsError
from carray.images.pixels import PixelSettings


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.place}'",)


@pytest.fixture
def bundle(small_bundle: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def replace(bundle: Path, name: str, data: bytes) -> None:
    """Put other bytes into a bundle as its maker could, with all hashes right."""
    (bundle / name).write_bytes(data)
    values = json.loads((bundle / "bundle.json").read_text())
    values["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    values["bundle_id"] = bundle_id_of(
        values["files"][WEIGHTS]["sha256"],
        classes=values["classes"],
        pixels=PixelSettings(**values["pixels"]),
        temperature=values["temperature"],
    )
    (bundle / "bundle.json").write_text(json.dumps(values))
    open_bundle(str(bundle))


def test_a_pickle_in_a_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    trap = pickle.dumps({"weights": Trap(tmp_path / "sprung")})
    for name, runtime in ((WEIGHTS, "torch-bf16"), (MODEL, "fp32"), ("probes.safetensors", "fp32")):
        spoiled = Path(shutil.copytree(bundle, tmp_path / name))
        replace(spoiled, name, trap)
        with pytest.raises(BundleError, match="^.*\\.$"):
            Scorer(str(spoiled), runtime=runtime)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # so it would have sprung


def test_a_pickle_as_checkpoint_is_refused(tmp_path: Path) -> None:
    import io

    import torch

    from carray.search.train.checkpoint import unpack

    buffer = io.BytesIO()
    torch.save({"net": Trap(tmp_path / "sprung")}, buffer)
    for trap in (pickle.dumps(Trap(tmp_path / "sprung")), buffer.getvalue()):
        with pytest.raises(SettingsError, match="cut short or damaged"):
            unpack(trap, {})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "tf_efficientnet_lite0.safetensors"])
def test_a_pickle_as_weights_file_is_refused(tmp_path: Path, name: str) -> None:
    import torch

    from carray.search.train.weights import build_trunk

    torch.save({"conv_stem.weight": Trap(tmp_path / "sprung")}, tmp_path / name)
    given = tmp_path if name.startswith("tf_") else tmp_path / name
    with pytest.raises(SettingsError, match="is not a safetensors file|where no .* lies"):
        build_trunk("tf_efficientnet_lite0", str(given))
    assert not (tmp_path / "sprung").exists()


def reading_model(place: str) -> bytes:
    """Make a model whose logits are the bytes of a file."""
    from onnx import TensorProto, helper

    stolen = helper.make_tensor("stolen", TensorProto.UINT8, [7], b"hunter2", raw=True)
    stolen.ClearField("raw_data")
    stolen.data_location = TensorProto.EXTERNAL
    stolen.external_data.add(key="location", value=place)
    nodes = [helper.make_node("Cast", [name], [to], to=TensorProto.FLOAT) for name, to in READ]
    shape = ["batch", 4, 4, 3]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [7])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "reading", [pixels], [logits, embedding], [stolen])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


READ = [("stolen", "logits"), ("pixels", "embedding")]


def test_a_model_cannot_read_a_file_of_the_machine(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    (tmp_path / "secret").write_bytes(b"hunter2")
    monkeypatch.chdir(tmp_path)
    model = reading_model("secret")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits, _ = session.run(["logits", "embedding"], {"pixels": np.zeros((1, 4, 4, 3), np.uint8)})
    assert bytes(logits.astype(np.uint8)) == b"hunter2"  # onnxruntime alone does; should it stop, so may the check
    replace(bundle, MODEL, model)
    for runtime in ["fp32", *([] if bf16_obstacle() else ["bf16"])]:
        with pytest.raises(BundleError, match="keeps its tensor 'stolen' in another file"):
            Scorer(str(bundle), runtime=runtime)


@pytest.mark.skipif(bool(bf16_obstacle()), reason=f"bf16: {bf16_obstacle()}")
def test_openvino_reads_the_model_as_onnx_and_as_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to guess, OpenVINO reads its own XML and other formats, which the check of ONNX has not looked at."""
    other = b'<?xml version="1.0"?><net name="x" version="11"><layers></layers><edges></edges></net>'
    with pytest.raises(BundleError, match="the model is not ONNX"):
        OpenVinoRuntime(other)
    monkeypatch.setattr("carray.bundle.runtimes.check_graph", lambda model: None)
    with pytest.raises(BundleError, match="OpenVINO refuses the model"):
        OpenVinoRuntime(other)


def test_a_tensor_elsewhere_is_found_however_deep_it_lies() -> None:
    import onnx
    from onnx import TensorProto, helper

    def outside() -> onnx.TensorProto:
        tensor = TensorProto(name="deep", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        return tensor

    constant = helper.make_node("Constant", [], ["c"], value=outside())
    inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", 1, [1])])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    x, y = helper.make_tensor_value_info("x", TensorProto.BOOL, []), helper.make_tensor_value_info("y", 1, [1])
    deep = helper.make_model(helper.make_graph([branch], "g", [x], [y]))
    function = helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)])
    called = helper.make_model(helper.make_graph([], "g", [x], [y]), functions=[function])
    sparse = helper.make_model(helper.make_graph([], "g", [x], [y]))
    sparse.graph.sparse_initializer.add().values.CopyFrom(outside())
    for model in (deep, called, sparse):
        with pytest.raises(BundleError, match="'deep' in another file"):
            check_graph(model.SerializeToString())
    engine = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/engine")
    with pytest.raises(BundleError, match="EPContext"):
        check_graph(helper.make_model(helper.make_graph([engine], "g", [x], [y])).SerializeToString())


@pytest.mark.parametrize("backbone", ["hf-hub:stranger/model", "local-dir:/tmp/model", "../model"])
def test_a_bundle_cannot_fetch_a_network_from_elsewhere(bundle: Path, backbone: str) -> None:
    values = json.loads((bundle / "bundle.json").read_text())
    values["net"] = {"family": "transfer", "backbone": backbone}
    (bundle / "bundle.json").write_text(json.dumps(values))
    with pytest.raises((BundleError, SettingsError), match="which timm does not know"):
        Scorer(str(bundle), runtime="torch-bf16")
