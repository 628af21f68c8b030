"""Faster runtimes: what a certificate holds them to, what auto takes, and what a machine that differs is told."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carray.bundle import quantise, runtimes
from carray.bundle.bundle_folder import TRAINED_ON, BundleInfo, open_bundle, write_bundle, write_info
from carray.bundle.certificates import Views, add_int8, certify_bf16, compare_logits, quantise_bundle
from carray.bundle.pack import pack_bundle
from carray.bundle.runtimes import OpenVinoRuntime, bf16_obstacle, certified_rates, measure_rates, uses_gpus
from carray.bundle.scorer import Scorer, measure_runtimes, resolve_runtime
from carray.bundle.trained_on import pack_trained_on
from carray.core.errors import BundleError, DataError, SettingsError
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import MANIFEST_SCHEMA, read_manifest, write_manifest
from carray.search.train.export import export_onnx
from carray.search.train.hyperparameters import CnnHyper
from carray.search.train.nets import build_net

SIZE, CLASSES = 32, ["Acura RL Sedan 2012", "Acura TL Sedan 2012", "Audi A5 Coupe 2012", "unknown"]
PIXELS = PixelSettings(decode_size=SIZE, input_size=SIZE, view_crop=1.0)


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw noisy images of one colour a class: uint8 (count, 32, 32, 3), and the classes."""
    random = np.random.default_rng(seed)
    labels_N = np.arange(count) % len(CLASSES)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [150, 150, 150]])
    noise = random.normal(0, 40, (count, SIZE, SIZE, 3))
    return (colours[labels_N][:, None, None] + noise).clip(0, 255).astype(np.uint8), labels_N


@pytest.fixture(scope="module")
def net():
    """Train a small CNN for a second, until it tells the colours apart."""
    import torch

    torch.manual_seed(0)
    net = build_net(CnnHyper(input_size=SIZE, stages=3, width=8, dropout=0), class_count=len(CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    pixels_NHWC, labels_N = coloured(512, 1)
    for step in range(40):
        rows = slice(64 * (step % 8), 64 * (step % 8) + 64)
        logits_BK, _ = net(torch.from_numpy(pixels_NHWC[rows]).permute(0, 3, 1, 2).float())
        loss = torch.nn.functional.cross_entropy(logits_BK, torch.from_numpy(labels_N[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def views() -> Views:
    calibration_NHWC, _ = coloured(64, 2)
    judging_NHWC, labels_N = coloured(200, 3)
    return Views(calibration_NHWC, judging_NHWC, labels_N)


@pytest.fixture(scope="module")
def fp32_bundle(net, views: Views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtimes") / "fp32"
    pack_bundle(
        net,
        str(folder),
        classes=CLASSES,
        pixels=PIXELS,
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=CnnHyper(input_size=SIZE, stages=3, width=8, dropout=0).model_dump(mode="json"),
        search_note={},
        parity_pixels_NHWC=views.judging_NHWC[:8],
    )
    return folder


@pytest.fixture(scope="module")
def int8_bundle(fp32_bundle: Path, views: Views) -> Path:
    folder = Path(shutil.copytree(fp32_bundle, fp32_bundle.parent / "int8"))
    add_int8(str(folder), views)
    return folder


@pytest.fixture
def copy(fp32_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))


def with_certificate(info: BundleInfo, name: str = "int8", **changes: object) -> BundleInfo:
    base = info.certificates["int8"]
    return info.model_copy(update={"certificates": {**info.certificates, name: base.model_copy(update=dict(changes))}})


def test_int8_is_the_same_model_in_other_numbers(int8_bundle: Path, fp32_bundle: Path, views: Views) -> None:
    info = open_bundle(str(int8_bundle))
    found = info.certificates["int8"]
    assert (found.holds, found.reason, found.images, found.calibration_images) == (True, "", 200, 64)
    assert found.agreement is not None and found.agreement >= 0.95
    assert found.confident_images > 100
    assert info.bundle_id == open_bundle(str(fp32_bundle)).bundle_id
    assert set(found.images_per_second) == {"fp32", "int8"}
    assert all(rate > 0 for rates in found.images_per_second.values() for rate in rates.values())
    fp32, int8 = (Scorer(str(int8_bundle), runtime=name) for name in ("fp32", "int8"))
    fp32_NK, fp32_ND = fp32.score(views.judging_NHWC)
    int8_NK, int8_ND = int8.score(views.judging_NHWC)
    assert 0 < np.abs(int8_NK - fp32_NK).max() < 0.3 * fp32_NK.std()
    assert int8_ND.shape == fp32_ND.shape
    assert np.corrcoef(int8_ND.ravel(), fp32_ND.ravel())[0, 1] > 0.99
    import onnx

    kinds = {node.op_type for node in onnx.load(int8_bundle / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_auto_takes_the_fastest_that_holds(int8_bundle: Path) -> None:
    info = open_bundle(str(int8_bundle))
    fast = {"fp32": {8: 100.0, 32: 110.0}, "int8": {8: 300.0, 32: 200.0}}
    slow = {"fp32": {8: 100.0, 32: 350.0}, "int8": {8: 300.0, 32: 200.0}}
    assert resolve_runtime("auto", with_certificate(info, images_per_second=fast)) == "int8"
    assert resolve_runtime("auto", with_certificate(info, images_per_second=slow)) == "fp32"
    failed = with_certificate(info, images_per_second=fast, holds=False, reason="too coarse")
    assert resolve_runtime("auto", failed) == "fp32"


def test_auto_on_a_gpu_takes_what_has_run_on_one(int8_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_runtime("auto", open_bundle(str(int8_bundle)), device="cuda") == "fp32"
    assert "auto takes fp32 on GPUs; torch-bf16, which was never measured on one" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"device is 'cuda', but this onnxruntime has no CUDA provider; install "):
        Scorer(str(int8_bundle), device="cuda")
    assert [name for name in ("auto", "fp32", "int8", "bf16", "torch-bf16") if uses_gpus(name)] == ["torch-bf16"]


def both_certified(info: BundleInfo, *, int8: float, bf16: float) -> BundleInfo:
    """Certify both, measured on machines of which the second is ten times as fast."""
    info = with_certificate(info, images_per_second={"fp32": {8: 100.0}, "int8": {8: int8}})
    return with_certificate(info, "bf16", images_per_second={"fp32": {8: 1000.0}, "bf16": {8: bf16}})


def test_auto_takes_bf16_where_it_wins_and_this_machine_runs_it(
    int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = both_certified(open_bundle(str(int8_bundle)), int8=150.0, bf16=1800.0)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: object())
    monkeypatch.setattr(runtimes, "_processor_flags", lambda: {"avx512f", "avx512_bf16"})
    assert certified_rates(info) == {"fp32": 100.0, "int8": 150.0, "bf16": 180.0}
    assert resolve_runtime("auto", info) == "bf16"
    assert resolve_runtime("auto", info, here=False) == "int8", "of machines elsewhere nobody knows what they can"
    assert resolve_runtime("auto", both_certified(info, int8=200.0, bf16=1800.0)) == "int8"
    failed = with_certificate(info, "bf16", holds=False, images_per_second={"fp32": {8: 1.0}, "bf16": {8: 9.0}})
    assert resolve_runtime("auto", failed) == "int8"
    monkeypatch.setattr(runtimes, "_processor_flags", lambda: {"avx2"})
    assert resolve_runtime("auto", info) == "int8"
    with pytest.raises(SettingsError, match=r"^runtime bf16 cannot score here: the processor has neither AVX-512 BF16"):
        resolve_runtime("bf16", info)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"openvino is not installed \(pip install 'carray\[openvino\]'\); take auto"
    ):
        resolve_runtime("bf16", info)
    assert resolve_runtime("bf16", info, here=False) == "bf16"
    with pytest.raises(SettingsError, match="openvino is not installed"):
        OpenVinoRuntime((int8_bundle / "model.onnx").read_bytes())


runs_bf16 = pytest.mark.skipif(bool(bf16_obstacle()), reason=f"bf16: {bf16_obstacle()}")


@runs_bf16
def test_openvino_gives_the_same_labels_in_bfloat16(fp32_bundle: Path, views: Views) -> None:
    fp32, bf16 = (Scorer(str(fp32_bundle), runtime=name) for name in ("fp32", "bf16"))
    fp32_NK, fp32_ND = fp32.score(views.judging_NHWC)
    bf16_NK, bf16_ND = bf16.score(views.judging_NHWC)
    assert (fp32_NK.argmax(axis=1) == bf16_NK.argmax(axis=1)).mean() > 0.98
    assert 1e-4 * fp32_NK.std() < np.abs(bf16_NK - fp32_NK).max() < 0.2 * fp32_NK.std(), "other arithmetic, same model"
    assert (bf16_ND.shape, bf16_ND.dtype, bf16_NK.dtype) == (fp32_ND.shape, np.float32, np.float32)
    with ThreadPoolExecutor(4) as pool:  # as a worker with two shards in hand
        parts = list(pool.map(bf16.score, [views.judging_NHWC[i : i + 8] for i in range(0, 80, 8)]))
    np.testing.assert_allclose(np.concatenate([part[0] for part in parts]), bf16_NK[:80], atol=0.05)


@runs_bf16
def test_bf16_is_certified_by_the_rule_of_int8(copy: Path, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    found = certify_bf16(str(copy), views).certificates["bf16"]
    assert (found.holds, found.images, found.before_refit) == (True, 200, False) and found.agreement > 0.98
    assert {name: set(rates) for name, rates in found.images_per_second.items()} == {"fp32": {8, 32}, "bf16": {8, 32}}
    few = Views(views.calibration_NHWC, views.judging_NHWC[:99], views.labels_N[:99])
    assert certify_bf16(str(copy), few).certificates["bf16"] == found, "what cannot judge changes nothing"
    assert open_bundle(str(copy)).certificates["bf16"] == found
    monkeypatch.setattr("carray.bundle.certificates.AGREEMENT", 1.01)
    missed = certify_bf16(str(copy), views).certificates["bf16"]
    assert not missed.holds and "below 101%" in missed.reason


@runs_bf16
def test_bf16_after_a_refit_is_judged_by_the_twin(net, copy: Path, views: Views) -> None:
    import torch

    torch.manual_seed(1)
    untrained = build_net(CnnHyper(input_size=SIZE, stages=3, width=8, dropout=0), class_count=len(CLASSES)).eval()
    twin, _ = export_onnx(untrained, views.judging_NHWC)
    found = certify_bf16(str(copy), views, before_refit=twin).certificates["bf16"]
    assert found.before_refit and found.top1_fp32 < 0.6


def test_bf16_is_not_certified_where_it_cannot_run(copy: Path, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert "bf16" not in certify_bf16(str(copy), views).certificates


@runs_bf16
def test_a_machine_whose_bf16_differs_is_told_to_take_fp32(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carray.bundle.scorer.BF16_TOLERANCE", 1e-9)
    with pytest.raises(BundleError, match=r"with runtime bf16 on this machine; score with --runtime fp32"):
        Scorer(str(copy), runtime="bf16")


QUIET = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("socket.", "urllib.")) else None)
from carray.bundle.runtimes import OpenVinoRuntime
OpenVinoRuntime(open(sys.argv[1], "rb").read())
import openvino
assert not [name for name in sys.modules if "telemetry" in name], sys.modules
assert not seen, seen
import openvino.tools.ovc  # which nothing hides from others
"""


@runs_bf16
def test_openvino_reports_nothing(fp32_bundle: Path, tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path), "CI": "true"}  # for the last import, which reports outside of CI
    done = subprocess.run([sys.executable, "-c", QUIET, fp32_bundle / "model.onnx"], env=home, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "intel").exists()


def test_runtimes_are_measured_in_turn_without_those_that_differ_here(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carray.bundle.scorer.MEASURING_SECONDS", 0.1)
    found = measure_runtimes(str(int8_bundle), ["fp32", "int8", "no such"])
    assert set(found) == {"fp32", "int8"} and min(found.values()) > 0
    monkeypatch.setattr("carray.bundle.scorer.INT8_TOLERANCE", -1.0)
    assert measure_runtimes(str(int8_bundle), ["fp32", "int8"]) == {"fp32": 0.0}


def test_rates_are_those_of_the_fastest_pass() -> None:
    def spin(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    order: list[str] = []

    def score(name: str, seconds: float) -> None:
        order.append(name)
        spin(seconds)

    passes = {"a": partial(score, "a", 0.002), "b": partial(score, "b", 0.02)}
    found = measure_rates(passes, {"a": 1, "b": 1}, seconds=0.0)
    assert order == ["a", "b"] * 3
    assert found["b"] < 51 and found["a"] > found["b"]


def test_batch_is_the_fastest_measured(int8_bundle: Path) -> None:
    place = int8_bundle / "bundle.json"
    values = json.loads(place.read_text())
    values["certificates"]["int8"]["images_per_second"] = {"fp32": {"8": 1, "32": 2}, "int8": {"8": 4, "32": 3}}
    place.write_text(json.dumps(values))
    assert Scorer(str(int8_bundle)).batch_images == 8
    assert Scorer(str(int8_bundle), runtime="fp32").batch_images == 32


def logits(labels_N: np.ndarray, *, sure: bool = True) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[labels_N] * (10 if sure else 1)


@pytest.mark.parametrize(
    ("moved", "sure", "reason"),
    [
        (slice(0, 1), True, ""),  # 1 of 200: 0.5 points, 99.5 %
        (slice(0, 2), True, "top-1 drops 1.00 points, above 0.5"),
        (slice(0, 0), True, ""),
    ],
)
def test_certificate_holds_a_runtime_to_its_drop(moved: slice, sure: bool, reason: str) -> None:
    labels_N = np.arange(200) % 4
    other_N = labels_N.copy()
    other_N[moved] = (other_N[moved] + 1) % 4
    found = compare_logits(logits(labels_N, sure=sure), logits(other_N), labels_N, temperature=1.0)
    assert found["reason"] == reason
    assert found["holds"] is (reason == "")


def test_agreement_counts_where_no_label_is_lost() -> None:
    """Labels that move from one mistake to another drop nothing, but the same image then says something else."""
    labels_N = np.zeros(200, dtype=np.int64)
    wrong_N = np.where(np.arange(200) < 20, 1, 0)
    moved_N = np.where(np.arange(200) < 11, 2, wrong_N)
    found = compare_logits(logits(wrong_N, sure=False), logits(moved_N), labels_N, temperature=1.0)
    assert found["drop_points"] == 0
    assert found["reason"] == "labels agree on 94.5%, below 95%"
    assert found["agreement_confident"] is None
    sure = compare_logits(logits(wrong_N), logits(np.where(np.arange(200) < 3, 2, wrong_N)), labels_N, temperature=1.0)
    assert sure["reason"] == "on 98.5% of the confident ones, below 99%"


def test_int8_that_loses_too_much_is_left_out(
    copy: Path, views: Views, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "LEAST_SPEEDUP", 1e9)  # so that no layers in floats help
    grey = Views(np.full_like(views.calibration_NHWC, 128), views.judging_NHWC, views.labels_N)
    info = add_int8(str(copy), grey)
    assert not info.certificates["int8"].holds
    assert not (copy / "model.int8.onnx").exists()
    assert "int8 left out: top-1 drops" in capsys.readouterr().err
    with pytest.raises(
        SettingsError, match=r"bundle has auto, fp32, bf16, torch-bf16 \(int8 was left out: top-1 drops"
    ):
        resolve_runtime("int8", info)
    kept = add_int8(str(copy), grey, keep=True)
    assert resolve_runtime("auto", kept) == "fp32"
    assert resolve_runtime("int8", kept) == "int8"
    assert "holds no certificate for int8 (top-1 drops" in capsys.readouterr().err
    assert Scorer(str(copy), runtime="int8", warns=False).runtime == "int8"  # as a worker opens it
    assert "holds no certificate" not in capsys.readouterr().err
    assert Scorer(str(copy), runtime="int8").runtime == "int8"


@pytest.mark.parametrize(("calibration", "judging", "reason"), [(64, 99, "99 validation"), (15, 200, "15 training")])
def test_too_few_images_certify_nothing(copy: Path, views: Views, calibration: int, judging: int, reason: str) -> None:
    few = Views(views.calibration_NHWC[:calibration], views.judging_NHWC[:judging], views.labels_N[:judging])
    info = add_int8(str(copy), few)
    assert not info.certificates["int8"].holds
    assert info.certificates["int8"].reason.startswith(f"{reason} images are too few")
    assert info == open_bundle(str(copy))
    assert Scorer(str(copy)).runtime == "fp32"


def test_a_network_that_cannot_be_quantised_has_a_bundle_without_int8(
    copy: Path, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("carray.bundle.certificates.Quantiser", fail)
    certificate = add_int8(str(copy), views).certificates["int8"]
    assert not certificate.holds
    assert certificate.reason == "onnxruntime cannot quantise this network (RuntimeError: no such operator)"
    assert Scorer(str(copy)).runtime == "fp32"


def test_a_machine_whose_int8_differs_is_told_to_take_fp32(int8_bundle: Path, copy: Path, views: Views) -> None:
    """Another calibration stands for another arithmetic: the file is whole, its logits are not those packed."""
    add_int8(str(copy), Views(views.calibration_NHWC // 4, views.judging_NHWC, views.labels_N), keep=True)
    other = (copy / "model.int8.onnx").read_bytes()
    bundle = Path(shutil.copytree(int8_bundle, copy.parent / "other"))
    (bundle / "model.int8.onnx").write_bytes(other)
    values = json.loads((bundle / "bundle.json").read_text())
    values["files"]["model.int8.onnx"]["sha256"] = hashlib.sha256(other).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"with runtime int8 on this machine; score with --runtime fp32"):
        Scorer(str(bundle), runtime="int8")
    assert Scorer(str(bundle), runtime="fp32").runtime == "fp32"


def test_bundles_of_before_there_were_certificates_open(copy: Path) -> None:
    values = json.loads((copy / "bundle.json").read_text())
    del values["certificates"], values["accept_threshold"]
    (copy / "bundle.json").write_text(json.dumps(values))
    assert Scorer(str(copy)).runtime == "fp32"
    with pytest.raises(SettingsError, match="carray quantize adds int8"):
        Scorer(str(copy), runtime="int8")


def test_torch_gives_the_same_labels_in_bfloat16(fp32_bundle: Path, views: Views) -> None:
    fp32, bf16 = (Scorer(str(fp32_bundle), runtime=name) for name in ("fp32", "torch-bf16"))
    fp32_NK, fp32_ND = fp32.score(views.judging_NHWC)
    bf16_NK, bf16_ND = bf16.score(views.judging_NHWC)  # more images than one batch
    assert (fp32_NK.argmax(axis=1) == bf16_NK.argmax(axis=1)).mean() > 0.98
    assert 0 < np.abs(bf16_NK - fp32_NK).max() < 0.2 * fp32_NK.std()
    assert bf16_ND.shape == fp32_ND.shape
    assert bf16_ND.dtype == bf16_NK.dtype == np.float32


def jpeg(pixels_HWC: np.ndarray, *, side: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).resize((side, side)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Write a manifest of 40 training and 120 validation images, 128 pixels wide."""
    pixels_NHWC, labels_N = coloured(160, 5)
    rows = []
    for i, (pixels_HWC, label) in enumerate(zip(pixels_NHWC, labels_N, strict=True)):
        data = jpeg(pixels_HWC, side=128)
        (tmp_path / f"{i}.jpg").write_bytes(data)
        rows.append(
            {
                "uri": str(tmp_path / f"{i}.jpg"),
                "escaped": False,
                "label": CLASSES[label],
                "split": "train" if i < 40 else "val",
                "status": "ok",
                "width": 128,
                "height": 128,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    uri = tmp_path / "manifest.parquet"
    write_manifest(
        pd.DataFrame(rows).reindex(columns=MANIFEST_SCHEMA.names), str(uri), classes=CLASSES, crop_boxes=False
    )
    return uri


def test_an_older_bundle_is_quantised_with_its_manifest(copy: Path, manifest: Path) -> None:
    info = quantise_bundle(str(copy), str(manifest))
    assert (info.certificates["int8"].images, info.certificates["int8"].calibration_images) == (120, 40)
    assert info.certificates["int8"].holds
    assert Scorer(str(copy), runtime="int8").info == info


def hashes(manifest: Path, start: int, stop: int) -> list[str]:
    return list(read_manifest(str(manifest)).rows["sha256"].iloc[start:stop])


def move_rows_to_test(manifest: Path, start: int) -> None:
    table = read_manifest(str(manifest))
    rows = table.rows.assign(split=[*table.rows["split"].iloc[:start], *["test"] * (len(table.rows) - start)])
    write_manifest(rows, str(manifest), classes=CLASSES, crop_boxes=False)


def test_the_order_of_a_manifest_s_rows_changes_no_certificate(copy: Path, manifest: Path, tmp_path: Path) -> None:
    table, uri = read_manifest(str(manifest)), str(tmp_path / "shuffled.parquet")
    write_manifest(table.rows.sample(frac=1, random_state=1), uri, classes=CLASSES, crop_boxes=False)
    first, second = (quantise_bundle(str(copy), place).certificates["int8"] for place in (str(manifest), uri))
    assert first.model_copy(update={"images_per_second": {}}) == second.model_copy(update={"images_per_second": {}})


def test_images_that_the_network_was_trained_on_do_not_judge(copy: Path, manifest: Path) -> None:
    write_bundle(str(copy), open_bundle(str(copy)), {TRAINED_ON: pack_trained_on(hashes(manifest, 0, 50))})
    found = quantise_bundle(str(copy), str(manifest)).certificates["int8"]
    assert (found.holds, found.images, found.images_left_out) == (True, 110, 10)


def test_where_no_image_is_left_to_judge_auto_takes_fp32_and_says_so(
    copy: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_rows_to_test(manifest, 60)
    write_bundle(str(copy), open_bundle(str(copy)), {TRAINED_ON: pack_trained_on(hashes(manifest, 0, 60))})
    info = quantise_bundle(str(copy), str(manifest), keep=True)
    assert not info.certificates["int8"].holds and info.certificates["int8"].images_left_out == 20
    capsys.readouterr()
    assert resolve_runtime("auto", info) == "fp32"
    assert "auto takes fp32, since the int8 certificate" in (words := capsys.readouterr().err)
    assert "the network was trained on 20 others" in words
    found = quantise_bundle(str(copy), str(manifest), split="test").certificates["int8"]
    assert (found.holds, found.split, found.images, found.images_left_out) == (True, "test", 100, 0)


@pytest.mark.parametrize(("refit", "holds"), [(False, True), (True, False)])
def test_an_older_bundle_knows_its_own_manifest_by_its_splits(
    copy: Path, manifest: Path, refit: bool, holds: bool
) -> None:
    note = {"manifest_fingerprint": read_manifest(str(manifest)).fingerprint, "refit": refit}
    write_info(str(copy), open_bundle(str(copy)).model_copy(update={"search": note}))
    assert quantise_bundle(str(copy), str(manifest)).certificates["int8"].holds == holds
    move_rows_to_test(manifest, 159)  # another manifest, of which it knows nothing
    found = quantise_bundle(str(copy), str(manifest)).certificates["int8"]
    assert not found.holds and "does not say which images it was trained on" in found.reason


def test_a_certificate_on_images_that_were_trained_on_is_void(
    int8_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an earlier version wrote it after a refit."""
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "older"))
    values = json.loads((bundle / "bundle.json").read_text())
    values["certificates"]["int8"] |= {"holds": True, "images_seen_in_training": True}
    values["certificates"]["int8"]["images_per_second"] = {"fp32": {"8": 1.0}, "int8": {"8": 9.0}}
    (bundle / "bundle.json").write_text(json.dumps(values))
    assert Scorer(str(bundle)).runtime == "fp32"
    assert "judged by images that the network was trained on" in capsys.readouterr().err


def test_a_refit_is_judged_by_its_twin_and_quantised_again_keeps_that(
    net, copy: Path, views: Views, manifest: Path
) -> None:
    """The twin is a network that knows nothing, so its figures cannot be those of the bundle's own."""
    import torch

    torch.manual_seed(1)
    untrained = build_net(CnnHyper(input_size=SIZE, stages=3, width=8, dropout=0), class_count=len(CLASSES)).eval()
    own = add_int8(str(copy), views).certificates["int8"]
    twin, _ = export_onnx(untrained, views.judging_NHWC)
    found = add_int8(str(copy), views, keep=True, before_refit=twin).certificates["int8"]
    assert found.before_refit and found.top1_fp32 < 0.6 < own.top1_fp32
    note = {"manifest_fingerprint": read_manifest(str(manifest)).fingerprint, "refit": True}
    write_info(str(copy), open_bundle(str(copy)).model_copy(update={"search": note}))
    assert quantise_bundle(str(copy), str(manifest), keep=True).certificates["int8"] == found


def test_images_that_changed_are_not_measured_on(copy: Path, manifest: Path) -> None:
    (manifest.parent / "3.jpg").write_bytes(jpeg(np.zeros((SIZE, SIZE, 3), dtype=np.uint8)))
    with pytest.raises(DataError, match="changed since the manifest was prepared"):
        quantise_bundle(str(copy), str(manifest))
