"""Holds a shard's rows while it is scored, packed, and gives them in the order of its images.

From: rows, in any order. To: one Arrow table, and the counts of its ledger entry.
Invariants: a row is held as a Python mapping (4 kB) only until a thousand have come, then as Arrow (0.4 kB), so that a
worker's memory hardly knows how long its shards are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from carray.core.tables import table_from_rows

__all__ = ["ShardRows"]

_PACK_ROWS = 1_000


class ShardRows:
    """Is what is known of a shard's images so far."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._loose: dict[int, Mapping[str, Any]] = {}
        self._packed: list[pa.Table] = []
        self._examples: dict[str, tuple[int, str]] = {}
        self.places: set[int] = set()
        """Places of the images that have a row."""
        self.statuses: Counter[str] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.size_bytes = 0
        """Of the originals of all rows, as far as they were read."""

    def update(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Add rows, by their images' places in the shard, each once."""
        for place, row in rows.items():
            self.places.add(place)
            self.statuses[row["status"]] += 1
            self.size_bytes += row.get("size_bytes") or 0
            if code := row.get("error_code"):
                self.error_codes[code] += 1
                self._examples[code] = min((place, row["uri"]), self._examples.get(code, (place, row["uri"])))
        self._loose.update(rows)
        if len(self._loose) >= _PACK_ROWS:
            self._pack()

    @property
    def examples(self) -> dict[str, str]:
        """Give the first uri of each error code."""
        return {code: uri for code, (_, uri) in self._examples.items()}

    def table(self) -> pa.Table:
        """Give all rows in the order of their places."""
        self._pack()
        return pa.concat_tables(self._packed).sort_by("place").drop_columns("place")

    def _pack(self) -> None:
        table = table_from_rows(self._loose.values(), self._schema)
        places = pa.array(np.fromiter(self._loose, dtype=np.int64, count=len(self._loose)))
        self._packed.append(table.append_column("place", places))
        self._loose = {}
