"""Keeps a run to one driver at a time, by a note that the driver renews.

    RUN/driver.json            of carray tune and carray train: who works here, and when it last said so
    OUT/_carray/driver.json    the same of carray classify

A search needs this; the files of a classification are right without it (classify.ledger). A driver that finds
another's note waits until the note stands still for PATIENCE_SECONDS, then takes over; one whose note was taken stops.
A note of a process of this very machine that is gone is taken at once. Where two take over in the same moment, the last
to write has it, and both read it back to see who that was.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from carray.core.errors import BudgetError, StorageError
from carray.core.exit_lines import advise
from carray.core.progress import say
from carray.core.settings import Settings, read_record
from carray.core.store.files import delete, exists, is_s3, join, write_json

__all__ = ["Lease", "hold_run", "process_space"]

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0
SETTLE_SECONDS = {"local": 0.1, "s3": 1.0}
"""How long after its first write a driver looks whether another wrote at the same moment."""


class _Note(Settings):
    """What driver.json holds."""

    token: str
    host: str
    pid: int
    space: str = ""
    """Tells boots of a machine, and containers of one host name, apart: a `pid` means nothing in another."""
    at: str


class Lease:
    """One driver's right to work on a run, kept alive by a thread until it is given back; see `hold_run`."""

    def __init__(self, out: str, uri: str, *, what: str) -> None:
        self.token = secrets.token_hex(8)
        """Tells this driver from every other, also in the notes that its workers leave."""
        self._out, self._uri, self._what = out, uri, what
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self) -> None:
        """Take the run.

        Raises:
            BudgetError: another driver took it in the same moment.
            StorageError: the folder cannot be read or written.
        """
        self._write()
        time.sleep(SETTLE_SECONDS["s3" if is_s3(self._out) else "local"])
        self._look()
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Go on only while the run is this driver's.

        Raises:
            BudgetError: another driver has taken it.
        """
        if self._lost:
            advise("")  # it is the other one that goes on
            raise BudgetError(self._lost)

    def give_back(self) -> None:
        """Stop beating, and take the note away if it is still this driver's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(StorageError):  # what ended the job says more, and whoever comes next waits a little
            self._look()
            if not self._lost:
                delete(self._uri)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._look()
                if self._lost:
                    return
                self._write()
            except StorageError as err:  # an outage: whoever takes over meanwhile is seen at the next beat
                say(f"{self._what}: the note {self._uri} could not be renewed ({err})")

    def _look(self) -> None:
        found = _read(self._uri)
        if found is not None and found.token != self.token:
            self._lost = f"{self._out} was taken over by {_name(found)}, so this one stopped; let that one finish."

    def _write(self) -> None:
        now = datetime.now(UTC).isoformat()
        note = _Note(token=self.token, host=socket.gethostname(), pid=os.getpid(), space=process_space(), at=now)
        write_json(self._uri, note.model_dump())


@contextmanager
def hold_run(out: str, uri: str | None = None, *, what: str) -> Iterator[Lease]:
    """Give the right to work on a run, once nobody else has it.

    Args:
        out: The run's folder.
        uri: Of the note; OUT/driver.json if unset.
        what: The command, for what is said.

    Raises:
        BudgetError: another driver works on it.
        StorageError: the folder cannot be read or written.
    """
    uri = uri or join(out, "driver.json")
    _wait_for_silence(out, uri, what)
    lease = Lease(out, uri, what=what)
    try:
        lease.take()  # in here, since a stop may come as soon as the note is written
        yield lease
    finally:
        lease.give_back()


def _wait_for_silence(out: str, uri: str, what: str) -> None:
    found = _read(uri)
    if found is None or _is_gone(found):
        return
    say(f"{what}: waiting {PATIENCE_SECONDS:.0f} s to see whether {_name(found)} still works on {out}")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        now = _read(uri)
        if now is None or _is_gone(now):
            return
        if now != found:
            raise BudgetError(
                f"{_name(now)} is working on {out}, and only one driver can; wait until it has finished, or stop it."
            )


def _is_gone(note: _Note) -> bool:
    here = (socket.gethostname(), process_space())
    return (note.host, note.space) == here and not Path(f"/proc/{note.pid}").exists()


def process_space() -> str:
    """Name what this process's number is one of: this boot of this machine, and its container; empty where unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _name(note: _Note) -> str:
    return f"another driver (process {note.pid} on {note.host})"


def _read(uri: str) -> _Note | None:
    try:
        return read_record(_Note, uri) if exists(uri) else None
    except StorageError:
        if exists(uri):
            raise
        return None  # given back between the two looks
