"""Metrics: on a real head with its exporter they are the table's own counts; elsewhere they cost and break nothing."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from carray.core.ray.metrics import METRICS, Meter
from carray.testing.object_store import free_ports

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def head_with_exporter(folder: Path) -> Iterator[tuple[dict[str, str], str]]:
    """Start a Ray head with a token; gives what a driver needs in its environment, and the exporter's address."""
    (folder / "token").write_text(secrets.token_hex(32))
    gcs, exporter, dashboard, agent = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_metrics_report_interval_ms": "1000"}
    ports = {"port": gcs, "metrics-export-port": exporter, "dashboard-port": dashboard}
    ports |= {"dashboard-agent-listen-port": agent, "min-worker-port": 0, "max-worker-port": 0}
    flags = ["--head", "--block", "--num-cpus=2", "--disable-usage-stats", "--include-dashboard=true"]
    flags += [f"--{name}={number}" for name, number in ports.items()]
    session = Path(tempfile.mkdtemp(prefix="carray-"))  # sockets' paths must be short, which pytest's are not
    flags += [f"--temp-dir={session}", "--dashboard-host=127.0.0.1"]
    program = Path(sys.executable).parent / "ray"
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen([str(program), "start", *flags], env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{exporter}/metrics"
        wait_for(lambda: scraped(url), seconds=90)
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}"}, url
    finally:
        head.terminate()  # with --block it ends what it started
        head.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def wait_for(what, *, seconds: float):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.5)
    raise AssertionError(f"nothing after {seconds} s")


def scraped(url: str, prefix: str = "") -> list[tuple[str, dict[str, str], float]]:
    """Give (name, labels, value) of each of an exporter's samples that begins so."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
    except OSError:
        return []
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [(s.name, s.labels, s.value) for s in samples if s.name.startswith(prefix)]


def test_the_exporter_tells_what_the_table_holds(small_bundle, image_folder, tmp_path) -> None:
    (image_folder / "a" / "broken.jpg").write_bytes(b"\xff\xd8no image")
    (image_folder / "a" / "empty.jpg").write_bytes(b"")
    out = str(tmp_path / "out")
    with head_with_exporter(tmp_path) as (environment, url):
        command = [sys.executable, "-m", "carray", "classify", small_bundle, str(image_folder), "--out", out]
        command += ["--set", "shard_images_first=4", "--set", "shard_images_max=4"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found = wait_for(lambda: scraped(url, "ray_carray_"), seconds=30)
    rows = pd.read_parquet(out)
    assert {labels["out"] for _, labels, _ in found} == {out}

    def value(name: str, **wanted: str) -> float:
        return sum(v for n, labels, v in found if n == f"ray_{name}" and wanted.items() <= labels.items())

    for status in ("ok", "decode_error"):
        assert value("carray_classify_images_total", status=status) == (rows["status"] == status).sum() > 0
    assert value("carray_classify_failures_total", code="empty") == 1
    assert value("carray_classify_read_bytes_total") == rows["size_bytes"].sum()
    shards = len(list(Path(out).glob("*.parquet")))
    assert value("carray_classify_shards_finished") == value("carray_classify_shards_listed") == shards
    assert value("carray_classify_shard_seconds_count") == shards
    assert 20e6 < value("carray_classify_worker_peak_memory_bytes") < 20e9
    known = {f"ray_{name}" for name in METRICS}
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _, _ in found} <= known
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == len(rows)


def test_a_private_ray_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.util", None)  # an import would fail
    Meter("out", private=True).record("carray_classify_read_bytes_total", 3)


def test_what_goes_wrong_is_said_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("out", private=False)
    for _ in range(3):
        meter.record("no_such_metric", 1)
        meter.record("carray_classify_images_total", 2, status="ok")
    assert capsys.readouterr().err.count("warning: metrics are given up (KeyError") == 1


def test_names_end_in_their_unit() -> None:
    units = ("_total", "_seconds", "_bytes", "_ratio", "_listed", "_finished", "_trials")
    for name, (kind, description, labels) in METRICS.items():
        assert name.startswith("carray_") and name.endswith(units)
        assert (kind == "counter") == name.endswith("_total")
        assert description and "out" not in labels
