"""Which Ray a command runs on: named, else private; never one that merely happens to run."""

from __future__ import annotations

import socket

import pytest
import ray

from carray.core.errors import SettingsError
from carray.core.ray.connect import start_ray


def test_a_ray_that_this_process_has_is_used_and_left_running(ray_cluster):
    with start_ray(num_cpus=7) as running:
        assert running == ray_cluster
        assert (running.cpus, running.node_cpus, running.private) == (2, 2, True)
    assert ray.is_initialized()


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
