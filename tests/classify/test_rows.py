"""Rows come in any order and leave in that of their images, however many there are."""

from __future__ import annotations

import numpy as np
import pytest

from carray.classify.predictions_folder import PREDICTION_SCHEMA
from carray.classify.score_shard import ShardRows


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 2500])
def test_in_the_order_of_places(count):
    rows = ShardRows(PREDICTION_SCHEMA)
    order = np.random.default_rng(0).permutation(count).tolist()
    for start in range(0, count, 7):
        rows.update({place: {"uri": f"{place}", "status": "ok"} for place in order[start : start + 7]})
    table = rows.table()
    assert table["uri"].to_pylist() == [str(place) for place in range(count)]
    assert table.schema.equals(PREDICTION_SCHEMA)
    assert rows.indices == set(range(count))
    assert rows.statuses["ok"] == count


def test_what_failed_is_counted_with_the_first_example():
    rows = ShardRows(PREDICTION_SCHEMA)
    for place, code in [(5, "denied"), (2, "denied"), (9, "empty"), (3, None)]:
        status = "fetch_error" if code else "ok"
        rows.update({place: {"uri": f"/{place}", "status": status, "error_code": code}})
    assert rows.error_codes == {"denied": 2, "empty": 1}
    assert rows.examples == {"denied": "/2", "empty": "/9"}
    assert rows.table()["error_code"].to_pylist() == ["denied", None, "denied", "empty"]
