"""Lays an estimate of a search out for a terminal.

From: a `TuneEstimate`. To: what was measured, a table of ranges, and what they mean.
"""

from __future__ import annotations

from carray.estimates.ranges import MACHINE_FACTOR, Range, money_text, number_text, seconds_text, table_text
from carray.estimates.tune import TuneEstimate

__all__ = ["tune_text"]

_MEANING = """\
Times: from what the processor was busy here to what passed here, over the middle 80 % of made-up searches, in which
nobody knows beforehand which trial is good; moved outwards by a factor of {factor:g} for other machines of this one's
kind. Machines of another kind, their booting, and those that leave in between are not in it, nor a cache that is full
already."""


def tune_text(found: TuneEstimate) -> str:
    """Lay an estimate out for a terminal: what was seen, a table of ranges, what they mean."""
    return "\n".join([*_seen(found), "", table_text(_rows(found)), "", *_meaning(found)])


def _seen(found: TuneEstimate) -> list[str]:
    measured = len(found.cost.nets)
    each = "each" if measured == found.networks else f"{measured} of them"
    return [
        f"{found.manifest}: {found.images:,} images to train and validate on; {found.trials:,} trials of up to "
        f"{found.epochs_each} epochs,",
        f"{found.networks} different networks, {each} trained here on a few images; {found.share.at_once:,} trials at "
        f"once, on {found.share.text()} each.",
    ]


def _rows(found: TuneEstimate) -> list[tuple[str, str, str, str]]:
    full, cluster = found.trials * found.epochs_each, found.cluster
    machines = f"{cluster.machines} machine{'s' if cluster.machines > 1 else ''} of {cluster.cores} cores"
    machines += f" and {cluster.gpus} GPUs" if cluster.gpus else ""
    cut = f"; {found.ended_by} ends the search" if found.ended_by else ""
    rows = [
        _row("epochs, of all trials", found.epochs, f"{full:,} if nobody were stopped ({found.scheduler})"),
        _seconds("decoding, once a machine", found.decode_seconds),
        _seconds("rung 0", found.rung0_seconds),
        _seconds("trials", found.search_seconds),
        _seconds("refit", found.refit_seconds),
        _seconds("wall-clock", found.seconds, f"{machines}, with start and packing{cut}"),
        _row("machine-hours", found.machine_hours),
        _row("GPU-hours" if cluster.gpus else "core-hours", found.device_hours),
    ]
    if found.get_requests:
        rows.append(("GET requests", "", f"{found.get_requests:,}", "each image, once a machine"))
    if found.machine_money is None:
        return [*rows, ("money, machines", "", "", "not priced: --price-per-machine-hour")]
    money = found.machine_money
    return [*rows, ("money, machines", money_text(money.low), money_text(money.high), "")]


def _seconds(what: str, value: Range, note: str = "") -> tuple[str, str, str, str]:
    return (what, seconds_text(value.low), seconds_text(value.high), note) if value.high else (what, "", "", "none")


def _row(what: str, value: Range, note: str = "") -> tuple[str, str, str, str]:
    return what, number_text(value.low), number_text(value.high), note


def _meaning(found: TuneEstimate) -> list[str]:
    lines = [_MEANING.format(factor=MACHINE_FACTOR)]
    if len(found.cost.nets) < found.networks:
        lines.append(
            "A network that was not measured may cost whatever its family's measured ones do: --networks measures more."
        )
    if found.cost.load > 1.5:
        lines.append(
            f"Other work was busy here (a load of {found.cost.load:.1f} for each core), of which the upper ends are; "
            "ask again when it is calm."
        )
    return lines
