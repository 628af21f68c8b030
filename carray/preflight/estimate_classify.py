"""Estimates a classification: how long, how many machine-hours, how many requests, and what they cost.

The cost of an image is measured here with the job's own code; shard sizes are those of `classify.shards.shard_images`;
requests were counted on a real store, and tests/preflight/test_estimate_classify.py compares. Every figure is a range.
Cost: listing the source, one GET for each measured image, and half a minute.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from carray.bundle.bundle_folder import open_bundle
from carray.classify.ledger import RunRecord
from carray.classify.plan import describe_run
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.read_images import NOTE_IMAGES
from carray.classify.shards import shard_images
from carray.core.cgroups import usable_cores
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3
from carray.preflight.classify_probe import Cost, Sample, draw_images, measure_scoring
from carray.preflight.estimates import (
    MACHINE_FACTOR,
    START_SECONDS,
    Estimate,
    Figure,
    Machines,
    Range,
    busy_text,
    count_text,
    machine_figures,
    money_text,
)

__all__ = ["S3_PRICES", "Probe", "count_requests", "estimate_classify", "longest_share", "shard_sizes"]

S3_PRICES = {"list": 0.005, "get": 0.0004, "put": 0.005}
"""Of 1,000 requests, in dollars: us-east-1, 2026."""
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
Times: from processor time to wall-clock time measured here, widened by a factor of {MACHINE_FACTOR:g} for other
machines of this type, with the start of Ray and its workers. Not included: other types of machines, their booting, and
machines that leave.
Requests: by the job's own rules, with up to 1 % retried."""


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


def estimate_classify(
    bundle: str,
    source: str,
    *,
    settings: ClassifySettings,
    machines: Machines,
    prices: Mapping[str, float] = S3_PRICES,
    probe: Probe | None = None,
    out: str | None = None,
) -> Estimate:
    """Estimate a job by scoring some of its images.

    Args:
        bundle: Bundle to score with.
        source: Folder, prefix, table or inventory to score.
        settings: Settings of the job, without `since` and `retry_failed`.
        machines: Machines of the job.
        prices: Prices of 1,000 requests: list, get and put.
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
    prices: Mapping[str, float],
    *,
    out: str | None,
    total: int | None,
) -> Estimate:
    """Scale the cost of an image to the whole job."""
    images, on_s3 = total or sample.images, is_s3(sample.chosen[0].uri)
    workers = max(1, machines.count * (machines.cores // (settings.threads or 1)))
    workers = min(workers, settings.workers or workers)
    busiest, shards = longest_share(images, settings, workers)
    workers = min(workers, shards)
    scoring = (cost.seconds * float(busiest)).widened()
    listing = images / LISTING_KEYS_A_SECOND
    throttled = on_s3 and images / scoring.low > PREFIX_GETS_A_SECOND
    slowest = images / PREFIX_GETS_A_SECOND if throttled else 0.0
    scoring = Range(max(scoring.low, listing), max(scoring.high, listing, slowest))
    seconds = START_SECONDS + cost.open_seconds + scoring
    requests = count_requests(
        images,
        max(images, sample.keys),
        settings,
        workers=workers,
        listed=is_s3(run.source) and not run.source.endswith((".parquet", ".csv", ".tsv", "/manifest.json")),
        out_on_s3=is_s3(out) if out else on_s3,
        images_on_s3=on_s3,
    )
    money = sum((requests[kind] * (prices[kind] / 1_000) for kind in requests), Range(0.0, 0.0))
    taken, price = machine_figures(machines, seconds, note=machines.text(), device_hours="core_hours")
    listed = sample.complete or total is not None
    figures = [
        Figure("source", run.source),
        Figure("images", images),
        Figure("listed_completely", listed),
        Figure("runtime", run.runtime),
        Figure("machines", machines.count),
        Figure("cores", machines.cores),
        Figure("workers", workers),
        Figure("shards", shards),
        Figure("probed_images", cost.images),
        Figure("probe_error_codes", cost.error_codes),
        Figure("images_per_second_per_core", Range(1 / cost.seconds.high, 1 / cost.seconds.low)),
        *taken,
        Figure("list_requests", requests["list"], "LIST requests", count_text),
        Figure("get_requests", requests["get"], "GET requests", count_text, "one for each image; includes HEADs"),
        Figure("put_requests", requests["put"], "PUT requests", count_text),
        Figure("request_money", money, "money, requests", money_text),
        price,
    ]
    count = f"{images:,} images" if listed else f"at least {images:,} images, listed so far"
    return Estimate(
        _intro(run, cost, count, shards), figures, _meaning(cost, machines, workers, throttled=throttled, listed=listed)
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
) -> dict[str, Range]:
    """Count a job's requests by price: list, get (with HEADs) and put.

    Args:
        images: Images to score.
        keys: Keys to list, images or not.
        settings: Settings of the job.
        workers: Scoring processes.
        listed: Whether the source is a listed bucket, not a table.
        out_on_s3: Whether the results are written to S3.
        images_on_s3: Whether the images are on S3.
    """
    sizes = list(shard_sizes(images, settings)) if out_on_s3 else []
    shards, notes = len(sizes), sum(math.ceil(size / NOTE_IMAGES) for size in sizes)
    pages = math.ceil(keys / KEYS_A_PAGE) if listed else 0
    lists, puts = pages + shards // KEYS_A_PAGE, notes + shards * _PUTS_A_SHARD
    least_gets, most_gets = (images * images_on_s3 + shards * each for each in _GETS_A_SHARD)
    # Splitting a range of keys costs a few requests for one key, and each thread may end on a short page.
    cuts = settings.listing_threads * 8 if pages > settings.listing_threads else 2
    again, few, any_s3 = 1 + _RETRIED, _FEW * out_on_s3, images_on_s3 or out_on_s3
    return {
        "list": Range(lists, math.ceil(lists * again) + any_s3 * (cuts + few)),
        "get": Range(least_gets, math.ceil(most_gets * again) + any_s3 * (workers * _GETS_A_WORKER + few)),
        "put": Range(puts, math.ceil(puts * again) + any_s3 * (workers + few)),
    }


def _intro(run: RunRecord, cost: Cost, count: str, shards: int) -> list[str]:
    failed = sum(cost.error_codes.values())
    trouble = f"; {failed} of them failed ({', '.join(f'{n} {code}' for code, n in cost.error_codes.items())})"
    return [
        f"{run.source}: {count}, {cost.bytes_per_image / 1e6:.2f} MB each, in {shards:,} shards",
        f"Here {cost.images:,} of them were read, decoded and scored ({run.runtime}) on all cores"
        f"{trouble if failed else ''}:",
        f"an image takes {cost.seconds.low * 1e3:.2f} to {cost.seconds.high * 1e3:.2f} ms of a core, of which decoding "
        f"{cost.decode_seconds * 1e3:.2f}.",
    ]


def _meaning(cost: Cost, machines: Machines, workers: int, *, throttled: bool, listed: bool) -> list[str]:
    lines = [_MEANING, *busy_text(cost.load)]
    if throttled:
        lines.append(
            f"These machines would read over {PREFIX_GETS_A_SECOND:,} images a second, S3's limit under one "
            "prefix (SlowDown): more machines help only if the keys have several prefixes."
        )
    if not listed:
        lines.append("The listing is incomplete: give the number of images with --total-images.")
    cores = machines.count * machines.cores
    if workers < cores:
        lines.append(f"Only {workers:,} of {cores:,} cores have work, with so many shards, or by settings.")
    return lines
