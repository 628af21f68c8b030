"""Passes each logged epoch on to TensorBoard and MLflow; needs no Ray.

Off unless search.loggers names them. Each logger has its own thread, so the search waits for neither; one that fails
says so once, is given up, and ends nothing. The run's own log stays the record.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3, join
from carray.search import run_folder

__all__ = ["EpochListener", "EpochLoggers"]

_METRICS = (
    *("val_top1", "val_top5", "val_loss", "train_loss"),
    *("learning_rate", "images_per_second", "seconds", "clock_seconds"),
)
_INSTALL = {"tensorboard": ("tensorboardX", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Module and package of each logger."""
_CLOSE_SECONDS = 30.0
"""Longest wait at the end of a search for entries that are not yet written."""
_MLFLOW_STATUS = {"failed": "FAILED", "non_finite": "FAILED"}
"""All other statuses, including a trial that was stopped early, are FINISHED."""


class EpochListener(Protocol):
    """Receives each epoch and end of a trial once it is logged."""

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take a logged epoch."""

    def end(self, number: int, status: str) -> None:
        """Take how a trial ended."""


class EpochLoggers:
    """The loggers that search.loggers names; no error of theirs ends the search."""

    def __init__(self, run: str, names: Sequence[str]) -> None:
        """Check that each is usable, and start their threads.

        Raises:
            SettingsError: one is not installed, or has no destination; one sentence each.
        """
        run = absolute(run)
        problems = [problem for name in names if (problem := _problem(name, run))]
        if problems:
            raise SettingsError(problems)
        kinds: dict[str, type[_TensorBoard | _MLflow]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow}
        self._feeds = [_Feed(name, kinds[name](run)) for name in dict.fromkeys(names)]

    def add(self, entry: Mapping[str, Any]) -> None:
        """Pass on a logged epoch of a trial, whose configuration is in search.json."""
        for feed in self._feeds:
            feed.put("add", dict(entry))

    def end(self, number: int, status: str) -> None:
        """Pass on how a trial ended."""
        for feed in self._feeds:
            feed.put("end", number, status)

    def close(self) -> None:
        """Wait, half a minute at most, until all entries are passed on."""
        for feed in self._feeds:
            feed.close(_CLOSE_SECONDS)


def _problem(name: str, run: str) -> str | None:
    module, package = _INSTALL[name]
    if importlib.util.find_spec(module) is None:
        return f"search.loggers names {name}, but it is not installed; pip install {package}, or leave it out."
    if name == "tensorboard" and is_s3(run):
        return f"search.loggers names tensorboard, which writes local files, but {run} is a bucket's; leave it out."
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        return "search.loggers names mlflow, but MLFLOW_TRACKING_URI is not set; set it to the server, or leave it out."
    return None


class _Feed:
    """Hands one logger its entries in a thread, so that the search never waits for a server."""

    def __init__(self, name: str, sink: _TensorBoard | _MLflow) -> None:
        self._name, self._sink, self._broken = name, sink, False
        self._waiting: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"log to {name}", daemon=True)
        self._thread.start()

    def put(self, action: str, *arguments: Any) -> None:
        if not self._broken:
            self._waiting.put((action, *arguments))

    def close(self, seconds: float) -> None:
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            say(f"warning: {self._name} did not take the last {self._waiting.qsize()} entries within {seconds:g} s")

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._try(*item)
        self._try("close")

    def _try(self, action: str, *arguments: Any) -> None:
        if self._broken:
            return
        try:
            getattr(self._sink, action)(*arguments)
        except Exception as err:  # no failure of a logger ends the search
            self._broken = True
            reason = " ".join(str(err).split())[:300]
            say(f"warning: logging to {self._name} failed and is given up ({type(err).__name__}: {reason})")


class _TensorBoard:
    """Writes event files, one folder a trial; a resumed trial gets another file in its folder."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._writers: dict[int, Any] = {}
        self._best: dict[int, float] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        number = entry["number"]
        if number not in self._writers:
            folder = join(self._run, "tensorboard", run_folder.trial_id(number))
            self._writers[number] = SummaryWriter(logdir=folder)
        for name, value in _metrics(entry).items():
            self._writers[number].add_scalar(name, value, entry["epoch"])
        self._best[number] = max(self._best.get(number, 0.0), entry["val_top1"] or 0.0)

    def end(self, number: int, status: str) -> None:
        writer = self._writers.pop(number, None)
        if writer is None:  # it has logged no epoch
            return
        from tensorboardX.summary import hparams

        hyper, best = _configuration(self._run, number), self._best.pop(number)
        values = {name: value if isinstance(value, int | float | str) else str(value) for name, value in hyper.items()}
        for summary in hparams({**values, "status": status}, {"best_val_top1": best}):
            writer.file_writer.add_summary(summary)
        writer.add_scalar("best_val_top1", best)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _MLflow:
    """Keeps one MLflow run a trial, found again by its tags, in the experiment MLFLOW_EXPERIMENT_NAME or carray."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._client: Any = None
        self._experiment = ""
        self._ids: dict[int, str] = {}

    def add(self, entry: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        number = entry["number"]
        if number not in self._ids:
            self._ids[number] = self._open(number)
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, entry["epoch"]) for name, value in _metrics(entry).items()]
        self._client.log_batch(self._ids[number], metrics=metrics)

    def end(self, number: int, status: str) -> None:
        if number in self._ids:
            mlflow_run = self._ids.pop(number)
            self._client.set_tag(mlflow_run, "carray.status", status)
            self._client.set_terminated(mlflow_run, status=_MLFLOW_STATUS.get(status, "FINISHED"))

    def close(self) -> None:
        """Leave running MLflow runs as they are: the search may be resumed."""

    def _open(self, number: int) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        if self._client is None:
            self._client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "carray")
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        trial = run_folder.trial_id(number)
        tags = {"carray.run": self._run.replace("'", "%27"), "carray.trial": trial}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        for mlflow_run in self._client.search_runs([self._experiment], filter_string=query, max_results=1):
            self._client.update_run(mlflow_run.info.run_id, status="RUNNING")
            return str(mlflow_run.info.run_id)
        name = f"{self._run.rstrip('/').rsplit('/', 1)[-1]}/{trial}"
        created = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        hyper = _configuration(self._run, number)
        self._client.log_batch(created, params=[Param(name, str(value)) for name, value in hyper.items()])
        return str(created)


def _configuration(run: str, number: int) -> dict[str, Any]:
    return dict(run_folder.read_search(run)["configurations"][number] or {})


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(entry[name]) for name in _METRICS if entry.get(name) is not None}
