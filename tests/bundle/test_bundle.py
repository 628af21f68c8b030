"""The bundle: every byte checked, no finished look without its marker, and the same model after packing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import carray
from carray.bundle.bundle_folder import Acceptance, open_bundle, read_bundle_file, write_info
from carray.bundle.pack import generate_probes, pack_bundle
from carray.bundle.scorer import Scorer, prediction_text, resolve_runtime, score_columns
from carray.bundle.threshold import fit_temperature, label_losses
from carray.core.errors import BundleError, SettingsError
from carray.images.pixels import decode, view

FILES = ["weights.safetensors", "model.onnx", "probes.safetensors"]


@pytest.fixture
def copy(small_bundle: str, tmp_path: Path) -> Path:
    """Give a copy of the small bundle that a test may spoil."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def edit(bundle: Path, **changes: object) -> None:
    place = bundle / "bundle.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has sha256 .* was packed"):
        read_bundle_file(str(copy), open_bundle(str(copy)), name)
    if name != "weights.safetensors":  # scoring has no use for these
        with pytest.raises(BundleError):
            Scorer(str(copy))


def test_a_bundle_of_before_there_were_thresholds_opens(copy: Path) -> None:
    values = json.loads((copy / "bundle.json").read_text())
    del values["acceptance"], values["accept_threshold"]
    (copy / "bundle.json").write_text(json.dumps(values))
    info = open_bundle(str(copy))
    assert info.acceptance is None and info.accept_threshold is None


def test_the_threshold_is_no_part_of_the_id_and_is_written_in_one_step(copy: Path) -> None:
    info = open_bundle(str(copy))
    found = Acceptance(target_precision=0.9, confidence=0.95, split="val", images=100, accepted=80, coverage=0.8)
    write_info(str(copy), info.model_copy(update={"accept_threshold": 0.7, "acceptance": found}))
    again = open_bundle(str(copy))
    assert (again.bundle_id, again.accept_threshold, again.acceptance) == (info.bundle_id, 0.7, found)
    assert Scorer(str(copy)).info == again


def test_without_its_marker_it_is_not_finished(copy: Path) -> None:
    (copy / "bundle.json").unlink()
    with pytest.raises(BundleError, match="holds no bundle.json"):
        Scorer(str(copy))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 99}, "is of version 99, but this carray reads version 1"),
        ({"temperature": 2.5}, "but its content hashes to"),
        ({"classes": ["a", "b", "c", "d", "e"]}, "but its content hashes to"),
        ({"pixels": {"decode_size": 48, "input_size": 32}}, "but its content hashes to"),
        ({"temperature": 0}, "is damaged: temperature"),
        ({"surprise": 1}, "is damaged: surprise"),
    ],
)
def test_a_changed_description_is_refused(copy: Path, changes: dict[str, object], sentence: str) -> None:
    edit(copy, **changes)
    with pytest.raises(BundleError, match=sentence):
        open_bundle(str(copy))


def test_description_that_is_no_object_is_refused(copy: Path) -> None:
    (copy / "bundle.json").write_text("[1]")
    with pytest.raises(BundleError, match="version None"):
        open_bundle(str(copy))


def test_metrics_do_not_change_the_id(copy: Path) -> None:
    before = open_bundle(str(copy)).bundle_id
    edit(copy, metrics={"test": {"top1": 1.0}})
    assert open_bundle(str(copy)).bundle_id == before


def test_a_machine_that_computes_other_logits_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, pixels: (score(self, pixels)[0] + 0.1, score(self, pixels)[1]))
    with pytest.raises(BundleError, match="differ by 0.1 from the packed ones"):
        Scorer(str(copy))


def test_export_that_is_another_model_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from carray.images.pixels import PixelSettings
    from carray.search.train import export
    from carray.search.train.hyperparameters import CnnHyper
    from carray.search.train.nets import build_net

    hyper = CnnHyper(input_size=16, stages=1, width=4)
    other, _ = export.export_onnx(build_net(hyper, class_count=2).eval(), generate_probes(16), fast=True)
    monkeypatch.setattr(export, "_export", lambda net, size, *, older: other)
    torch.manual_seed(1)
    with pytest.raises(BundleError, match="logits differ from torch's by"):
        pack_bundle(
            build_net(hyper, class_count=2),
            str(tmp_path / "bundle"),
            classes=["a", "b"],
            pixels=PixelSettings(decode_size=16, input_size=16),
            uses_boxes=False,
            temperature=1.0,
            metrics={},
            net_note={},
            search_note={},
            parity_pixels_NHWC=generate_probes(16),
        )
    assert not (tmp_path / "bundle").exists()


def test_any_batch_size_gives_the_same_logits(small_bundle: str) -> None:
    scorer = Scorer(small_bundle)
    probes_NHWC = generate_probes(scorer.info.pixels.input_size)
    whole_NK, embedding_ND = scorer.score(probes_NHWC)
    single_NK = np.concatenate([scorer.score(probes_NHWC[i : i + 1])[0] for i in range(len(probes_NHWC))])
    assert np.allclose(whole_NK, single_NK, atol=1e-5)
    assert embedding_ND.shape == (len(probes_NHWC), scorer.info.embedding_size)


def test_onnx_is_one_file_whose_input_is_uint8_nhwc(small_bundle: str) -> None:
    import onnx

    graph = onnx.load(Path(small_bundle, "model.onnx"), load_external_data=False).graph
    shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape[1:] == [40, 40, 3]
    assert isinstance(shape[0], str)
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in graph.initializer)
    assert sorted(path.name for path in Path(small_bundle).iterdir()) == sorted([*FILES, "bundle.json"])


def test_predict_is_decode_view_score(small_bundle: str, image_folder: Path) -> None:
    classifier = carray.Classifier.load(small_bundle)
    path = image_folder / "b" / "00.jpg"
    row = classifier.predict([path, image_folder / "absent.jpg"]).iloc[0]
    pixels_HWC = view(decode(path.read_bytes(), classifier.info.pixels).pixels_HWC, classifier.info.pixels)
    expected = score_columns(Scorer(small_bundle).score(pixels_HWC[None])[0], classifier.info)
    assert row["label"] == expected["label"][0]
    assert row["score"] == pytest.approx(expected["score"][0])
    assert row["top5_labels"] == expected["top5_labels"][0]


def test_unreadable_images_are_rows_with_reasons(small_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    rows = carray.Classifier.load(small_bundle).predict([tmp_path / "empty.jpg", tmp_path / "absent.jpg"])
    assert list(rows["status"]) == ["decode_error", "fetch_error"]
    assert list(rows["error_code"]) == ["empty", "not_found"]
    assert rows["label"].isna().all()
    assert rows["accept"].isna().all()


def test_printed_names_cannot_command_the_terminal(small_bundle: str, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2J\nname.jpg"
    path.touch()
    text = prediction_text(carray.Classifier.load(small_bundle).predict([path]))
    assert "\x1b" not in text
    assert "\\x1b[2J\\nname.jpg" in text


def test_scores_are_calibrated_probabilities(small_bundle: str) -> None:
    info = open_bundle(small_bundle)
    columns = score_columns(np.array([[3.0, 0.0, 0.0, 0.0, 1.5]], dtype=np.float32), info)
    scaled = np.exp(np.array([3.0, 0.0, 0.0, 0.0, 1.5]) / info.temperature)
    assert columns["score"][0] == pytest.approx(scaled[0] / scaled.sum())
    assert columns["margin"][0] == pytest.approx((scaled[0] - scaled[4]) / scaled.sum())
    assert columns["label"][0] == info.classes[0]
    assert columns["top5_labels"][0][1] == info.classes[4]
    assert sum(columns["top5_scores"][0]) == pytest.approx(1.0)


def test_uniform_logits_have_the_largest_entropy(small_bundle: str) -> None:
    columns = score_columns(np.zeros((1, 5), dtype=np.float32), open_bundle(small_bundle))
    assert columns["entropy"][0] == pytest.approx(np.log(5))
    assert columns["margin"][0] == pytest.approx(0.0)


def test_temperature_cools_an_overconfident_model() -> None:
    random = np.random.default_rng(0)
    labels_N = random.integers(0, 4, 400)
    logits_NK = random.normal(0, 1, (400, 4)).astype(np.float32)
    logits_NK[np.arange(400), labels_N] += 1.0
    temperature = fit_temperature(logits_NK * 10, labels_N)
    assert temperature == pytest.approx(10 * fit_temperature(logits_NK, labels_N), rel=0.01)
    best = label_losses(logits_NK * 10, labels_N, temperature=temperature).mean()
    for other in (temperature * 0.8, temperature * 1.25):
        assert best < label_losses(logits_NK * 10, labels_N, temperature=other).mean()


def test_unknown_runtime_is_a_sentence(small_bundle: str) -> None:
    with pytest.raises(SettingsError, match="runtime is 'int4'; this bundle has auto, fp32"):
        resolve_runtime("int4", open_bundle(small_bundle))


def test_scoring_imports_no_torch(small_bundle: str, image_folder: Path) -> None:
    code = (
        "import sys, carray; carray.Classifier.load(sys.argv[1]).predict([sys.argv[2]]);"
        "print([name for name in ('torch', 'timm', 'torchvision', 'ray') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, small_bundle, str(image_folder / "b" / "00.jpg")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(carray.__file__).parents[1])
    assert done.stdout.strip() == "[]"
