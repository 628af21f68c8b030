"""The benchmark of many machines: its simulation behaves as documented, and shards fit the machines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pandas as pd
import pytest

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import SHARES_A_WORKER, WORKERS_AN_IMAGE, shard_images
from jobs.bench.scale.books import made_up_log
from jobs.bench.scale.simulation import Constants, cut, simulate

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = float("inf")
ONLY_CORES = replace(
    Constants(), listed_per_second=ENDLESS, handed_out_per_second=ENDLESS, gets_per_second=ENDLESS, shard_seconds=0.0
)


@pytest.mark.parametrize("workers", [1, 2, 30, 160, 1_600, 16_000])
@pytest.mark.parametrize("images", [1, 10_000, 1_000_000])
def test_every_image_is_in_one_shard_whoever_scores(workers: int, images: int) -> None:
    sizes, few = cut(images, workers), cut(images, 1)
    assert sum(sizes) == images
    assert min(sizes) > 0
    assert len(few) <= len(sizes), "more workers never get larger shards"
    if workers <= 30:
        assert sizes == few, "a small cluster's shards are what they always were"
    settings = ClassifySettings()
    for listed in accumulate(sizes[:-1]):
        size = shard_images(listed, settings, workers)
        assert size <= shard_images(listed, settings)
        assert size <= max(64, workers // WORKERS_AN_IMAGE, listed / (SHARES_A_WORKER * workers))


def test_one_worker_takes_as_long_as_its_images() -> None:
    found = simulate(7_000, 1, constants=ONLY_CORES, seed=1)
    assert found["seconds"] == pytest.approx(5 + 7_000 / 70, abs=0.1)
    assert found["limit"] == "cores"


@pytest.mark.parametrize("prefixes", [1, 1_000])
@pytest.mark.parametrize("workers", [16, 160, 400])
def test_no_job_beats_what_limits_it_and_more_workers_do_not_slow_it_down(workers: int, prefixes: int) -> None:
    now, more = (simulate(2_000_000, w, constants=Constants(), prefixes=prefixes) for w in (workers, 4 * workers))
    assert now["seconds"] >= now["limit_seconds"]
    assert more["seconds"] <= 1.15 * now["seconds"]
    assert 0 <= now["idle_fraction"] < 1


def test_what_limits_is_named() -> None:
    def limit(**values: float) -> str:
        return str(simulate(1_000_000, 160, constants=replace(ONLY_CORES, **values))["limit"])

    assert limit() == "cores"
    assert limit(listed_per_second=1_000.0) == "listing"
    assert limit(handed_out_per_second=1.0) == "driver"
    assert limit(gets_per_second=100.0) == "requests"


def test_shards_cut_for_the_machines_there_are_end_sooner() -> None:
    for images, workers, times in ((1_000_000, 160, 1.5), (1_000_000, 1_600, 4), (100_000_000, 16_000, 1.05)):
        fitted, few = (
            simulate(images, workers, constants=Constants(), prefixes=1_000, cut_for=cut_for)["seconds"]
            for cut_for in (workers, 1)
        )
        assert few > times * fitted, (images, workers, few, fitted)


def test_a_made_up_log_is_a_log() -> None:
    entries = list(made_up_log(7, 3))
    assert [entry["sequence"] for entry in entries] == list(range(1, 22))
    assert {(entry["number"], entry["epoch"]) for entry in entries} == {(n, e) for n in range(7) for e in (1, 2, 3)}


def test_the_measurement_writes_rows_that_say_what_they_are(tmp_path: Path) -> None:
    table = tmp_path / "scale.csv"
    command = [sys.executable, "-m", "jobs.bench.scale", "--small", "--parts", "search,simulation"]
    subprocess.run([*command, "--results", str(table)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    rows = pd.read_csv(table)
    assert set(rows["part"]) == {"measured", "simulated"}
    assert rows.loc[rows["part"] == "measured", ["name", "value", "unit"]].notna().all().all()
    assert rows.loc[rows["part"] == "simulated", ["images", "workers", "seconds", "limit"]].notna().all().all()
