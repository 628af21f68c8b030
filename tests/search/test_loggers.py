"""TensorBoard and MLflow: what reaches them, and that nothing they do ends a search. Both are the real packages."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest

from carray.core.errors import SettingsError
from carray.core.store.files import write_json
from carray.search import run_folder
from carray.search.loggers import EpochLoggers

HYPER = {"family": "cnn", "width": 16, "eval_size": None, "learning_rate": 0.003}

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboardX"), reason="tensorboardX is not there")
needs_mlflow = pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not there")


@pytest.fixture
def run(tmp_path: Path) -> str:
    folder = str(tmp_path / "it's a run")
    write_json(f"{folder}/search.json", {"version": run_folder.VERSION, "configurations": [HYPER, HYPER]})
    return folder


def entry(number: int, epoch: int, top1: float | None) -> dict[str, Any]:
    figures = {"val_top1": top1, "val_top5": top1, "val_loss": top1, "train_loss": top1}
    return {"number": number, "epoch": epoch, "decision": "continue", "clock_seconds": 1.5, **figures}


def feed(run: str, names: list[str]) -> None:
    loggers = EpochLoggers(run, names)
    loggers.add(entry(0, 1, 0.25))
    loggers.add(entry(1, 1, None))
    loggers.add(entry(0, 2, 0.5))
    loggers.end(0, "finished")
    loggers.end(1, "non_finite")
    loggers.end(7, "dropped")
    loggers.close()


def read_events(folder: Path) -> list[Any]:
    """Read TFRecord framing: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def scalars(events: list[Any]) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    }


@needs_tensorboard
def test_tensorboard_holds_every_epoch_the_configuration_and_the_best(run: str) -> None:
    feed(run, ["tensorboard"])
    events = read_events(Path(run, "tensorboard", "t00000"))
    seen = scalars(events)
    assert (seen["val_top1", 1], seen["val_top1", 2]) == (0.25, 0.5)
    assert seen["clock_seconds", 2] == 1.5
    assert seen["best_val_top1", 0] == 0.5
    plugins = {value.metadata.plugin_data.plugin_name for event in events for value in event.summary.value}
    assert "hparams" in plugins
    started = next(
        value.metadata.plugin_data.content
        for event in events
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    )
    assert b"learning_rate" in started and b"non_finite" not in started and b"finished" in started


@needs_tensorboard
def test_a_null_figure_reaches_nobody_and_a_resumed_trial_gets_another_file(run: str) -> None:
    feed(run, ["tensorboard"])
    folder = Path(run, "tensorboard", "t00001")
    assert {name for name, _ in scalars(read_events(folder))} == {"clock_seconds", "best_val_top1"}
    again = EpochLoggers(run, ["tensorboard"])
    again.add(entry(1, 2, 0.75))
    again.close()
    assert scalars(read_events(folder))["val_top1", 2] == 0.75


@needs_tensorboard
def test_a_failing_logger_says_so_once_and_is_given_up(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(run, "tensorboard").write_text("a file where a folder must be")
    feed(run, ["tensorboard"])
    said = capsys.readouterr().err
    assert said.count("warning: logging to tensorboard failed and is given up") == 1


def test_tensorboard_of_a_bucket_is_refused_in_a_sentence() -> None:
    with pytest.raises(SettingsError, match="tensorboard, which writes local files, but s3://bucket/run is a bucket's"):
        EpochLoggers("s3://bucket/run", ["tensorboard"])


def test_what_is_not_installed_is_refused_in_a_sentence(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    with pytest.raises(SettingsError, match="names mlflow, but it is not installed; pip install mlflow-skinny"):
        EpochLoggers(run, ["mlflow"])


@needs_mlflow
def test_mlflow_without_a_server_is_refused_in_a_sentence(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SettingsError, match="MLFLOW_TRACKING_URI is not set"):
        EpochLoggers(run, ["mlflow"])


@needs_mlflow
def test_mlflow_keeps_one_run_a_trial_over_two_starts(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    feed(run, ["mlflow"])
    again = EpochLoggers(run, ["mlflow"])
    again.add(entry(0, 3, 0.75))
    again.end(0, "finished")
    again.close()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("carray")
    found = {one.data.tags["carray.trial"]: one for one in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"t00000", "t00001"}
    first = found["t00000"]
    assert first.data.params["width"] == "16"
    assert [point.value for point in client.get_metric_history(first.info.run_id, "val_top1")] == [0.25, 0.5, 0.75]
    assert (first.info.status, found["t00001"].info.status) == ("FINISHED", "FAILED")
    assert first.data.tags["carray.status"] == "finished"


@needs_mlflow
def test_a_server_that_does_not_answer_holds_up_nobody(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # mlflow tries it again for minutes
    monkeypatch.setattr("carray.search.loggers._CLOSE_SECONDS", 0.2)
    feed(run, ["mlflow"])
    assert "warning: mlflow did not take the last" in capsys.readouterr().err
