"""Estimates a classification: how long, how many machine-hours, how many requests, and what they cost.

From: a bundle, a source, machines and prices. To: a `ClassifyEstimate`, as JSON and as text.
Invariants: what an image costs is measured here by the job's own code; a shard's size is that of
`classify.shards.shard_images`; what a job asks of a store was counted on a real one and is compared with that by
tests/preflight/estimate/test_classify.py; every figure is a range, whose meaning is said.
Cost: listing the source, one GET for each image of the probe, and half a minute.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from carray.bundle.bundle_folder import open_bundle
from carray.classify.ledger import RunRecord
from carray.classify.plan import describe_run
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.read_images import NOTE_IMAGES
from carray.classify.shards import shard_images
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3
from carray.preflight.doctor.machine import usable_cores
from carray.preflight.estimate.classify_probe import Cost, Sample, draw_images, measure_scoring
from carray.preflight.estimate.ranges import (
    MACHINE_FACTOR,
    START_SECONDS,
    Range,
    busy_text,
    money_text,
    number_text,
    seconds_text,
    table_row,
    table_text,
    whole,
)

__all__ = ["ClassifyEstimate", "Machines", "Prices", "Probe", "Requests", "classify_text", "estimate_classify"]

LISTING_KEYS_A_SECOND = 230_000
"""What one driver lists at most (results/list.csv); scoring goes on meanwhile."""
_IMAGES_A_WORKER = 200
_MOST_WORKERS = 16
_SHORT_SECONDS = 10.0
"""Of listing, where the count is known: long enough for images of many places."""
KEYS_A_PAGE = 1_000
PREFIX_GETS_A_SECOND = 5_500
"""What S3 answers under one prefix before it says SlowDown."""

_PUTS_A_SHARD = 3
"""Its list of images, its Parquet file and its ledger entry; notes of what is in hand come on top."""
_GETS_A_SHARD = (6, 8)
"""At least, at most: its list of images, a look for a note; in the end its file's footer and its entry, each with a
HEAD."""
_GETS_A_WORKER = 10
"""bundle.json, the network and the probe images, each with a HEAD."""
_FEW = 30
"""Of the driver: the run's records, the lease, the end."""
_RETRIED = 0.01
"""Share of requests that a busy store makes a job ask again."""
_MEANING = f"""\
Times: from what the processor was busy here to what passed here, of the middle 80 % of what other samples would
show, moved outwards by a factor of {MACHINE_FACTOR:g} for other machines of this one's kind, with the start of Ray and
its workers. Machines of another kind, their booting, and those that leave in between are not in it.
Requests: by the job's own rules, with up to 1 % asked again."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Says what requests cost, for 1,000 of them, and a machine for an hour; in any one currency."""

    list_requests: float = 0.005
    gets: float = 0.0004
    puts: float = 0.005
    machine_hour: float | None = None
    """None where nobody said it: machines are not priced then."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Counts requests by what they cost."""

    lists: int
    gets: int
    """HEADs among them, which cost as much."""
    puts: int

    def money(self, prices: Prices) -> float:
        """Give their price."""
        each = ((self.lists, prices.list_requests), (self.gets, prices.gets), (self.puts, prices.puts))
        return sum(count / 1_000 * price for count, price in each)


@dataclass(frozen=True, slots=True)
class Machines:
    """Says what a job is to run on."""

    count: int = 1
    cores: int = 1
    """Of each, as its maker counts them."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Says how much is measured."""

    images: int | None = None
    """Scored here; 200 for each process when None."""
    workers: int | None = None
    """Processes that score them; as many as this machine has cores, when None."""
    total_images: int | None = None
    """Of the source, where that is known, so that the listing may end early."""
    listing_seconds: float = 120.0
    """After which the listing is stopped."""


@dataclass(frozen=True)
class ClassifyEstimate:
    """Says what a classification will take."""

    source: str
    runtime: str
    machines: Machines
    workers: int
    shards: int
    images: int
    listed: bool
    """Whether all of the source was listed, or its count given."""
    cost: Cost
    seconds: Range
    """Of the whole job, from the command's start."""
    requests: tuple[Requests, Requests]
    """At least, at most."""
    request_money: Range
    machine_money: Range | None
    throttled: bool
    """Whether the machines could read faster than S3 answers under one prefix."""

    @property
    def machine_hours(self) -> Range:
        """Give the hours of all machines together."""
        return self.seconds * (self.machines.count / 3600)

    @property
    def core_hours(self) -> Range:
        """Give the hours of all their cores together."""
        return self.machine_hours * self.machines.cores

    def as_json(self) -> dict[str, Any]:
        """Give it in plain values; ranges are [from, to]."""
        least, most = self.requests
        return {
            "source": self.source,
            "images": self.images,
            "listed_completely": self.listed,
            "runtime": self.runtime,
            "machines": self.machines.count,
            "cores": self.machines.cores,
            "workers": self.workers,
            "shards": self.shards,
            "probed_images": self.cost.images,
            "probe_error_codes": self.cost.error_codes,
            "images_per_second_per_core": Range(1 / self.cost.seconds.high, 1 / self.cost.seconds.low).rounded(),
            "seconds": self.seconds.rounded(),
            "machine_hours": self.machine_hours.rounded(),
            "core_hours": self.core_hours.rounded(),
            "list_requests": [least.lists, most.lists],
            "get_requests": [least.gets, most.gets],
            "put_requests": [least.puts, most.puts],
            "request_money": self.request_money.rounded(),
            "machine_money": self.machine_money.rounded() if self.machine_money else None,
        }


def estimate_classify(
    bundle: str,
    source: str,
    *,
    settings: ClassifySettings,
    machines: Machines,
    prices: Prices,
    probe: Probe | None = None,
    out: str | None = None,
) -> ClassifyEstimate:
    """Estimate a job from some of its own images.

    Args:
        bundle: To score with.
        source: To be scored: folder, prefix, table or inventory.
        settings: Of the job, which is to be a whole run: without `since` and `retry_failed`.
        machines: That it is to run on.
        prices: Of requests, and of a machine if that is to be priced.
        probe: How much is measured here.
        out: Where its results are to go, whose requests count where that is S3; beside the images when None.

    Raises:
        SettingsError: no image, no such runtime, a GPU, or a job that is part of a run.
        BundleError: the bundle is damaged, or computes other logits on this machine.
        SchemaError: a table of images cannot be read as one.
        StorageError: the source cannot be listed.
        BudgetError: a process that was to measure died.
    """
    if settings.device == "cuda":
        raise SettingsError("device is 'cuda', but an estimate measures on cpu; set device to cpu or auto.")
    if settings.since or settings.retry_failed:
        named = "since" if settings.since else "retry_failed"
        raise SettingsError(f"{named} is set, but an estimate is of a whole run; leave it out, and take its share.")
    probe, threads = probe or Probe(), settings.threads or 1
    bundle, source = (absolute(uri).rstrip("/") or "/" for uri in (bundle, source))
    settings = settings.model_copy(update={"device": "cpu", "threads": threads})
    info = open_bundle(bundle)
    run = describe_run(info, bundle, source, settings)
    processes = probe.workers or max(1, min(_MOST_WORKERS, int(usable_cores()) // threads))
    with tempfile.TemporaryDirectory(prefix="carray-estimate-") as scratch:
        sample = draw_images(
            scratch,
            run,
            settings,
            uses_boxes=info.uses_boxes,
            count=probe.images or _IMAGES_A_WORKER * processes,
            seconds=min(probe.listing_seconds, _SHORT_SECONDS) if probe.total_images else probe.listing_seconds,
        )
    say(f"estimate: scoring {len(sample.chosen):,} images in {processes} processes, runtime {run.runtime}")
    cost = measure_scoring(bundle, run, settings, sample.chosen, workers=processes)
    out = absolute(out) if out else None
    return _scale(run, settings, sample, cost, machines, prices, out=out, total=probe.total_images)


def _scale(
    run: RunRecord,
    settings: ClassifySettings,
    sample: Sample,
    cost: Cost,
    machines: Machines,
    prices: Prices,
    *,
    out: str | None,
    total: int | None,
) -> ClassifyEstimate:
    """Turn what an image costs here into what all of them cost there."""
    images = total or sample.images
    workers = max(1, machines.count * (machines.cores // (settings.threads or 1)))
    workers = min(workers, settings.workers or workers)
    busiest, shards = longest_share(images, settings, workers)
    scoring = (cost.seconds * float(busiest)).widened(MACHINE_FACTOR)
    listing = images / LISTING_KEYS_A_SECOND
    throttled = sample.on_s3 and images / scoring.low > PREFIX_GETS_A_SECOND
    slowest = images / PREFIX_GETS_A_SECOND if throttled else 0.0
    seconds = START_SECONDS + cost.open_seconds + scoring.at_least(listing, max(listing, slowest))
    listed = is_s3(run.source) and not run.source.endswith((".parquet", ".csv", ".tsv", "/manifest.json"))
    requests = count_requests(
        images,
        max(images, sample.keys),
        settings,
        workers=min(workers, shards),
        listed=listed,
        out_on_s3=is_s3(out) if out else sample.on_s3,
        images_on_s3=sample.on_s3,
    )
    hours = seconds * (machines.count / 3600)
    return ClassifyEstimate(
        source=run.source,
        runtime=run.runtime,
        machines=machines,
        workers=min(workers, shards),
        shards=shards,
        images=images,
        listed=sample.complete or total is not None,
        cost=cost,
        seconds=seconds,
        requests=requests,
        request_money=Range(requests[0].money(prices), requests[1].money(prices)),
        machine_money=hours * prices.machine_hour if prices.machine_hour is not None else None,
        throttled=throttled,
    )


def shard_sizes(images: int, settings: ClassifySettings) -> Iterator[int]:
    """Give the sizes of a run's shards, in images, in the order in which they are cut."""
    cut = 0
    while cut < images:
        size = min(shard_images(cut, settings), images - cut)
        yield size
        cut += size


def longest_share(images: int, settings: ClassifySettings, workers: int) -> tuple[int, int]:
    """Deal shards to workers, each to the one that is free first; gives the images of the busiest, and all shards."""
    busy = [0] * max(1, workers)
    shards = 0
    for size in shard_sizes(images, settings):
        heapq.heappush(busy, heapq.heappop(busy) + size)
        shards += 1
    return max(busy), shards


def count_requests(
    images: int,
    keys: int,
    settings: ClassifySettings,
    *,
    workers: int,
    listed: bool,
    out_on_s3: bool,
    images_on_s3: bool,
) -> tuple[Requests, Requests]:
    """Count a job's requests: (at least, at most).

    Args:
        images: To be scored.
        keys: To be listed, images or not.
        settings: Of the job.
        workers: Scoring processes.
        listed: Whether the source is a bucket that is listed, and no table.
        out_on_s3: Whether the results go to a bucket.
        images_on_s3: Whether the images lie in one.
    """
    sizes = list(shard_sizes(images, settings))
    notes, shards = sum(math.ceil(size / NOTE_IMAGES) for size in sizes), len(sizes) if out_on_s3 else 0
    pages = math.ceil(keys / KEYS_A_PAGE) if listed else 0
    lists = pages + shards // KEYS_A_PAGE
    notes = notes if out_on_s3 else 0
    gets, puts = images if images_on_s3 else 0, notes + shards * _PUTS_A_SHARD
    least = Requests(lists=lists, gets=gets + shards * _GETS_A_SHARD[0], puts=puts)
    if not (images_on_s3 or out_on_s3):
        return least, least
    few = _FEW if out_on_s3 else 0
    # A range of keys that is cut in two costs a few requests of one key, and each thread may end on a page of few.
    cuts = settings.listing_threads * 8 if pages > settings.listing_threads else 2
    again = 1 + _RETRIED
    most = Requests(
        lists=math.ceil(lists * again) + cuts + few,
        gets=math.ceil((gets + shards * _GETS_A_SHARD[1]) * again) + workers * _GETS_A_WORKER + few,
        puts=math.ceil(puts * again) + workers + few,
    )
    return least, most


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
        table_row("wall-clock", found.seconds, seconds_text, f"{machines.count} {unit} of {machines.cores} cores"),
        table_row("machine-hours", found.machine_hours, number_text),
        table_row("core-hours", found.core_hours, number_text),
        table_row("LIST requests", whole(least.lists, most.lists), _count),
        table_row(
            "GET requests", whole(least.gets, most.gets), _count, "one an image; HEADs of a job's records among them"
        ),
        table_row("PUT requests", whole(least.puts, most.puts), _count),
        table_row("money, requests", found.request_money, money_text),
    ]
    if found.machine_money is None:
        rows.append(("money, machines", "", "", "not priced: --price-per-machine-hour"))
    else:
        rows.append(table_row("money, machines", found.machine_money, money_text))
    return rows


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _meaning(found: ClassifyEstimate) -> list[str]:
    lines = [_MEANING]
    lines += busy_text(found.cost.load)
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
