"""Speed end to end: measured on real images, once a network, and never written into trials.parquet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

from carray.core.errors import DataError
from carray.core.store.files import read_json, write_json
from carray.manifest.prepare import prepare
from carray.search import run_folder
from carray.search.throughput import measure_throughput, trial_speeds
from carray.testing.drawing import draw_dataset

FAMILIES: dict[str, Any] = {
    "cnn": {
        "default": {"input_size": 32, "stages": 2, "width": 8},
        "space": {"width": [8, 16], "learning_rate": {"log_uniform": [1e-4, 1e-2]}},
    }
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=4)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return folder


@pytest.fixture
def run(drawn: Path, tmp_path: Path) -> str:
    pixels = {"decode_size": 40, "input_size": 32}
    manifest = str(drawn / "manifest.parquet")
    return write_run(tmp_path / "run", trials=6, epochs=2, manifest=manifest, families=FAMILIES, pixels=pixels)


def test_each_network_is_measured_once_and_the_table_stays_as_it_was(run: str) -> None:
    before = Path(run, "trials.parquet").read_bytes()
    speeds = measure_throughput(run, images=8, seconds=0.1)
    found = read_json(f"{run}/throughput.json")
    trials = run_folder.read_trials(run)
    assert set(speeds) == set(trials["trial_id"])
    assert all(speed > 0 for speed in speeds.values())
    assert len(found["networks"]) == 2  # of six trials: the learning rate does not count
    assert {network["runtime"] for network in found["networks"].values()} == {"onnxruntime fp32"}
    assert Path(run, "trials.parquet").read_bytes() == before


def test_what_was_measured_on_this_machine_is_kept_and_on_another_is_not(run: str) -> None:
    measure_throughput(run, images=4, seconds=0.05)
    uri = f"{run}/throughput.json"
    found = read_json(uri)
    for network in found["networks"].values():
        network["images_per_second"] = 1e9
    write_json(uri, found)
    assert set(measure_throughput(run, images=4, seconds=0.05).values()) == {1e9}
    write_json(uri, {**found, "machine": "another"})
    assert 1e9 not in measure_throughput(run, images=4, seconds=0.05).values()


def test_a_transfer_network_is_exported_and_mirror_averaging_is_another_network(drawn: Path, tmp_path: Path) -> None:
    default = {"backbone": "mobilenetv3_small_050", "weights": "none", "input_size": 32}
    families = {"transfer": {"default": default, "space": {"flip_average": [True]}}}
    manifest = str(drawn / "manifest.parquet")
    run = write_run(tmp_path / "run", trials=2, epochs=1, manifest=manifest, families=families)
    measure_throughput(run, images=4, seconds=0.05)
    networks = read_json(f"{run}/throughput.json")["networks"]
    assert sorted(networks) == [
        "transfer, backbone mobilenetv3_small_050, at 32 pixels",
        "transfer, backbone mobilenetv3_small_050, at 32 pixels, and mirrored",
    ]
    assert {network["runtime"] for network in networks.values()} == {"onnxruntime fp32"}


def test_images_that_are_gone_are_a_sentence(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(drawn / "images", folder / "images")
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    run = write_run(tmp_path / "run", trials=2, manifest=str(folder / "manifest.parquet"), families=FAMILIES)
    shutil.rmtree(folder / "images")
    with pytest.raises(DataError, match=r"none of \d+ validation images of .* can be read, the first is"):
        measure_throughput(run, images=4)


def test_without_a_measurement_no_trial_has_a_speed(run: str) -> None:
    assert trial_speeds(run, run_folder.read_trials(run)) == {}
