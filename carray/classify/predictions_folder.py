"""Says what predictions are: a Parquet dataset, one row an image, and the settings of the job that writes it.

Invariants: every file of a run has exactly these columns and types, so that no reader drops one; nothing under
`_carray/` ends in `.parquet`, because DuckDB and others look into that folder; integers that may be null are read by
pandas as its nullable integers, so that a hash of 64 bits stays exact beside a null. Only types that Spark, Trino,
Iceberg and Delta have, too. Version 2; files of version 1 have unsigned hashes and embeddings of 16 bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from carray.core.limits import MOST_WORKERS
from carray.core.settings import PathOrUri, Settings
from carray.core.store.files import join
from carray.images.pixels import Box, PixelSettings

__all__ = [
    "PREDICTION_SCHEMA",
    "VERSION",
    "ClassifySettings",
    "PlannedImage",
    "as_version",
    "part_name",
    "prediction_schema",
    "record_place",
    "run_id_of",
]

VERSION = 2
KIND = "predictions"

_COLUMNS = [
    ("uri", pa.string()),  # s3://bucket/key or an absolute path, raw and unencoded
    ("etag", pa.string()),  # of the very read that gave the pixels
    ("size_bytes", pa.int64()),  # of the file or object
    ("width", pa.int32()),  # of the upright image, pixels
    ("height", pa.int32()),  # of the upright image, pixels
    ("status", pa.string()),  # ok, fetch_error or decode_error
    ("error_code", pa.string()),  # not_found, denied, timeout, unavailable; empty, truncated, damaged, unsupported, ...
    ("error", pa.string()),  # the reason as a sentence; null where status is ok
    ("label", pa.string()),  # the likeliest class; null where status is not ok
    ("score", pa.float32()),  # calibrated probability of label, 0..1
    ("margin", pa.float32()),  # score less the runner-up's
    ("entropy", pa.float32()),  # nats
    ("top5_labels", pa.list_(pa.field("element", pa.string()))),  # as many as there are classes, at most 5
    ("top5_scores", pa.list_(pa.field("element", pa.float32()))),  # calibrated probabilities
    ("make", pa.string()),  # parsed from label, like the next three; null where it tells none
    ("model", pa.string()),  # of the vehicle
    ("body", pa.string()),  # such as Sedan
    ("year", pa.int16()),  # of the model
    ("accept", pa.bool_()),  # null until the bundle has a threshold
    ("phash", pa.int64()),  # 64-bit difference hash of the image or its box
    ("runtime", pa.string()),  # of the bundle, which scored the image
    ("run_id", pa.string()),  # hash of all that decides the run's rows
    ("bundle_id", pa.string()),  # hash of the bundle's weights, classes, pixels and temperature
    ("scored_at", pa.timestamp("us", tz="UTC")),  # when its batch was scored
]

_PANDAS_TYPES = {
    "size_bytes": "Int64",
    "width": "Int32",
    "height": "Int32",
    "year": "Int16",
    "accept": "boolean",
    "phash": "Int64",
}
"""What pandas is to make of columns that it would otherwise turn into floats, or objects, at the first null."""


def _pandas_note() -> bytes:
    columns = [
        {"name": name, "field_name": name, "pandas_type": dtype.lower(), "numpy_type": dtype, "metadata": None}
        for name, dtype in _PANDAS_TYPES.items()
    ]
    return json.dumps({"index_columns": [], "column_indexes": [], "columns": columns}).encode()


PREDICTION_SCHEMA = pa.schema(_COLUMNS, metadata={b"pandas": _pandas_note()})

Output = Literal["embedding", "make_score", "model_score", "ood_score"]
OPTIONAL_COLUMNS = {
    "embedding": pa.list_(pa.field("element", pa.float32())),  # the network's, before its last layer
    "make_score": pa.float32(),  # probability of label's make, summed over its classes, 0..1
    "model_score": pa.float32(),  # the same of make and model
    "ood_score": pa.float32(),  # -KL(equal scores || scores), nats: higher is less like training
}


def prediction_schema(outputs: Collection[str] = ()) -> pa.Schema:
    """Give the columns of a run's files: those of every run, then the chosen optional ones, in their own order."""
    schema = PREDICTION_SCHEMA
    for name, kind in OPTIONAL_COLUMNS.items():
        if name in outputs:
            schema = schema.append(pa.field(name, kind))
    return schema


def as_version(table: pa.Table, version: int) -> pa.Table:
    """Convert a table of this version to that of its run, so that all files of a run have the same types."""
    if version >= VERSION:
        return table
    index = table.schema.get_field_index("phash")
    hashes = [chunk.view(pa.uint64()) for chunk in table.column(index).chunks]
    table = table.set_column(index, "phash", pa.chunked_array(hashes, pa.uint64()))
    if (index := table.schema.get_field_index("embedding")) >= 0:
        kind = pa.list_(pa.field("element", pa.float16()))
        table = table.set_column(index, "embedding", table.column(index).cast(kind))
    note = json.loads(table.schema.metadata[b"pandas"])
    for column in note["columns"]:
        if column["name"] == "phash":
            column |= {"pandas_type": "uint64", "numpy_type": "UInt64"}
    return table.replace_schema_metadata({b"pandas": json.dumps(note).encode()})


class ClassifySettings(Settings):
    """Says how a bucket is classified.

    `runtime`, `outputs`, `all_files`, `split`, `column` and `since` decide what the rows say, the others do not.
    """

    runtime: str = "auto"
    """Which of the bundle's runtimes scores: auto, fp32, int8, bf16 or torch-bf16; resolved once, kept on
    resume."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What scores: a GPU where there is one, when auto."""
    engine: Literal["auto", "local", "ray"] = "auto"
    """What runs the scoring processes: local (this machine, without Ray) or ray; auto is ray in a Ray job or where
    RAY_ADDRESS is set, else local. Either resumes the other's run."""
    outputs: list[Output] = Field(default_factory=list)
    """Optional columns: `embedding` (float32), `make_score` and `model_score`, the label's make's and model's, and
    `ood_score`, which is higher the less an image is like the training images."""
    all_files: bool = False
    """Whether every key is an image, or only those with an image's suffix."""
    split: Literal["train", "val", "test"] | None = None
    """Which rows of a manifest to score; all when None."""
    column: dict[Literal["uri", "label", "split", "x1", "y1", "x2", "y2"], str] = Field(default_factory=dict)
    """Which column of a table is which, where their names do not say it, such as {uri: path}."""
    retry_failed: bool = False
    """Whether rows with status fetch_error are scored again, in a run that already has them."""
    since: PathOrUri | None = None
    """Folder of earlier predictions: what it has, scored by the same bundle under the same etag, is left out."""
    max_failed_fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """The job stops once more than this fraction of its images failed; never when None."""
    workers: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """Scoring processes at most; as many as the CPUs allow when None."""
    min_workers: int = Field(default=1, ge=1, le=MOST_WORKERS)
    """Scoring processes that the job goes on with when machines leave the cluster."""
    threads: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """CPUs of one worker, for decoding and for the network alike; when None 1, or a GPU's share of its machine's."""
    batch_images: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """Images of one forward pass; what is fastest with the runtime when None."""
    fetch_concurrency: int = Field(default=16, ge=1, le=64)
    """Reads that one worker has under way at once; 64 is what one client's connection pool serves."""
    fetch_memory_mb: int = Field(default=128, ge=1, le=MOST_WORKERS)
    """Megabytes of originals that one worker holds at once; a single larger one is held alone."""
    max_image_mb: int = Field(default=256, ge=1, le=MOST_WORKERS)
    """Megabytes above which an original is not read: its row says too_large."""
    listing_threads: int = Field(default=16, ge=1, le=64)
    """Requests under way at once while a bucket is listed."""
    shard_images_first: int = Field(default=64, ge=1, le=MOST_WORKERS)
    """Images of the first shards: small, so that results and mistakes show early."""
    shard_images_max: int = Field(default=10_000, ge=1, le=MOST_WORKERS)
    """Images of the last shards of a large run: large, so that 100 million images need about ten thousand files; twice
    as many for thousands of workers, which must all have something to do."""

    @model_validator(mode="after")
    def _check_together(self) -> ClassifySettings:
        if self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, above workers {self.workers}; lower it")
        if self.shard_images_first > self.shard_images_max:
            raise ValueError(
                f"shard_images_first is {self.shard_images_first}, above shard_images_max {self.shard_images_max}; "
                "lower it"
            )
        return self


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image to score. `escaped` says that `uri` percent-escapes a local name that is not UTF-8."""

    uri: str
    escaped: bool = False
    box: Box | None = None
    etag: str | None = None
    """As listed, like `size_bytes`; the row's are those of the read. None where the source gives none."""
    size_bytes: int | None = None


def run_id_of(
    bundle_id: str, *, pixels: PixelSettings, runtime: str, columns: Sequence[str], source: Mapping[str, Any]
) -> str:
    """Hash what decides a run's rows: 16 hex digits."""
    parts = [bundle_id, pixels.model_dump(mode="json"), runtime, list(columns), dict(source)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def part_name(shard: int) -> str:
    """Name the Parquet file of a shard."""
    return f"part-{shard:06d}.parquet"


def record_place(out: str, *names: str) -> str:
    """Give the URI of one of a run's own records, under `_carray/`."""
    return join(out, "_carray", *names)
