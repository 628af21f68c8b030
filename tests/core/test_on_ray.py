"""Which Ray a command runs on: named, else private; never one that merely happens to run."""

from __future__ import annotations

import socket

import pytest
import ray

from carray.core import on_ray
from carray.core.errors import SettingsError
from carray.core.on_ray import RunningRay, start_ray


def test_a_ray_that_this_process_has_is_used_and_left_running(ray_cluster):
    with start_ray(num_cpus=7) as running:
        assert running == ray_cluster
        assert (running.cpus, running.node_cpus, running.private) == (2, 2, True)
    assert ray.is_initialized()


def test_a_private_ray_asks_for_a_token(ray_cluster):
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    assert is_token_auth_enabled()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:8265", "a dashboard, to which `ray job submit` belongs"),
        ("127.0.0.1:{closed}", "no Ray answers there .*Connection refused.*unset RAY_ADDRESS"),
    ],
)
def test_an_address_that_leads_nowhere_is_one_sentence(monkeypatch, address, reason):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address.format(closed=closed))
    with pytest.raises(SettingsError, match=f"^RAY_ADDRESS is '.*', .*{reason}"), start_ray():
        pass


@pytest.fixture
def cluster(ray_cluster, monkeypatch):
    """Give the CPUs that a cluster has at each look, and those that were asked of its autoscaler."""
    from ray.autoscaler import sdk

    cpus, asked = [0, 0, 4], []
    monkeypatch.setattr(on_ray, "_describe", lambda: RunningRay(False, cpus[0] if len(cpus) == 1 else cpus.pop(0), 4))
    monkeypatch.setattr(on_ray.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sdk, "request_resources", lambda num_cpus: asked.append(num_cpus))
    return cpus, asked


def test_a_head_without_cpus_waits_for_the_first_worker_and_asks_for_one(cluster, capsys):
    on_ray._await_cpus("head:6379")
    assert cluster == ([4], [1, 0])
    assert "no machine of this cluster has a CPU yet" in capsys.readouterr().err


def test_a_cluster_that_has_cpus_is_asked_for_nothing(cluster):
    cluster[0][:] = [2]
    on_ray._await_cpus("head:6379")
    assert cluster[1] == []


def test_a_cluster_that_gets_no_worker_is_one_sentence(cluster, monkeypatch):
    cluster[0][:] = [0]
    monkeypatch.setattr(on_ray, "_CPU_SECONDS", -1)
    with pytest.raises(SettingsError, match="^the Ray at head:6379 has no CPU, and .* has joined; start a worker"):
        on_ray._await_cpus("head:6379")
    assert cluster[1] == [1, 0], "what was asked for is asked for no longer"
