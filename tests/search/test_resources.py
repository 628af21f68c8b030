"""What a trial gets of a cluster: GPUs that are there are used, and no machine is asked for more than it has."""

from __future__ import annotations

from typing import Any

import pytest

from carray.core.errors import SettingsError
from carray.search.resources import share_out
from carray.search.space import SearchSettings

LAPTOP = [{"CPU": 2.0}]
GPU_BOX = [{"CPU": 16.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "trials", "asked", "cpus", "gpus", "at_once"),
    [
        (LAPTOP, 8, {}, 1, 0, 2),
        (LAPTOP, 1, {}, 2, 0, 1),
        ([{"CPU": 16.0}], 3, {}, 5, 0, 3),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, {}, 4, 0, 4),
        (LAPTOP, 8, {"cpus_per_trial": 2}, 2, 0, 1),
        (GPU_BOX, 20, {}, 4, 1, 4),
        (GPU_BOX, 20, {"gpus_per_trial": 0.5}, 2, 0.5, 8),
        (GPU_BOX, 20, {"gpus_per_trial": 1 / 3}, 1, 1 / 3, 12),
        (GPU_BOX, 20, {"gpus_per_trial": 2}, 8, 2, 2),
        (GPU_BOX, 20, {"gpus_per_trial": 0}, 1, 0, 16),
        ([{"CPU": 4.0, "GPU": 8.0}], 20, {}, 0.5, 1, 8),
        # The head has no GPU; the poorer of the two machines with one decides.
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 20, {}, 8, 1, 2),
    ],
)
def test_a_trials_share(
    nodes: list[dict[str, float]], trials: int, asked: dict[str, Any], cpus: float, gpus: float, at_once: int
) -> None:
    share = share_out(nodes, SearchSettings(**asked), trials)
    assert (share.cpus, share.gpus, share.at_once) == (cpus, gpus, at_once)
    assert share.devices == (gpus or cpus)


def test_the_share_is_said_in_words() -> None:
    assert share_out(GPU_BOX, SearchSettings(), 9).text() == "1 GPU and 4 CPUs"
    assert share_out(LAPTOP, SearchSettings(), 9).text() == "1 CPU"


@pytest.mark.parametrize(
    ("nodes", "asked", "sentence"),
    [
        (LAPTOP, {"cpus_per_trial": 64}, "cpus_per_trial is 64, but the largest machine has 2; lower it"),
        (LAPTOP, {"gpus_per_trial": 1}, "gpus_per_trial is 1, but the cluster has no GPU; lower it or leave it out"),
        (GPU_BOX, {"gpus_per_trial": 8}, "gpus_per_trial is 8, but the largest machine has 4 GPUs; lower it"),
        (GPU_BOX, {"gpus_per_trial": 1.5}, "gpus_per_trial is 1.5; above 1 only whole GPUs"),
        (
            [{"CPU": 32.0}, {"CPU": 8.0, "GPU": 1.0}],
            {"cpus_per_trial": 16},
            "cpus_per_trial is 16 and search.gpus_per_trial 1, but no machine has both",
        ),
    ],
)
def test_what_no_machine_has_is_a_sentence(nodes: list[dict[str, float]], asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        share_out(nodes, SearchSettings(**asked), 8)
