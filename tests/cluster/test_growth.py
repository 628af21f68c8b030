"""A cluster that is its head alone: jobs wait for machines, Ray's autoscaler brings them, what cannot come is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from growing_ray import start_growing_ray

SECONDS = 240


@pytest.fixture(scope="module")
def growing(ray_folder: Path) -> Iterator[dict[str, str]]:
    """Start a Ray without CPUs, whose autoscaler may add two machines of one."""
    with start_growing_ray(ray_folder, machine={"CPU": 1}, most=2) as variables:
        yield {**os.environ, **variables}


def carray(*words: str, growing: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "carray", *words]
    return subprocess.run(command, env=growing, capture_output=True, text=True, timeout=SECONDS)


def machines(growing: dict[str, str]) -> int:
    code = (
        "import os, ray; ray.init(address=os.environ['RAY_ADDRESS'], logging_level='ERROR'); "
        "print(sum('CPU' in node['Resources'] for node in ray.nodes() if node['Alive']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=growing, capture_output=True, text=True, timeout=SECONDS)
    return int(done.stdout.split()[-1])


def test_what_no_machine_has_is_refused_before_any_comes(
    growing: dict[str, str], small_bundle: str, image_folder: Path, tmp_path: Path
) -> None:
    command = ["classify", small_bundle, str(image_folder), "--out", str(tmp_path / "out"), "--set", "device=cuda"]
    done = carray(*command, growing=growing)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "carray: one worker needs a machine with 1 CPU and 1 GPU, but no machine that this cluster may add has so "
        "much; ask for less, or add such a machine type to the cluster's file."
    )
    assert machines(growing) == 0


@pytest.mark.slow
def test_a_search_that_asks_for_too_much_is_refused(growing: dict[str, str], tmp_path: Path) -> None:
    from carray.manifest.prepare import prepare
    from carray.testing.drawing import draw_dataset

    draw_dataset(tmp_path / "images", images_per_class=6)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "manifest.parquet"))
    command = ["tune", "--manifest", str(tmp_path / "manifest.parquet"), "--out", str(tmp_path / "run")]
    small = ["--set", "families={cnn: {default: {input_size: 32, stages: 2, width: 8}}}", "--trials", "1"]
    done = carray(*command, *small, "--set", "search.cpus_per_trial=3", growing=growing)
    assert done.returncode == 2, done.stderr
    assert "one worker needs a machine with 3 CPUs, but no machine" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_job_waits_for_the_first_machine_and_is_done_on_it(
    growing: dict[str, str], small_bundle: str, image_folder: Path, tmp_path: Path
) -> None:
    command = ["classify", small_bundle, str(image_folder), "--out", str(tmp_path / "out")]
    done = carray(*command, growing=growing)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Ray: waiting for a machine with 1 CPU; 1 are up, 0 minutes so far" in done.stderr
    assert "1 workers of 1 CPU" in done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["images"], outcome["rows"]) == (12, 12)
    assert machines(growing) >= 1
