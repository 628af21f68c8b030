"""Keeps a run to one driver at a time, by a note that the driver renews.

    RUN/driver.json            of carray tune and carray train: who works here, and when it last said so
    OUT/_carray/driver.json    the same of carray classify

A search needs this; the files of a classification are right without it (classify.ledger). A driver that finds
another's note waits until the note stands still for PATIENCE_SECONDS, then takes over; one whose note was taken stops.
A note of a process of this very machine that is gone is taken at once. The note is created, renewed and taken over by
conditional writes, so of two drivers one has it. Where the store ignores or refuses those, the last to write has it,
and each reads it back after SETTLE_SECONDS to see who that was.
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
from carray.core.store.conditional import create, keeps_conditions, read_version, replace
from carray.core.store.files import delete, join, json_bytes, parse_json, write_bytes

__all__ = ["Lease", "hold_run", "process_space"]

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0
SETTLE_SECONDS = 1.0
"""How long after its first write a driver looks whether another wrote at the same moment, without such writes."""


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
        self._etag: str | None = None
        """Of the note as this driver wrote it last."""
        self._conditional = True
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, etag: str | None) -> None:
        """Take the run over from the note of that etag, or where there is none.

        Raises:
            BudgetError: another driver took it in the same moment.
            StorageError: the folder cannot be read or written.
        """
        self._etag = etag
        self._write()
        if not self._lost and not keeps_conditions(self._uri, self._note()):
            self._conditional = False
            say(
                f"warning: {self._uri} is in a place without conditional writes (If-None-Match), so a second driver "
                f"may be noticed late; start only one carray {self._what} at a time there."
            )
            self._etag = None
            time.sleep(SETTLE_SECONDS)
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
        """Stop renewing the note, and delete it if it is still this driver's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(StorageError):  # what ended the job says more, and whoever comes next waits a little
            self._look()
            if not self._lost:
                delete(self._uri)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and not self._lost:
            try:
                self._write()
            except StorageError as err:  # an outage: whoever takes over meanwhile is seen at the next beat
                say(f"{self._what}: the note {self._uri} could not be renewed ({err})")

    def _look(self) -> None:
        found = _read(self._uri)
        if found is not None and found[0].token != self.token:
            name = _name(found[0])
            self._lost = f"{self._out} was taken over by {name}, so this one stopped; let that one finish."

    def _write(self) -> None:
        """Write the note, unless another driver's is there."""
        if not self._conditional:
            self._look()
            if not self._lost:
                write_bytes(self._uri, self._note())
            return
        data = self._note()
        etag = replace(self._uri, data, self._etag) if self._etag else create(self._uri, data)
        if etag is None:
            self._look()
            etag = None if self._lost else create(self._uri, data)  # somebody deleted it
        self._etag = etag

    def _note(self) -> bytes:
        now = datetime.now(UTC).isoformat()
        note = _Note(token=self.token, host=socket.gethostname(), pid=os.getpid(), space=process_space(), at=now)
        return json_bytes(note.model_dump())


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
    left = _wait_for_silence(out, uri, what)
    lease = Lease(out, uri, what=what)
    try:
        lease.take(left)  # in here, since a stop may come as soon as the note is written
        yield lease
    finally:
        lease.give_back()


def _wait_for_silence(out: str, uri: str, what: str) -> str | None:
    """Wait until no other driver renews the note; gives the etag of the note that is left."""
    found = _read(uri)
    if found is None or _is_gone(found[0]):
        return found and found[1]
    say(f"{what}: waiting {PATIENCE_SECONDS:.0f} s to see whether {_name(found[0])} still works on {out}")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        now = _read(uri)
        if now is None or _is_gone(now[0]):
            return now and now[1]
        if now[0] != found[0]:
            raise BudgetError(
                f"{_name(now[0])} is working on {out}, and only one driver can; wait until it has finished, or stop it."
            )
    return found[1]


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


def _read(uri: str) -> tuple[_Note, str] | None:
    found = read_version(uri)
    return (read_record(_Note, uri, found=parse_json(found[0], uri)), found[1]) if found else None
