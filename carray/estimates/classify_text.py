"""Lays an estimate of a classification out for a terminal.

From: a `ClassifyEstimate`. To: what was measured, a table of ranges, and what they mean.
"""

from __future__ import annotations

from typing import Any

from carray.estimates.classify import ClassifyEstimate
from carray.estimates.ranges import (
    MACHINE_FACTOR,
    Range,
    money_text,
    number_text,
    seconds_text,
    table_text,
    whole,
)
from carray.estimates.requests import PREFIX_GETS_A_SECOND

__all__ = ["classify_text"]

_MEANING = """\
Times: from what the processor was busy here to what passed here, of the middle 80 % of what other samples would
show, moved outwards by a factor of {factor:g} for other machines of this one's kind, with the start of Ray and its
workers. Machines of another kind, their booting, and those that leave in between are not in it.
Requests: by the job's own rules, with up to 1 % asked again."""


def classify_text(found: ClassifyEstimate) -> str:
    """Lay an estimate out for a terminal: what was seen, a table of ranges, what they mean."""
    return "\n".join([*_seen(found), "", table_text(_rows(found)), "", *_meaning(found)])


def _seen(found: ClassifyEstimate) -> list[str]:
    cost, rate = found.cost, found.cost.seconds
    failed = sum(cost.error_codes.values())
    count = f"{found.images:,} images" if found.listed else f"at least {found.images:,} images, listed so far"
    trouble = f"; {failed} of them failed ({', '.join(f'{n} {code}' for code, n in cost.error_codes.items())})"
    return [
        f"{found.source}: {count}, {cost.bytes_per_image / 1e6:.2f} MB each, in {found.shards:,} shards",
        f"Here {cost.images:,} of them were read, decoded and scored ({found.runtime}) on all cores"
        f"{trouble if failed else ''}:",
        f"an image takes {rate.low * 1e3:.2f} to {rate.high * 1e3:.2f} ms of a core, of which decoding "
        f"{cost.decode_seconds * 1e3:.2f}.",
    ]


def _rows(found: ClassifyEstimate) -> list[tuple[str, str, str, str]]:
    machines, (least, most) = found.machines, found.requests
    unit = "machine" if machines.count == 1 else "machines"
    rows = [
        _row("wall-clock", found.seconds, seconds_text, f"{machines.count} {unit} of {machines.cores} cores"),
        _row("machine-hours", found.machine_hours, number_text),
        _row("core-hours", found.core_hours, number_text),
        _row("LIST requests", whole(least.lists, most.lists), _count),
        _row("GET requests", whole(least.gets, most.gets), _count, "one an image; HEADs of a job's records among them"),
        _row("PUT requests", whole(least.puts, most.puts), _count),
        _row("money, requests", found.request_money, money_text),
    ]
    if found.machine_money is None:
        rows.append(("money, machines", "", "", "not priced: --price-per-machine-hour"))
    else:
        rows.append(_row("money, machines", found.machine_money, money_text))
    return rows


def _row(what: str, value: Range, text: Any, note: str = "") -> tuple[str, str, str, str]:
    return what, text(value.low), text(value.high), note


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _meaning(found: ClassifyEstimate) -> list[str]:
    lines = [_MEANING.format(factor=MACHINE_FACTOR)]
    if found.cost.load > 1.5:
        lines.append(
            f"Other work was busy here (a load of {found.cost.load:.1f} for each core), of which the upper ends are; "
            "ask again when it is calm."
        )
    if found.throttled:
        lines.append(
            f"So many machines read over {PREFIX_GETS_A_SECOND:,} images a second, where S3 says SlowDown under one "
            "prefix: more machines help only if the keys have several."
        )
    if not found.listed:
        lines.append("Not all was listed: for the whole, say how many images there are with --total-images.")
    if found.workers < found.machines.count * found.machines.cores:
        lines.append(
            f"Only {found.workers:,} of {found.machines.count * found.machines.cores:,} cores have work, with so many "
            "shards, or by settings."
        )
    return lines
