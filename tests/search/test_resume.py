"""Searches that are killed, cut off, short of disk or made larger, under a real Ray: they end as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray.core.errors import SettingsError, StorageError
from carray.core.settings import parse_settings
from carray.core.store.files import exists, join, list_files, read_bytes, read_json, write_bytes, write_json
from carray.manifest.prepare import prepare
from carray.search import run_folder
from carray.search.run_log import SearchLog, check_decisions
from carray.search.search_on_ray import search
from carray.search.space import TuneSettings
from carray.search.trial_on_ray import TrialRunner
from carray.testing.drawing import draw_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found through /proc")

CNN = {"input_size": 32, "stages": 2, "width": 8, "batch_images": 16, "ema": 0.9}
SETTINGS: dict[str, Any] = {
    # One trial at a time, so that the order of decisions is the same each time.
    "search": {"trials": 4, "epochs": 3, "cpus_per_trial": 2},
    "pixels": {"decode_size": 40, "input_size": 32},
    "families": {"cnn": {"default": CNN, "space": {"width": [8, 12], "learning_rate": [1e-6, 5e-3]}}},
}
FIGURES = ["number", "epoch", "train_loss", "val_loss", "val_top1", "val_top5", "learning_rate", "decision"]


def settings(**changed: Any) -> TuneSettings:
    return parse_settings(TuneSettings, {**SETTINGS, "search": {**SETTINGS["search"], **changed}})


def epochs_of(run: str) -> list[dict[str, Any]]:
    """Give what every epoch came to, in the order of decisions."""
    return [{name: entry[name] for name in FIGURES} for entry in run_folder.read_log(run)]


def by_trial(run: str) -> list[dict[str, Any]]:
    return sorted(epochs_of(run), key=lambda entry: (entry["number"], entry["epoch"]))


def outcome_of(run: str) -> pd.DataFrame:
    return run_folder.read_trials(run)[["number", "status", "val_top1", "best_epoch", "epochs", "hyper"]]


def weights_of(run: str) -> list[dict[str, bytes]]:
    """Give every trial's best weights, as bytes by name."""
    from safetensors.numpy import load

    best = [load(read_bytes(run_folder.best_weights(run, run_folder.trial_id(number)))) for number in range(4)]
    return [{name: value.tobytes() for name, value in weights.items()} for weights in best]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRAY_CACHE", str(tmp_path_factory.mktemp("resume-cache")))
        yield


@pytest.fixture(scope="module")
def whole(manifest: str, tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> str:
    """Run the search once without any disturbance."""
    run = str(tmp_path_factory.mktemp("whole") / "run")
    search(manifest, run=run, settings=settings())
    assert {entry["decision"] for entry in epochs_of(run)} == {"continue", "stop", "finish"}
    return run


def assert_same(run: str, whole: str) -> None:
    assert epochs_of(run) == epochs_of(whole)
    pd.testing.assert_frame_equal(outcome_of(run), outcome_of(whole))
    assert weights_of(run) == weights_of(whole)
    assert check_decisions(run) == []


def test_the_decisions_follow_from_the_log_and_from_no_other(whole: str, tmp_path: Path) -> None:
    assert check_decisions(whole) == []
    run = str(tmp_path / "run")
    shutil.copytree(whole, run)
    place = list_files(join(run, "log"))[-1]
    entry = read_json(place)
    write_json(place, {**entry, "decision": "continue" if entry["decision"] == "stop" else "stop"})
    assert len(check_decisions(run)) == 1


@pytest.mark.slow
def test_sigterm_ends_a_search_in_order(manifest: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    settings_file = tmp_path / "settings.yaml"
    settings_file.write_text(json.dumps(settings(trials=60, epochs=50).model_dump(mode="json")))
    command = [sys.executable, "-m", "carray", "tune", "--manifest", manifest, "--out", run]
    command += ["--config", str(settings_file)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(lambda: exists(join(run, "log", "00000001.json")) or driver.poll() is not None, seconds=120)
    driver.terminate()
    try:
        printed, said = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 143, said
    assert "carray: stopped by SIGTERM; every logged epoch stays" in said and "Traceback" not in said
    assert "best_trial" not in printed
    assert "failed" not in {end["status"] for end in run_folder.read_trial_ends(run, 4).values()}


@pytest.mark.slow
def test_a_killed_driver_and_then_a_full_disk(manifest: str, whole: str, small_disk: Path) -> None:
    """The driver has a private Ray; it is killed at a random moment, and what it started ends with it."""
    run = str(small_disk / "run")
    program = (
        "import sys; from carray.core.settings import parse_settings; from carray.search.search_on_ray import search; "
        "from carray.search.space import TuneSettings; import json; "
        "search(sys.argv[1], run=sys.argv[2], settings=parse_settings(TuneSettings, json.loads(sys.argv[3])))"
    )
    driver = subprocess.Popen([sys.executable, "-c", program, manifest, run, json.dumps(SETTINGS)])
    wait_for(lambda: exists(join(run, "log", "00000001.json")) or driver.poll() is not None, seconds=120)
    started = {pid: command_of(pid) for pid in descendants(driver.pid)}
    assert any(is_worker(command) for command in started.values())
    delay_seconds = random.uniform(0, 1.5)  # on a fast machine the search may have ended by then
    time.sleep(delay_seconds)
    started |= {pid: command_of(pid) for pid in descendants(driver.pid)}
    driver.kill()
    driver.wait()
    end_all(started)
    before = {uri: read_bytes(uri) for uri in list_files(join(run, "log"))}
    assert before, f"killed {delay_seconds:.2f} s after the first epoch"

    filler = fill(small_disk, leave_bytes=8_000)  # less than one checkpoint
    if len(before) < len(epochs_of(whole)):
        with pytest.raises(StorageError, match=r"No space left on device.*run the same command again to resume"):
            search(manifest, run=run, settings=settings())
        assert "failed" not in {end["status"] for end in run_folder.read_trial_ends(run, 4).values()}
    filler.unlink()
    search(manifest, run=run, settings=settings())
    assert {uri: read_bytes(uri) for uri in before} == before
    assert_same(run, whole)


@pytest.mark.slow
def test_a_budget_on_a_bucket_and_a_checkpoint_that_was_cut_short(manifest: str, whole: str, s3: str) -> None:
    run = f"{s3}/run"
    tight = settings(money_budget=1e-9, price_per_device_hour=2.5)
    first = search(manifest, run=run, settings=tight)
    assert first["ended_by"].startswith("search.money_budget of 1e-09 is used up")
    assert first["by_status"] == {"not_started": 3, "out_of_time": 1}
    assert first["spent"]["money"] == pytest.approx(2.5 * first["spent"]["device_hours"])
    log = list_files(join(run, "log"))
    assert len(log) == 1
    again = search(manifest, run=run, settings=tight)  # the same budget: packs what is there
    assert (again["ended_by"], again["best_trial"]) == (first["ended_by"], "t00000")
    assert list_files(join(run, "log")) == log
    assert read_json(join(run, run_folder.DONE))["spent"]["minutes"] == pytest.approx(
        first["spent"]["minutes"], abs=0.2
    )

    checkpoint = run_folder.last_checkpoint(run, 0)
    write_bytes(checkpoint, read_bytes(checkpoint)[:-100])
    outcome = search(manifest, run=run, settings=settings(time_budget_minutes=60))
    assert outcome["ended_by"] is None
    assert outcome["spent"]["minutes"] > first["spent"]["minutes"]
    assert_same(run, whole)
    notes = run_folder.read_trials(run).set_index("number")["note"]
    assert "cut short" in notes[0]
    assert notes[[1, 2, 3]].isna().all()
    assert not exists(checkpoint)


def test_a_larger_search_with_a_trial_whose_process_is_killed(
    manifest: str, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes right after the first logged epoch, before Tune asks the process for more."""
    run = str(tmp_path / "run")
    shutil.copytree(whole, run)
    keep_trials(run, 2)
    search(manifest, run=run, settings=settings(trials=2))
    before = {uri: read_bytes(uri) for uri in list_files(join(run, "log"))}
    killed: list[int] = []

    add = SearchLog.add

    def add_and_kill(log: SearchLog, *arguments: Any) -> None:
        add(log, *arguments)
        for pid in [] if killed else descendants(os.getpid()):
            if is_worker(command_of(pid)):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    monkeypatch.setattr(SearchLog, "add", add_and_kill)
    search(manifest, run=run, settings=settings())
    assert killed
    assert {uri: read_bytes(uri) for uri in before} == before
    assert by_trial(run) == by_trial(whole)
    assert weights_of(run) == weights_of(whole)
    assert check_decisions(run) == []
    assert read_json(join(run, run_folder.SEARCH))["settings"]["search"]["trials"] == 4


def test_fewer_trials_and_another_grid_of_them_are_refused(whole: str, manifest: str) -> None:
    with pytest.raises(SettingsError, match="holds a search of 4 trials, and search.trials is 3; a search can only"):
        search(manifest, run=whole, settings=settings(trials=3))


def test_a_new_process_goes_on_where_the_lost_one_was(manifest: str, tmp_path: Path) -> None:
    """It reports the last epoch again, with the very seconds that took, and trains the next one as if undisturbed; the
    lost one, should it be back, gives up."""
    shared = {
        **{"run": str(tmp_path / "run"), "manifest": manifest, "settings": settings().model_dump(mode="json")},
        **{"cpus": 2, "gpus": 0, "environment": {}},
    }
    lost = a_runner({"family": "cnn", **CNN}, shared)
    reported = [lost.step() for _ in range(2)]
    successor = a_runner({"family": "cnn", **CNN}, shared)
    assert successor.step() == reported[1]
    alone = a_runner({"family": "cnn", **CNN}, {**shared, "run": str(tmp_path / "alone")})
    undisturbed = json.loads([alone.step() for _ in range(3)][-1]["entry"])
    third = json.loads(successor.step()["entry"])
    assert third["epoch"] == 3
    assert {name: third[name] for name in ("train_loss", "val_loss", "val_top1")} == {
        name: undisturbed[name] for name in ("train_loss", "val_loss", "val_top1")
    }
    assert "entry" not in lost.step()


def test_a_failure_ends_the_trial_and_a_full_disk_the_search(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's side alone: what it reports of errors that only it meets."""
    shared = {
        **{"run": str(tmp_path / "run"), "manifest": manifest, "settings": settings().model_dump(mode="json")},
        **{"cpus": 2, "gpus": 0, "environment": {}},
    }
    failing = a_runner({"family": "transfer", "backbone": "no_such_net", "weights": "none"}, shared)
    assert failing.step()["done"]
    assert "no_such_net" in failing.step()["failed"]

    Path(tmp_path, "run").write_text("a file where a folder should be")
    away = a_runner({"family": "cnn", **CNN}, shared)
    assert away.step()["halt_kind"] == "storage"

    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    draw_dataset(tmp_path / "images", images_per_class=4)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "m.parquet"))
    for image in Path(tmp_path, "images").rglob("*.jpg"):
        image.write_bytes(image.read_bytes() + b" ")
    changed = a_runner({"family": "cnn", **CNN}, {**shared, "manifest": str(tmp_path / "m.parquet")})
    assert changed.step()["halt_kind"] == "data"
    assert "changed since the manifest was prepared" in changed.step()["halt"]


def a_runner(hyper: dict[str, Any], shared: dict[str, Any]) -> TrialRunner:
    before = signal.getsignal(signal.SIGTERM)
    runner: TrialRunner = object.__new__(TrialRunner)
    runner.setup({"number": 0, "hyper": hyper}, shared)
    signal.signal(signal.SIGTERM, before)
    return runner


def keep_trials(run: str, count: int) -> None:
    """Make of a run whose trials ran one after another the finished run of its first ones."""
    stored = read_json(join(run, run_folder.SEARCH))
    stored["settings"]["search"]["trials"] = count
    write_json(join(run, run_folder.SEARCH), {**stored, "configurations": stored["configurations"][:count]})
    for uri in list_files(join(run, "log")):
        if read_json(uri)["number"] >= count:
            os.unlink(uri)
    for number in range(count, 4):
        shutil.rmtree(run_folder.trial_folder(run, number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "carray-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk needs the right to mount one")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, *, leave_bytes: int) -> Path:
    """Write a file that takes all of a disk but so many bytes."""
    filler = place / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(place).free - leave_bytes))
    return filler


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """Give the processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def command_of(pid: int) -> str:
    """Give a process's command line; empty when it is gone, or only waits to be taken note of."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def is_worker(command: str) -> bool:
    """Say whether a process trains: Ray names it after its class, and after the method while it works."""
    return "TrialRunner" in command or "ResourceTrainable" in command


def end_all(commands: dict[int, str]) -> None:
    """Wait until a killed driver's Ray has ended with it, then end its two agents, which look up less often."""
    assert any("raylet/raylet" in command for command in commands.values())
    agents = {pid for pid, command in commands.items() if command.startswith("ray::") and "Agent" in command}
    wait_for(lambda: not any(command_of(pid) for pid in set(commands) - agents), seconds=60)
    for pid in agents:
        if command_of(pid) == commands[pid]:
            os.kill(pid, signal.SIGKILL)
