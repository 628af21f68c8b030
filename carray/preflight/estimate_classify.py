"""Estimates a classification: how long, how many machine-hours, how many requests, and what they cost.

The cost of an image is measured here with the job's own code; shard sizes are those of `classify.shards.shard_images`;
requests were counted on a real store, and tests/preflight/test_estimate_classify.py compares. Every figure is a range.
Cost: listing the source, one GET for each measured image, and half a minute.
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
from carray.preflight.classify_probe import Cost, Sample, draw_images, measure_scoring
from carray.preflight.machine import usable_cores
from carray.preflight.ranges import (
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
"""Most that a driver lists (results/list.csv), while images are scored."""
_IMAGES_A_WORKER = 200
_MOST_WORKERS = 16
_SHORT_SECONDS = 10.0
"""Of listing, if the count is known: long enough for a varied sample."""
KEYS_A_PAGE = 1_000
PREFIX_GETS_A_SECOND = 5_500
"""S3's limit under one prefix."""

_PUTS_A_SHARD = 3
"""Its list of images, its Parquet file and its ledger entry; notes of what is in hand come on top."""
_GETS_A_SHARD = (4, 6)
"""At least, at most: its list of images, a look for a note; in the end its file's footer and its entry."""
_GETS_A_WORKER = 10
"""bundle.json, the network and the probe images."""
_FEW = 30
"""Of the driver: the run's records, the lease, the end."""
_RETRIED = 0.01
"""Share of requests that a busy store makes a job ask again."""
_MEANING = f"""\
Times: from processor time to wall-clock time measured here, of the middle 80 % of resamples, widened by a factor of
{MACHINE_FACTOR:g} for other machines of this type, with the start of Ray and its workers. Not included: other types of
machines, their booting, and machines that leave.
Requests: by the job's own rules, with up to 1 % retried."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of 1,000 requests and of a machine-hour, in one currency."""

    list_requests: float = 0.005
    gets: float = 0.0004
    puts: float = 0.005
    machine_hour: float | None = None
    """None: machines are not priced."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Numbers of requests, by price."""

    lists: int
    gets: int
    """Including HEADs, which cost as much."""
    puts: int

    def money(self, prices: Prices) -> float:
        """Compute their price."""
        each = ((self.lists, prices.list_requests), (self.gets, prices.gets), (self.puts, prices.puts))
        return sum(count / 1_000 * price for count, price in each)


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a job."""

    count: int = 1
    cores: int = 1
    """Of each machine."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How much is measured."""

    images: int | None = None
    """Images to score here; None: 200 for each process."""
    workers: int | None = None
    """Processes that score them; None: one for each core."""
    total_images: int | None = None
    """Images of the source, if known: the listing then ends early."""
    listing_seconds: float = 120.0
    """Time limit of the listing."""


@dataclass(frozen=True)
class ClassifyEstimate:
    """What a classification will take."""

    source: str
    runtime: str
    machines: Machines
    workers: int
    shards: int
    images: int
    listed: bool
    """Whether the whole source was listed, or its count given."""
    cost: Cost
    seconds: Range
    """Of the whole job, from the start of the command."""
    requests: tuple[Requests, Requests]
    """At least, at most."""
    request_money: Range
    machine_money: Range | None
    throttled: bool
    """Whether the machines could exceed S3's limit under one prefix."""

    @property
    def machine_hours(self) -> Range:
        """Hours of all machines together."""
        return self.seconds * (self.machines.count / 3600)

    @property
    def core_hours(self) -> Range:
        """Hours of all cores together."""
        return self.machine_hours * self.machines.cores

    def as_json(self) -> dict[str, Any]:
        """Convert for JSON; ranges are [from, to]."""
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
    """Estimate a job by scoring some of its images.

    Args:
        bundle: Bundle to score with.
        source: Folder, prefix, table or inventory to score.
        settings: Settings of the job, without `since` and `retry_failed`.
        machines: Machines of the job.
        prices: Prices of requests and machines.
        probe: How much to measure here.
        out: Predictions folder, whose requests count if it is on S3; None: on the same store as the images.

    Raises:
        SettingsError: there is no image, no such runtime, or the settings ask for a GPU, `since` or `retry_failed`.
        BundleError: the bundle is damaged, or computes other logits on this machine.
        SchemaError: a table of images cannot be read as one.
        StorageError: the source cannot be listed.
        BudgetError: a measuring process died.
    """
    if settings.device == "cuda":
        raise SettingsError("device is 'cuda', but an estimate measures on cpu; set device to cpu or auto.")
    if settings.since or settings.retry_failed:
        named = "since" if settings.since else "retry_failed"
        raise SettingsError(
            f"{named} is set, but only a whole run can be estimated; leave it out, and scale the result."
        )
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
    """Scale the cost of an image to the whole job."""
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
    """Yield the sizes of a run's shards, in images, in order."""
    cut = 0
    while cut < images:
        size = min(shard_images(cut, settings), images - cut)
        yield size
        cut += size


def longest_share(images: int, settings: ClassifySettings, workers: int) -> tuple[int, int]:
    """Assign shards to workers, each to the first free one; returns the images of the busiest, and the shards."""
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
        images: Images to score.
        keys: Keys to list, images or not.
        settings: Settings of the job.
        workers: Scoring processes.
        listed: Whether the source is a listed bucket, not a table.
        out_on_s3: Whether the results are written to S3.
        images_on_s3: Whether the images are on S3.
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
    # Splitting a range of keys costs a few requests for one key, and each thread may end on a short page.
    cuts = settings.listing_threads * 8 if pages > settings.listing_threads else 2
    again = 1 + _RETRIED
    most = Requests(
        lists=math.ceil(lists * again) + cuts + few,
        gets=math.ceil((gets + shards * _GETS_A_SHARD[1]) * again) + workers * _GETS_A_WORKER + few,
        puts=math.ceil(puts * again) + workers + few,
    )
    return least, most


def classify_text(found: ClassifyEstimate) -> str:
    """Format an estimate for a terminal: what was measured, a table of ranges, what they mean."""
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
        table_row("GET requests", whole(least.gets, most.gets), _count, "one for each image; includes HEADs"),
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
            f"These machines would read over {PREFIX_GETS_A_SECOND:,} images a second, S3's limit under one "
            "prefix (SlowDown): more machines help only if the keys have several prefixes."
        )
    if not found.listed:
        lines.append("The listing is incomplete: give the number of images with --total-images.")
    if found.workers < found.machines.count * found.machines.cores:
        lines.append(
            f"Only {found.workers:,} of {found.machines.count * found.machines.cores:,} cores have work, with so many "
            "shards, or by settings."
        )
    return lines
