"""Both jobs on several hosts, as submitted, and what they lose: the outcome is that of a cluster that lost nothing.

Run by `make test-cluster`, which takes about twelve minutes on two cores.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import pytest

from carray.testing.hosts.cluster import WORKERS
from carray.testing.hosts.machine import CLONE
from carray.testing.hosts.network import why_not
from jobs.drills.cluster import KINDS, SURVIVED, Scene, drill, set_scene

REASON = why_not() if os.environ.get("CARRAY_TEST_CLUSTER") else "`make test-cluster` runs these"
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"several hosts: {REASON}")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with set_scene(tmp_path_factory.mktemp("scene")) as scene:
        yield scene


def test_every_host_decoded_for_itself(scene: Scene) -> None:
    """Both workers had trials, and the head packed the winner: each has a block of its own, and nothing of a run."""
    for name in ("head", *WORKERS):
        home = scene.cluster.host(name).home
        assert len(list((home / ".cache" / "carray" / "tensors").glob("*/pixels.npy"))) == 1, name
        assert not [path for path in home.rglob("*") if path.name in ("bundle.json", "search.json", "run.json")], name


def test_what_the_jobs_left_lies_in_the_bucket(scene: Scene) -> None:
    images = [path for path in (scene.work / "images" / "photos").rglob("*") if path.is_file()]
    assert len(scene.rows.etags) == len(images)
    assert {row["status"] for row in scene.rows.rows.values()} == {"ok", "decode_error"}
    decisions = [entry["decision"] for entry in scene.search.entries]
    assert "stop" in decisions and "finish" in decisions
    assert {entry["family"] for entry in scene.search.entries} == {"cnn", "transfer"}


def test_the_job_server_is_nobody_s_without_a_token(scene: Scene) -> None:
    head, line = scene.cluster.host("head"), ("ray", "job", "submit", "--working-dir", ".", "--", "true")
    address = {"RAY_API_SERVER_ADDRESS": scene.cluster.user["RAY_API_SERVER_ADDRESS"]}
    refused = {
        "Missing authentication token": address,
        "Invalid authentication token": {**address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    }
    for reason, environment in refused.items():
        done = head.run(*line, environment=environment, folder=str(CLONE))
        assert done.returncode != 0
        assert reason in done.stdout + done.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((head.address, 8265), timeout=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_changes_nothing_of_the_outcome(scene: Scene, kind: str) -> None:
    outcome = drill(kind, scene, random.Random(f"suite {kind}"), kind)
    print(outcome)
    assert outcome.said, "the jobs had ended before the loss"
    assert not outcome.complaints, "\n".join([outcome.said, *outcome.complaints])
    for name, codes in outcome.codes.items():
        assert codes[-1] == 0, name
        assert len(codes) == 1 or kind not in SURVIVED, name
