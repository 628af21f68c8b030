"""Turns ledger entries into Ray metrics (core.ray.metrics): images, failures, bytes, shards, memory."""

from __future__ import annotations

from carray.classify.ledger import LedgerEntry
from carray.core.ray.metrics import Meter

__all__ = ["ClassifyMetrics"]


class ClassifyMetrics:
    """Counts what this driver's workers finish; a shard that is tried again counts again."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._peak_bytes = meter, 0

    def take(self, entry: LedgerEntry, *, finished: int, listed: int) -> None:
        """Count one finished shard.

        Args:
            entry: What became of it.
            finished: Shards that are finished by now.
            listed: Shards that there are, as far as is known.
        """
        statuses = {"ok": entry.ok, "fetch_error": entry.fetch_errors, "decode_error": entry.decode_errors}
        for status, images in {**statuses, "known": entry.known}.items():
            self._meter.record("carray_classify_images_total", images, status=status)
        for code, images in entry.error_codes.items():
            self._meter.record("carray_classify_failures_total", images, code=code)
        self._meter.record("carray_classify_read_bytes_total", entry.read_bytes)
        self._meter.record("carray_classify_shard_seconds", max(entry.seconds, 1e-3))
        self._peak_bytes = max(self._peak_bytes, entry.worker_peak_bytes)
        self._meter.record("carray_classify_worker_peak_memory_bytes", self._peak_bytes)
        self._meter.record("carray_classify_shards_finished", finished)
        self._meter.record("carray_classify_shards_listed", listed)
