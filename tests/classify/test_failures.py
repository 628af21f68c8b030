"""When a job with many failures stops, and what it says."""

from __future__ import annotations

import pytest

from carray.classify.job import FailureWatch
from carray.classify.ledger import LedgerEntry
from carray.core.errors import BudgetError


def entry(rows, **codes):
    failed = sum(codes.values())
    return LedgerEntry(
        shard=0,
        rows=rows,
        scored=rows,
        ok=rows - failed,
        fetch_errors=failed,
        decode_errors=0,
        error_codes=codes,
        examples={code: f"s3://b/{code}.jpg" for code in codes},
        seconds=1.0,
    )


def test_names_the_commonest_kinds_with_an_example():
    watch = FailureWatch(0.5)
    watch.see(entry(300, denied=200, truncated=20, empty=3, timeout=1))
    sentence = (
        r"^224 of 300 images failed \(74\.7%, at most 50\.0% is allowed by max_failed_fraction\): denied 200 \(as "
        r"'s3://b/denied\.jpg'\), truncated 20 \(as 's3://b/truncated\.jpg'\), empty 3 \(as 's3://b/empty\.jpg'\); mend"
    )
    with pytest.raises(BudgetError, match=sentence):
        watch.check()


@pytest.mark.parametrize(
    ("limit", "rows", "failed", "finished", "stops"),
    [
        (0.5, 199, 199, False, False),
        (0.5, 199, 199, True, True),
        (0.5, 200, 101, False, True),
        (0.5, 200, 100, False, False),
        (0.0, 200, 1, False, True),
        (0.0, 200, 0, True, False),
        (None, 200, 200, True, False),
    ],
)
def test_when_it_stops(limit, rows, failed, finished, stops):
    watch = FailureWatch(limit)
    watch.see(entry(rows - rows // 2, denied=failed - failed // 2) if failed else entry(rows - rows // 2))
    watch.see(entry(rows // 2, denied=failed // 2) if failed // 2 else entry(rows // 2))
    if stops:
        with pytest.raises(BudgetError):
            watch.check(finished=finished)
    else:
        watch.check(finished=finished)
