"""What a job takes of a cluster: all of it, and never what no machine has."""

from __future__ import annotations

import pytest

from carray.classify.engine import Pool, size_pool
from carray.classify.predictions_folder import ClassifySettings
from carray.core.ray.resources import Resources

ONE = Resources(private=True, cpus=1, node_cpus=1)
FOUR_MACHINES = Resources(private=False, cpus=32, node_cpus=8)
RICH_GPUS = Resources(private=False, cpus=64, node_cpus=32, gpus=4, cpus_per_gpu=16)
POOR_GPU = Resources(private=False, cpus=36, node_cpus=32, gpus=1, cpus_per_gpu=4)
GROWING = Resources(private=False, cpus=4, node_cpus=4, grows=True)
LONELY_GPU = Resources(private=True, cpus=4, node_cpus=4, gpus=1, cpus_per_gpu=4)


@pytest.mark.parametrize(
    ("running", "device", "settings", "pool"),
    [
        (ONE, "cpu", {}, Pool(1, 1, 1)),
        (ONE, "cpu", {"workers": 3, "threads": 2}, Pool(3, 1, 1)),
        (FOUR_MACHINES, "cpu", {}, Pool(32, 1, 1)),
        (FOUR_MACHINES, "cpu", {"threads": 16, "min_workers": 2}, Pool(4, 2, 8)),
        (RICH_GPUS, "cuda", {}, Pool(4, 1, 16, 1)),
        (RICH_GPUS, "cpu", {}, Pool(64, 1, 1)),
        (POOR_GPU, "cuda", {}, Pool(1, 1, 4, 1)),
        (LONELY_GPU, "cuda", {}, Pool(1, 1, 4, 1)),
        (GROWING, "cpu", {}, Pool(4, 1, 1, most_workers=1_000)),
        (GROWING, "cpu", {"workers": 64}, Pool(64, 1, 1)),
    ],
)
def test_a_pool_fits_its_cluster(running, device, settings, pool):
    assert size_pool(running, ClassifySettings(**settings), shards=1_000, device=device) == pool


def test_no_more_workers_than_shards():
    assert size_pool(FOUR_MACHINES, ClassifySettings(min_workers=9), shards=3, device="cpu") == Pool(3, 3, 1)
