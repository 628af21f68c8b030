"""Finds and deletes what processes that died left half-made: files and folders whose lock nobody holds.

Invariants: whoever makes something holds its lock while he does; the kernel frees the lock of a process that dies,
however it dies, so nothing is deleted that a living one still makes.
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
    """Delete those files and folders whose lock, which `lock_of` names, is free; another user's stay."""
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
    """Give a temporary folder that is deleted at the end, or by the next one where the process is killed.

    Args:
        prefix: Of its name, `carray-` and something.

    Raises:
        OSError: the temporary folder is full or cannot be written.
    """
    from filelock import FileLock

    remove_scratch()
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder, FileLock(os.path.join(folder, _LOCK)) as lock:
            if os.path.exists(lock.lock_file):  # else another took it for a leftover before the lock was held
                yield folder
                return
