"""Network traffic: nothing leaves the machine or listens on it unless the user asked for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from carray.core.environment import TELEMETRY_OFF, turn_telemetry_off

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command in a network of its own, with loopback and nothing else."""


def has_networks_of_its_own() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_networks_of_its_own(), reason="this machine allows no network namespaces")
def test_nothing_leaves_the_machine_for_local_data(tmp_path: Path, make_image, small_bundle: str) -> None:
    """Counted by the kernel, so that native libraries and Ray's own processes count, too."""
    for label in ("AM General Hummer SUV 2000", "unknown"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "images" / label / f"{number}.jpg").write_bytes(make_image(10 * number + len(label)))
    home = tempfile.mkdtemp(prefix="ray-")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", *TELEMETRY_OFF))}
    places = {"CARRAY_CACHE": f"{tmp_path}/cache", "RAY_TMPDIR": home, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [*ALONE, sys.executable, Path(__file__).with_name("quiet_flow.py"), tmp_path, small_bundle],
            env={**kept, **places, "RAY_USAGE_STATS_REPORT_INTERVAL_S": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    # Starting, Ray asks the kernel which of its addresses leads to the world; no packet goes there.
    assert {stage: number for stage, number in counted.items() if number and stage != "starting Ray"} == {}


def test_each_library_is_told_to_report_nothing_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TELEMETRY_OFF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    turn_telemetry_off()
    from ray._common.usage.usage_lib import usage_stats_enabled

    assert not usage_stats_enabled()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_a_private_ray_has_no_dashboard(ray_cluster) -> None:
    import ray

    assert not ray._private.worker.global_worker.node.address_info["webui_url"]


SHIPPED = sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file() and path.suffix != ".py")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_we_ship_opens_no_dashboard_to_strangers(path: Path) -> None:
    text = path.read_text()
    opened = re.findall(r"dashboard-host['\"]?[=:\s]+['\"]?([\w.:]+)", text)
    assert all(host in ("127.0.0.1", "localhost") for host in opened) or "RAY_AUTH_MODE" in text, opened
    starts = "ray start" in text or "kind: RayCluster" in text or "kind: RayJob" in text
    # Ray's own variable, or the field by which KubeRay's operator sets it on every pod.
    assert not starts or re.search(r"RAY_AUTH_MODE=token|authOptions: \{mode: token\}", text), "no token"
    if path.suffix in (".yaml", ".yml"):
        values = [value for document in yaml.safe_load_all(text) for value in texts_of(document)]
        assert not {"LoadBalancer", "NodePort", "0.0.0.0/0", "::/0"} & set(values)


def texts_of(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts_of(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part)]
    return [value] if isinstance(value, str) else []
