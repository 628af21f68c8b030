"""What is said of a Ray: a head with a token, asked with it, without it and with another one; and where none is."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from carray.preflight.doctor import examine_cluster, look_in_process
from carray.preflight.findings import Check, Finding, finding_text, run_checks
from carray.testing.object_store import free_ports

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def head(ray_folder: Path) -> Iterator[dict[str, str]]:
    """Start a Ray head that asks for a token; gives the variables that lead there. It is ended by its pid."""
    port, dashboard = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    command += ["--disable-usage-stats", "--num-cpus=1", f"--temp-dir={ray_folder / 'ray'}"]
    with (ray_folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    found = {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    found |= {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.items():
                patch.setenv(name, value)
            until = time.monotonic() + 90
            while time.monotonic() < until and process.poll() is None:
                if (
                    next(look_in_process("jobs", found["RAY_API_SERVER_ADDRESS"], title="jobs", seconds=60)).status
                    == "ok"
                ):
                    break
        yield found
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def there(head, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in head.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return head


def test_a_ray_that_answers_takes_the_token_and_has_carray(there):
    ray, software = look_in_process("ray", title="Ray", seconds=100)
    assert (ray.status, software.status) == ("ok", "ok")
    assert "1 machine, 1 CPU, the token is accepted" in ray.seen
    assert software.seen.endswith("on each of 1")
    (jobs,) = look_in_process("jobs", there["RAY_API_SERVER_ADDRESS"], title="Ray jobs", seconds=100)
    assert jobs.status == "ok"


@pytest.mark.parametrize("token", [pytest.param("another", marks=pytest.mark.slow), ""])
def test_a_token_that_is_not_this_clusters_is_refused(there, monkeypatch, tmp_path, token):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token and secrets.token_hex(32))
    ray, jobs = run_checks(
        [
            Check("Ray", lambda: look_in_process("ray", title="Ray", seconds=100), 110),
            Check(
                "jobs", lambda: look_in_process("jobs", there["RAY_API_SERVER_ADDRESS"], title="jobs", seconds=100), 110
            ),
        ]
    )
    assert (ray.status, jobs.status) == ("fail", "fail")
    assert "token" in ray.remedy
    assert "auth_token" in jobs.remedy or "token" in jobs.seen


def test_every_machine_examines_itself(there, tmp_path):
    findings = list(examine_cluster([str(tmp_path / "absent")], [str(tmp_path / "out")]))
    lines = {found.name: finding_text(found) for found in findings}
    assert {"Ray", "Ray's machines", "Ray jobs", "cores", "decoders", "training", "weights", "writes"} <= set(lines)
    assert re.search(r" \[\S+ \([\d.]+\)\]$", lines["decoders"])
    failed = [found.name for found in findings if found.status == "fail"]
    assert failed == ["reads"]
    assert not (tmp_path / "out").exists()


def test_machines_of_other_software_are_named(monkeypatch):
    from carray.preflight import cluster_on_ray

    here = cluster_on_ray._software()
    assert cluster_on_ray._same_software({"a": here, "b": here}).status == "ok"
    found = cluster_on_ray._same_software({"a": here, "b": "carray 0.0.9, Python 3.11.7, Ray 2.60.0"})
    assert found.status == "fail"
    assert found.seen == "b says carray 0.0.9, Python 3.11.7, Ray 2.60.0"
    assert here in found.remedy
    missing = cluster_on_ray._same_software({"b": "ModuleNotFoundError: No module named 'carray'"})
    assert "--working-dir" in missing.remedy


def test_where_nobody_listens_is_a_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    (found,) = look_in_process("ray", title="Ray", seconds=60)
    assert found.status == "fail"
    assert "no Ray answers there" in found.seen
    assert "unset RAY_ADDRESS" in found.remedy


def test_findings_travel_as_json():
    found = Finding("cores", "ok", "2", absent=True)
    assert Finding(**json.loads(json.dumps(asdict(found)))) == found
