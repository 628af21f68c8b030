"""The errors a user of carray can meet, and the exit code that each one means.

    CarrayError            exit 1   anything below; never raised itself
      SettingsError        exit 2   the user can fix it; lists ALL problems at once
      DataError            exit 2   one image or one table is bad
        FetchError         a row    an image could not be read from where it lies
        DecodeError        a row    the bytes were read and are not a usable image
        SchemaError        exit 2   a table lacks columns or holds rows it must not hold
      BundleError          exit 3   wrong version, hash or shape, or parity beyond tolerance
      StorageError         exit 4   storage refused, after retries; says how often and how long
      BudgetError          exit 5   a limit the user set, or the only honest one, was passed
      SearchError          exit 6   no trial of a search came to a result; names the first cause
      ClusterError         exit 1   Ray lost processes, machines or its head, beyond what is made good by itself
      StoppedError         exit 130 Ctrl-C, or 143 SIGTERM, ended the command in order; says what is kept

Invariants: a message is one sentence that says what is wrong, the value seen, what is allowed and what to do. Only
`FetchError` and `DecodeError` become rows of a table; anything else that is not a `CarrayError` is a bug of ours.
"""

from __future__ import annotations

import signal
import time

__all__ = [
    "BudgetError",
    "BundleError",
    "CarrayError",
    "ClusterError",
    "DataError",
    "DecodeError",
    "FetchError",
    "SchemaError",
    "SearchError",
    "SettingsError",
    "StoppedError",
    "StorageError",
]


class CarrayError(Exception):
    """Stands above every error whose message is meant for a user."""

    exit_code = 1


class SettingsError(CarrayError):
    """Says every problem found in a command's settings, one sentence each."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(CarrayError):
    """Says what is wrong with one image or one table."""

    exit_code = 2


class _ImageError(DataError):
    """Carries the short machine-readable `code` that stands in a row's `error_code` column."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))


class FetchError(_ImageError):
    """Says why an image could not be read: code not_found, denied, timeout or unavailable."""


class DecodeError(_ImageError):
    """Says why bytes are no image: code empty, truncated, damaged, unsupported, too_large, bad_box or worker_lost."""


class SchemaError(DataError):
    """Says which columns or rows make a table unusable."""


class BundleError(CarrayError):
    """Says why a bundle must not be used."""

    exit_code = 3


class StorageError(CarrayError):
    """Says what storage refused, after how many tries."""

    exit_code = 4


class BudgetError(CarrayError):
    """Says which limit was passed, with the counts."""

    exit_code = 5


class SearchError(CarrayError):
    """Says that a search has no result, and the first trial's reason."""

    exit_code = 6


class ClusterError(CarrayError):
    """Says what Ray lost: the command is as right as before, and can be run again."""


class StoppedError(CarrayError):
    """Says which signal told the command to stop, and what is kept."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        self.exit_code = 128 + number
        self.at = time.monotonic()
        super().__init__(message)
