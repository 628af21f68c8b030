"""Keeps what workers note of the shards in hand: for the next one, when one dies, and against one that was given up.

From, to: one small JSON file a shard in hand, `OUT/_carray/attempts/SHARD.json`.
Invariants: each worker that takes a shard over counts one turn up. A worker whose machine was cut off is given up by
Ray, and its shards go to others; when the machine is back, it goes on where it was, for the seconds until Ray ends it.
Before it notes or writes anything it looks whose turn it is, and stops where that is no longer its own, so that what
others have finished stays as it is. What was on its way through the network at the moment of the cut can still arrive;
those rows are whole, and the same.
"""

from __future__ import annotations

from pydantic import Field

from carray.classify.ledger import read_entry
from carray.classify.predictions_folder import part_name, record_place
from carray.core.errors import BudgetError, StorageError
from carray.core.settings import Settings, parse_settings
from carray.core.store.files import delete, exists, list_files, read_json, write_json

__all__ = [
    "Attempt",
    "Overtaken",
    "check_turn",
    "forget_attempt",
    "forget_attempts",
    "read_attempt",
    "write_attempt",
]

DEATHS_ALLOWED = 50
"""Workers that one shard may lose: two for each of 25 deadly images; beyond that the machine is at fault."""


class Overtaken(Exception):
    """Says that another worker has taken a shard over."""


class Attempt(Settings):
    """Is what a worker notes before it reads images, so that the next one knows what a dead one had in hand."""

    shard: int
    pid: int
    machine: str = ""
    """On which the worker runs, as Ray names it."""
    turn: int = 1
    """Counts the workers that have taken the shard in hand."""
    driver: str = ""
    """The token of the driver (lease.Lease) whose worker wrote this."""
    images: list[int]
    """Places in the shard of the images in hand."""
    alone: bool = False
    """Whether it is one image, read on its own because it was in hand when a worker died."""
    suspects: list[int] = Field(default_factory=list)
    """Images that were in hand at some death: each is read alone from then on."""
    lost: list[int] = Field(default_factory=list)
    """Images that killed a worker while in hand alone; they become rows without being read."""
    deaths: int = 0

    def after_death(self, driver: str, *, machine_lost: bool = False) -> Attempt:
        """Give the knowledge that the next worker, of that driver, starts from.

        Where the driver died too, or the machine, no image is to blame: those in hand are suspects, and no more.

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
                "turn": self.turn + 1,
                "images": [],
                "alone": False,
                "lost": sorted({*self.lost, *guilty}),
                "suspects": sorted({*self.suspects, *self.images}),
                "deaths": self.deaths + own,
            }
        )


def check_turn(out: str, mine: Attempt, *, rewrites: bool) -> None:
    """Go on only while a shard is this worker's.

    Args:
        out: The run's folder.
        mine: What this worker has noted of the shard.
        rewrites: Whether it is at a shard that was done before, whose ledger entry says nothing of others.

    Raises:
        Overtaken: another worker has it, or has finished it.
    """
    now = read_attempt(out, mine.shard)
    if now.turn > mine.turn if now else not rewrites and read_entry(out, mine.shard) is not None:
        raise Overtaken(part_name(mine.shard))


def read_attempt(out: str, shard: int) -> Attempt | None:
    """Read what a worker that is gone had in hand; None when it ended in order."""
    place = _attempt_place(out, shard)
    try:
        return parse_settings(Attempt, read_json(place)) if exists(place) else None
    except StorageError:
        if exists(place):
            raise
        return None  # taken away between the two looks


def write_attempt(out: str, attempt: Attempt) -> None:
    """Note what this worker is about to read: a worker's death must find it, a power failure need not."""
    write_json(_attempt_place(out, attempt.shard), attempt.model_dump(mode="json"), durable=False)


def forget_attempt(out: str, mine: Attempt) -> None:
    """Take a worker's own note away: it is alive, so no image is to blame for anything."""
    now = read_attempt(out, mine.shard)
    if now is not None and now.turn <= mine.turn:
        delete(_attempt_place(out, mine.shard))


def forget_attempts(out: str, *, driver: str | None = None) -> None:
    """Take away the notes of that driver's workers, or all: after a stop from outside no image is to blame."""
    for place in list_files(record_place(out, "attempts")):
        if driver is None or read_json(place).get("driver") == driver:
            delete(place)


def _attempt_place(out: str, shard: int) -> str:
    return record_place(out, "attempts", f"{shard:06d}.json")
