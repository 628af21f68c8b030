"""Reports a job's progress to Prometheus, through Ray's exporter on each node (`--metrics-export-port`).

The exporter puts `ray_` before a name; a private Ray has none. A failure here is a warning and never ends a job. Labels
are few and never keys or classes: `out`, the job's folder, and those of METRICS.
"""

from __future__ import annotations

from typing import Any

from carray.core.progress import say

__all__ = ["METRICS", "Meter"]

_SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "carray_classify_images_total": ("counter", "Images that have their row, by status, by this driver", ("status",)),
    "carray_classify_failures_total": ("counter", "Rows that failed, by error code, by this driver", ("code",)),
    "carray_classify_read_bytes_total": ("counter", "Bytes of originals read, by this driver", ()),
    "carray_classify_shard_seconds": ("histogram", "Seconds that a shard took its worker", ()),
    "carray_classify_shards_listed": ("gauge", "Shards that the listing has come to", ()),
    "carray_classify_shards_finished": ("gauge", "Shards that are finished, by earlier starts too", ()),
    "carray_classify_worker_peak_memory_bytes": ("gauge", "Most resident memory of any scoring process", ()),
    "carray_tune_epochs_total": ("counter", "Logged epochs, by family and decision", ("family", "decision")),
    "carray_tune_device_seconds_total": ("counter", "Seconds of logged epochs, times the devices of each", ("family",)),
    "carray_tune_epoch_seconds": ("histogram", "Seconds that an epoch took", ("family",)),
    "carray_tune_trials": ("gauge", "Trials by state: how they ended, running or waiting", ("state",)),
    "carray_tune_best_val_top1_ratio": ("gauge", "Best validation top-1 of any trial so far, 0..1", ()),
}
"""Kind, description and labels of each metric."""


class Meter:
    """The metrics of one job; a record costs microseconds."""

    def __init__(self, out: str, *, private: bool) -> None:
        """Record for the job that writes the folder `out`, unless its Ray is a private one."""
        self._out, self._on = out, not private
        self._made: dict[str, Any] = {}

    def record(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter (0 adds nothing), set a gauge, or add a value to a histogram."""
        if not self._on:
            return
        try:
            kind, _, _ = METRICS[name]
            if kind == "counter" and value <= 0:
                return
            action = {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind]
            getattr(self._metric(name), action)(float(value), tags={"out": self._out, **labels})
        except Exception as err:  # another version of Ray, or no agent: the job goes on
            self._on = False
            say(f"warning: metrics are given up ({type(err).__name__}: {err})")

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics

            kind, description, labels = METRICS[name]
            given: dict[str, Any] = {"description": description, "tag_keys": ("out", *labels)}
            if kind == "histogram":
                self._made[name] = metrics.Histogram(name, boundaries=_SECONDS, **given)
            else:
                self._made[name] = {"counter": metrics.Counter, "gauge": metrics.Gauge}[kind](name, **given)
        return self._made[name]
