"""Deletes unfinished files and folders of processes that died: those whose lock is free.

A process holds the lock of what it makes; the kernel frees it when the process dies.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["remove_leftovers", "remove_scratch", "scratch_folder"]

_LOCK = ".carray-lock"


def remove_leftovers(paths: Iterable[Path], lock_of: Callable[[Path], Path]) -> None:
    """Delete the files and folders whose lock, by `lock_of`, is free; other users' stay."""
    from filelock import FileLock, Timeout

    for path in paths:
        with suppress(Timeout, OSError), FileLock(lock_of(path), timeout=0):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_scratch() -> None:
    """Delete the scratch folders of processes that died."""
    there = [path for path in Path(tempfile.gettempdir()).glob("carray-*") if (path / _LOCK).exists()]
    remove_leftovers(there, lambda path: path / _LOCK)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[str]:
    """Make a temporary folder, deleted at the end, or by the next call if the process is killed.

    Args:
        prefix: The begin of its name, such as `carray-query-`.

    Raises:
        OSError: the temporary folder is full or cannot be written.
    """
    from filelock import FileLock

    remove_scratch()
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder, FileLock(os.path.join(folder, _LOCK)) as lock:
            if os.path.exists(lock.lock_file):  # else another process deleted it before it was locked
                yield folder
                return
