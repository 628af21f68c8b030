"""The errors that users see, their exit codes, and the error codes of rows with their remedies.

    CarrayError            exit 1   base class; never raised itself
      SettingsError        exit 2   the user can fix it; lists all problems at once
      DataError            exit 2   one image or one table is bad
        FetchError         a row    an image could not be read from storage
        DecodeError        a row    the bytes were read and are not a usable image
        SchemaError        exit 2   a table lacks columns or has rows that are not allowed
      BundleError          exit 3   wrong version, hash or shape, or logits that differ by more than the tolerance
      StorageError         exit 4   storage refused, after retries; says how many and for how long
      BudgetError          exit 5   a limit was exceeded
      SearchError          exit 6   no trial of a search has a result; names the first cause
      ClusterError         exit 1   Ray lost processes, machines or its head, beyond what retries recover
      StoppedError         exit 130 Ctrl-C, or 143 SIGTERM, stopped the command; says which work is kept

A message is one sentence: what is wrong, the value seen, what is allowed, what to do. Only `FetchError` and
`DecodeError` become rows of a table; any other exception that is not a `CarrayError` is a bug.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

__all__ = [
    "ERROR_CODES",
    "BudgetError",
    "BundleError",
    "CarrayError",
    "ClusterError",
    "DataError",
    "DecodeError",
    "ErrorCode",
    "FetchError",
    "SchemaError",
    "SearchError",
    "SettingsError",
    "StoppedError",
    "StorageError",
]


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """A value of the column `error_code`: its status, meaning and remedy."""

    status: str
    meaning: str
    remedy: str


ERROR_CODES = {
    "not_found": ErrorCode(
        "fetch_error",
        "gone since it was listed, or a table names what is not there",
        "--retry-failed once it is back",
    ),
    "denied": ErrorCode(
        "fetch_error",
        "the store refused it, or the credentials had expired",
        "mend the rights, then --retry-failed",
    ),
    "timeout": ErrorCode("fetch_error", "no answer after every try", "--retry-failed"),
    "unavailable": ErrorCode("fetch_error", "errors or broken bodies after every try", "--retry-failed"),
    "changed": ErrorCode(
        "fetch_error",
        "the bytes are no longer those of the manifest",
        "run carray prepare again",
    ),
    "empty": ErrorCode("decode_error", "no bytes", "final; look at where the images come from"),
    "truncated": ErrorCode("decode_error", "bytes that end too early", "final; upload it again"),
    "damaged": ErrorCode(
        "decode_error",
        "the decoder or a checksum reports damaged pixels; `error` has its words",
        "final; upload it again",
    ),
    "unsupported": ErrorCode(
        "decode_error",
        "not an image in JPEG, PNG, WebP, BMP, GIF or TIFF, or a variant that is not read",
        "final; look at where the images come from",
    ),
    "too_large": ErrorCode(
        "decode_error",
        "a file above max_image_mb, or over 89 million pixels to decode; `error` says which",
        "raise max_image_mb in a new run for the first; shrink the image for the second",
    ),
    "bad_box": ErrorCode("decode_error", "its box covers no pixel of the image", "mend the table"),
    "worker_lost": ErrorCode(
        "decode_error",
        "the process died twice while it held this image alone",
        "look at the image; the rest of its shard was scored",
    ),
    "set_aside": ErrorCode(
        "ok",
        "a training image above the limit for its class (prepare --balance), so it is in no split",
        "prepare again with a higher --balance, if it is to be trained on",
    ),
}
"""By the value of the column `error_code` in manifests, predictions and evaluations."""


class CarrayError(Exception):
    """Base of every error whose message is meant for a user."""

    exit_code = 1


class SettingsError(CarrayError):
    """All problems found in a command's settings, one sentence each."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(CarrayError):
    """One image or one table is bad."""

    exit_code = 2


class _ImageError(DataError):
    """An error that becomes a row: `code`, a key of ERROR_CODES, goes into its column `error_code`."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))


class FetchError(_ImageError):
    """An image could not be read from storage."""


class DecodeError(_ImageError):
    """Bytes are not a usable image."""


class SchemaError(DataError):
    """A table lacks columns or has rows that make it unusable."""


class BundleError(CarrayError):
    """A bundle must not be used."""

    exit_code = 3


class StorageError(CarrayError):
    """Storage refused, after retries."""

    exit_code = 4


class BudgetError(CarrayError):
    """A limit was exceeded; the message has the counts."""

    exit_code = 5


class SearchError(CarrayError):
    """A search has no result; the message has the first trial's reason."""

    exit_code = 6


class ClusterError(CarrayError):
    """Ray lost processes or machines; the same command can be run again."""


class StoppedError(CarrayError):
    """A signal stopped the command; the message says which work is kept."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        self.exit_code = 128 + number
        self.at = time.monotonic()
        super().__init__(message)
