"""Notes which images a worker has in hand, so that the next one finds out which of them kills.

One small JSON file a shard in hand, `OUT/_carray/attempts/SHARD.json`. Notes decide nothing about rows that are
written: they only name suspects. Each is written under a condition (core.store.conditional), so that a worker that was
given up and comes back does not overwrite its successor's.
"""

from __future__ import annotations

from pydantic import Field

from carray.classify.predictions_folder import part_name, record_place
from carray.core.errors import BudgetError
from carray.core.settings import Settings, parse_settings
from carray.core.store.conditional import create, read_version, replace
from carray.core.store.files import delete, json_bytes, list_files, parse_json, read_json

__all__ = ["Attempt", "AttemptFile", "forget_attempts"]

DEATHS_ALLOWED = 50
"""Workers that one shard may lose: two for each of 25 deadly images; beyond that the machine is at fault."""


class Attempt(Settings):
    """What a worker has in hand."""

    shard: int
    pid: int
    worker: str = ""
    """Tells this worker from every other."""
    machine: str = ""
    """Where the worker runs, as Ray names it."""
    driver: str = ""
    """The token of the driver (lease.Lease) that started the worker."""
    images: list[int]
    """Indices in the shard of the images in hand."""
    alone: bool = False
    """Whether it is one image, read alone because it was in hand when a worker died."""
    suspects: list[int] = Field(default_factory=list)
    """Images that were in hand at some death: each is read alone from then on."""
    lost: list[int] = Field(default_factory=list)
    """Images that killed a worker while in hand alone; they become rows without being read."""
    deaths: int = 0

    def after_death(self, driver: str, *, machine_lost: bool = False) -> Attempt:
        """Give the note that the next worker, started by `driver`, begins with.

        Where the driver died too, or the machine, no image is to blame: those in hand become suspects, and no more.

        Raises:
            BudgetError: the shard has lost more workers than bad images can explain.
        """
        if self.deaths >= DEATHS_ALLOWED:
            raise BudgetError(
                f"{part_name(self.shard)} lost its worker {self.deaths + 1} times (at most {DEATHS_ALLOWED} is "
                "allowed), more than bad images explain; look at the machine's memory and Ray's logs, then run again."
            )
        own = driver == self.driver
        guilty = self.images if own and self.alone and not machine_lost else ()
        return self.model_copy(
            update={
                "driver": driver,
                "images": [],
                "alone": False,
                "lost": sorted({*self.lost, *guilty}),
                "suspects": sorted({*self.suspects, *self.images}),
                "deaths": self.deaths + own,
            }
        )


class AttemptFile:
    """A shard's note as one worker reads and writes it, until another worker has written it."""

    def __init__(self, out: str, shard: int) -> None:
        self._uri = record_place(out, "attempts", f"{shard:06d}.json")
        self._etag: str | None = None
        self._is_ours = True

    def read(self) -> Attempt | None:
        """Read what the worker before had in hand; None when it ended in order.

        Raises:
            StorageError: the note cannot be read.
            SettingsError: it is of another version of carray.
        """
        found = read_version(self._uri)
        if found is None:
            return None
        self._etag = found[1]
        return parse_settings(Attempt, parse_json(found[0], self._uri))

    def write(self, attempt: Attempt) -> None:
        """Note what this worker is about to read: its death must leave the note, a power failure need not."""
        if self._is_ours:
            data = json_bytes(attempt.model_dump(mode="json"))
            if self._etag is None:
                self._etag = create(self._uri, data, durable=False)
            else:
                self._etag = replace(self._uri, data, self._etag, durable=False)
            self._is_ours = self._etag is not None

    def remove(self) -> None:
        """Remove this worker's own note: it is alive, so no image is to blame."""
        if self._is_ours and self._etag is not None:
            delete(self._uri)


def forget_attempts(out: str, *, driver: str | None = None) -> None:
    """Remove the notes of a driver's workers, or all: after a stop from outside no image is to blame."""
    for uri in list_files(record_place(out, "attempts")):
        if driver is None or read_json(uri).get("driver") == driver:
            delete(uri)
