"""Stops a job whose input is rotten, before a night is spent on it.

From: the ledger entries of finished shards. To: a sentence with the commonest kinds of failure, and an image of each.
"""

from __future__ import annotations

from collections import Counter

from carray.classify.ledger import LedgerEntry
from carray.core.errors import BudgetError

__all__ = ["FailureWatch"]

FEWEST_IMAGES = 200
"""Below so many rows a fraction says too little to stop for."""
_KINDS = 3


class FailureWatch:
    """Adds up failures, and stops the job once their fraction passes the limit; without a limit it only counts."""

    def __init__(self, max_failed_fraction: float | None) -> None:
        self._limit = max_failed_fraction
        self._rows = 0
        self._codes: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def see(self, entry: LedgerEntry) -> None:
        """Count one finished shard."""
        self._rows += entry.rows
        self._codes.update(entry.error_codes)
        for code, uri in entry.examples.items():
            self._examples.setdefault(code, uri)

    def check(self, *, finished: bool = False) -> None:
        """Compare with the limit, as soon as there are rows enough to judge by, or when all are there.

        Raises:
            BudgetError: more failed than is allowed.
        """
        failed = self._codes.total()
        if self._limit is None or not failed or failed <= self._limit * self._rows:
            return
        if self._rows >= FEWEST_IMAGES or finished:
            raise BudgetError(
                f"{failed:,} of {self._rows:,} images failed ({failed / self._rows:.1%}, at most {self._limit:.1%} is "
                f"allowed by max_failed_fraction): {self._kinds()}; mend the input or allow more, and run the command "
                "again: what is scored stays."
            )

    def _kinds(self) -> str:
        kinds = [
            f"{code} {count:,} (as {self._examples[code]!r})" if code in self._examples else f"{code} {count:,}"
            for code, count in self._codes.most_common(_KINDS)
        ]
        return ", ".join(kinds)
