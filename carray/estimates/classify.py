"""Estimates a classification: how long, how many machine-hours, how many requests, and what they cost.

From: a bundle, a source, machines and prices. To: an `Estimate`, as JSON and as text.
Invariants: what an image costs is measured here by the job's own code; every figure is a range, whose meaning is said.
Cost: listing the source, one GET for each image of the probe, and half a minute.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from carray.bundle.format import open_bundle
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.storage import absolute, is_s3
from carray.doctor.machine import usable_cores
from carray.estimates.ranges import MACHINE_FACTOR, Range
from carray.estimates.requests import PREFIX_GETS_A_SECOND, Prices, Requests, count_requests, longest_share
from carray.estimates.sampling import Sample, draw_images
from carray.estimates.scoring import Cost, measure_scoring
from carray.predictions.format import ClassifySettings
from carray.predictions.ledger import RunRecord
from carray.predictions.plan import describe_run

__all__ = ["ClassifyEstimate", "Machines", "Probe", "estimate_classify"]

START_SECONDS = Range(5.0, 20.0)
"""Of the command, of Ray and its processes, before a worker opens the bundle (results/classify.csv, cold start)."""
LISTING_KEYS_A_SECOND = 230_000
"""What one driver lists at most (results/list.csv); scoring goes on meanwhile."""
_IMAGES_A_WORKER = 200
_MOST_WORKERS = 16
_SHORT_SECONDS = 10.0
"""Of listing, where the count is known: long enough for images of many places."""


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
        SettingsError: no image, no such runtime, a layout that is not measured, or a job that is part of a run.
        BundleError: the bundle is damaged, or computes other logits on this machine.
        SchemaError: a table of images cannot be read as one.
        StorageError: the source cannot be listed.
        BudgetError: a process that was to measure died.
    """
    if settings.layout == "staged" or settings.device == "cuda":
        raise SettingsError(
            f"layout is {settings.layout!r} and device {settings.device!r}; an estimate measures layout fused on cpu."
        )
    if settings.since or settings.retry_failed:
        named = "since" if settings.since else "retry_failed"
        raise SettingsError(f"{named} is set, but an estimate is of a whole run; leave it out, and take its share.")
    probe, threads = probe or Probe(), settings.threads or 1
    bundle, source = (absolute(uri).rstrip("/") or "/" for uri in (bundle, source))
    settings = settings.model_copy(update={"layout": "fused", "device": "cpu", "threads": threads})
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
