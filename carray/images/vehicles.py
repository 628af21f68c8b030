"""Parses make, model, body and year out of class names such as 'Acura RL Sedan 2012'.

A name not of the form `make model [body] year` gives nulls only; all kinds of cab are the body `Pickup`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["BODIES", "VEHICLE_COLUMNS", "Vehicle", "parse_vehicle", "vehicle_columns"]

BODIES = {
    "convertible": "Convertible",
    "coupe": "Coupe",
    "hatchback": "Hatchback",
    "minivan": "Minivan",
    "sedan": "Sedan",
    "suv": "SUV",
    "van": "Van",
    "wagon": "Wagon",
    "club cab": "Pickup",
    "crew cab": "Pickup",
    "extended cab": "Pickup",
    "quad cab": "Pickup",
    "regular cab": "Pickup",
    "supercab": "Pickup",
    "pickup": "Pickup",
}
"""Body words in lower case, and the body that each one means."""

VEHICLE_COLUMNS = ("make", "model", "body", "year")

_TWO_WORD_MAKES = {("alfa", "romeo"), ("am", "general"), ("aston", "martin"), ("land", "rover")}
_YEAR = re.compile(r"[0-9]{4}")


@dataclass(frozen=True, slots=True)
class Vehicle:
    """The parts of a class name; all null where the name is not in the grammar."""

    make: str | None = None
    model: str | None = None
    """The name without make, body and year: `Ram Pickup 3500`, `G IPL`."""
    body: str | None = None
    year: int | None = None


def parse_vehicle(name: str) -> Vehicle:
    """Split a class name into make, model, body and year; all null where the name is not in the grammar.

    >>> parse_vehicle("Ram C/V Cargo Van Minivan 2012")
    Vehicle(make='Ram', model='C/V Cargo Van', body='Minivan', year=2012)
    """
    words = name.split()
    if len(words) < 3 or not _YEAR.fullmatch(words[-1]) or not 1900 <= int(words[-1]) <= 2100:
        return Vehicle()
    make_words = 2 if (words[0].lower(), words[1].lower()) in _TWO_WORD_MAKES else 1
    model, body = _take_body(words[make_words:-1])
    if not model:
        return Vehicle()
    return Vehicle(" ".join(words[:make_words]), " ".join(model), body, int(words[-1]))


def vehicle_columns(labels: Iterable[str | None]) -> dict[str, list[Any]]:
    """Make the columns make, model, body (text) and year (int), one value per label, null where not in the grammar."""
    parse = cache(parse_vehicle)
    vehicles = [parse(label) if isinstance(label, str) else Vehicle() for label in labels]  # NaN means missing, too
    return {column: [getattr(vehicle, column) for vehicle in vehicles] for column in VEHICLE_COLUMNS}


def _take_body(words: list[str]) -> tuple[list[str], str | None]:
    """Split the words between make and year into model and body: the last words, else the one body word inside."""
    for length in (2, 1):
        body = BODIES.get(" ".join(words[-length:]).lower())
        if body and len(words) >= length:
            return words[:-length], body
    inside = [i for i, word in enumerate(words) if i > 0 and word.lower() in BODIES]
    if len(inside) == 1:
        return words[: inside[0]] + words[inside[0] + 1 :], BODIES[words[inside[0]].lower()]
    return words, None
