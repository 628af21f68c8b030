"""Scoring in processes of this machine: killed ones, deadly images, stops, and what is not imported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from carray.bundle.bundle_folder import open_bundle
from carray.classify.engine import Pool
from carray.classify.job import classify
from carray.classify.local import start_local
from carray.classify.plan import describe_run
from carray.classify.predictions_folder import ClassifySettings
from carray.core.errors import ClusterError
from carray.core.store.files import exists, join, list_files
from carray.queries import read_predictions

IMAGES = 24


def settings(**values):
    return ClassifySettings(**{"engine": "local", "shard_images_first": 8, "shard_images_max": 8, **values})


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


@pytest.fixture
def slow_folder(tmp_path, make_image):
    """Give a folder of images that take a tenth of a second each."""
    folder = tmp_path / "many"
    folder.mkdir()
    slow = make_image(0, width=1500, height=1000, format="PNG")
    for i in range(IMAGES):
        (folder / f"{i:02d}.png").write_bytes(slow)
    return folder


@contextmanager
def watching_notes(out, act):
    """Call `act` with each note of a worker that has images in hand, while the block runs."""
    ended = threading.Event()

    def watch():
        attempts = Path(out, "_carray", "attempts")
        while not ended.wait(0.002):
            for note in attempts.glob("*.json") if attempts.is_dir() else ():
                try:
                    attempt = json.loads(note.read_text())
                except (OSError, ValueError):
                    continue
                if attempt["images"]:
                    act(attempt)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("whom", ["worker", "fork server"])
def test_a_process_killed_in_the_middle_costs_no_row(small_bundle, slow_folder, out, whom):
    killed = []

    def kill_one(attempt):
        if not killed:
            pid = attempt["pid"]
            if whom == "fork server":
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            killed.extend([pid] * kill(pid))

    with watching_notes(out, kill_one):
        outcome = classify(small_bundle, str(slow_folder), out=out, settings=settings())
    assert killed, "the test did kill a process"
    assert read_predictions(out)["uri"].tolist() == [f"{slow_folder}/{i:02d}.png" for i in range(IMAGES)]
    assert (outcome["rows"], outcome["ok"]) == (IMAGES, IMAGES), "one death is nobody's fault"
    assert list_files(join(out, "_carray", "attempts")) == [], "not even what a killed worker was writing"


def test_an_image_that_kills_its_worker_becomes_a_row(small_bundle, slow_folder, out):
    """The shard's third image; whoever has it in hand is killed."""
    deaths = set()

    def strike(attempt):
        if (
            attempt["shard"] == 1
            and 2 in attempt["images"]
            and attempt["worker"] not in deaths
            and kill(attempt["pid"])
        ):
            deaths.add(attempt["worker"])

    with watching_notes(out, strike):
        outcome = classify(small_bundle, str(slow_folder), out=out, settings=settings())
    rows = read_predictions(out).set_index("uri")
    lost = rows.loc[f"{slow_folder}/10.png"]
    assert (lost["status"], lost["error_code"]) == ("decode_error", "worker_lost")
    assert len(deaths) == 2, "once among others, once alone"
    assert (outcome["rows"], outcome["ok"]) == (IMAGES, IMAGES - 1)


def _entries(out: str) -> list[str]:
    """List the finished entries of a ledger, without one that is being written."""
    return [uri for uri in list_files(join(out, "_carray", "ledger")) if uri.endswith(".json")]


def test_sigterm_ends_the_job_in_order_and_another_resumes_it(small_bundle, slow_folder, out):
    command = [sys.executable, "-m", "carray", "classify", small_bundle, str(slow_folder), "--out", out]
    command += ["--engine", "local", "--set", "shard_images_first=1", "--set", "shard_images_max=1"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(_entries(out)) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    driver.terminate()
    printed, said = driver.communicate(timeout=60)
    assert driver.returncode == 143, said
    assert "carray: stopped by SIGTERM; finished shards stay" in said and "Traceback" not in said
    assert re.match(
        rf"carray: \d+ shards are finished and stay, of \d+( listed so far)?; .* OUT={out}$", said.splitlines()[-1]
    )
    assert "run_id" not in printed
    assert list_files(join(out, "_carray", "attempts")) == []
    assert not exists(join(out, "_carray", "driver.json"))
    assert 2 <= len(_entries(out)) < IMAGES
    outcome = classify(small_bundle, str(slow_folder), out=out, settings=settings())
    assert (outcome["rows"], outcome["ok"]) == (IMAGES, IMAGES)


def test_workers_end_with_a_driver_that_is_killed(small_bundle, slow_folder, out):
    program = """if True:
        import os, sys, threading
        from carray.classify.job import classify
        from carray.classify.predictions_folder import ClassifySettings
        bundle, source, out = sys.argv[1:]
        classify(bundle, source, out=out, settings=ClassifySettings(engine="local"))
    """
    workers = set()
    driver = subprocess.Popen([sys.executable, "-c", program, small_bundle, str(slow_folder), out])
    with watching_notes(out, lambda attempt: workers.add(attempt["pid"]) or driver.kill()):
        driver.wait(120)
    assert workers
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.01)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    outcome = classify(small_bundle, str(slow_folder), out=out, settings=settings())
    assert outcome["ok"] == IMAGES, "an image is not to blame for the death of its driver"


def test_nothing_heavy_is_imported(small_bundle, slow_folder, out):
    program = """if True:
        import json, sys
        from carray.classify.job import classify
        from carray.classify.predictions_folder import ClassifySettings
        bundle, source, out = sys.argv[1:]
        classify(bundle, source, out=out, settings=ClassifySettings(engine="local"))
        print(json.dumps([name for name in ("ray", "torch", "pandas", "duckdb", "onnxruntime") if name in sys.modules]))
    """
    maps = []

    def look(attempt):
        if not maps:
            maps.append(Path(f"/proc/{attempt['pid']}/maps").read_text())

    command = [sys.executable, "-c", program, small_bundle, str(slow_folder), out]
    with watching_notes(out, look):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [], "in the driver"
    assert "onnxruntime" in maps[0]
    assert [name for name in ("libtorch", "_raylet", "pandas", "duckdb") if name in maps[0]] == [], "in a worker"


def test_processes_that_cannot_begin_are_an_error(monkeypatch, small_bundle, image_folder, out):
    monkeypatch.setattr("carray.core.fork_server._PROGRAM", "raise SystemExit")
    with pytest.raises(ClusterError, match="^3 scoring processes ended before they could take a shard; look"):
        classify(small_bundle, str(image_folder), out=out, settings=settings())


def test_a_bug_in_a_worker_is_shown_with_its_stack(small_bundle, out):
    chosen = ClassifySettings()
    run = describe_run(open_bundle(small_bundle), small_bundle, "/nowhere", chosen)
    job = {"bundle": small_bundle, "out": out, "driver": ""}
    job |= {"run": run.model_dump(mode="json"), "settings": chosen.model_dump(mode="json")}
    with start_local() as engine, pytest.raises(RuntimeError, match=r"(?s)^a scoring process failed:.*'retry'"):
        list(engine.run_shards(job, [{"shard": 0}], Pool(1, 1, 1)))


def test_runtimes_are_measured_in_a_process_of_their_own(certified_bundle, monkeypatch):
    with start_local() as engine:
        found = engine.measure(certified_bundle, ["fp32", "int8"])
        assert set(found) == {"fp32", "int8"} and min(found.values()) > 0
        engine._server.kill()
        assert set(engine.measure(certified_bundle, ["fp32", "int8"])) == {"fp32", "int8"}, "by a new server"
        assert engine.measure("/no/such/bundle", ["fp32"]) == {}
