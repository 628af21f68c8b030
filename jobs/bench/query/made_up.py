"""Makes up prediction tables of any number of rows: the schema, file sizes and skew of real ones, without an image.

The same numbers give the same rows. The runs of one folder hold the same uris, and differ as two versions of a
classifier do: in about one label of 25, in every score, and in one of 200 objects, which was replaced in between.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from carray.classify.predictions_folder import KIND, PREDICTION_SCHEMA, VERSION, part_name
from carray.core.progress import Progress
from carray.core.store.files import write_json
from carray.core.tables import write_table
from carray.images.vehicles import VEHICLE_COLUMNS, vehicle_columns

ROWS_PER_FILE = 100_000
_MAKES = "Acura Audi BMW Buick Cadillac Chevrolet Chrysler Dodge Ferrari FIAT Ford Honda Hyundai Jeep".split()
_BODIES = "Sedan Coupe SUV Wagon Hatchback Convertible Minivan".split()
CLASSES = [f"{make} {make[0]}{number} {_BODIES[number % 7]} {2000 + number}" for make in _MAKES for number in range(14)]
"""196 names in the grammar of Stanford Cars."""
_FAILURES = [
    ("fetch_error", "timeout", "no answer within 60 s"),
    ("decode_error", "truncated", "image file is truncated"),
]
_NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)

Random = np.random.Generator


def write_run(folder: Path, rows: int, *, run: int) -> str:
    """Write run number `run` of `rows` images if it is missing; returns its folder."""
    done = folder / "_carray" / "done.json"
    if not done.exists():
        with Progress(f"making up {folder.name}", total=rows, unit="rows") as progress:
            for file, start in enumerate(range(0, rows, ROWS_PER_FILE)):
                count = min(ROWS_PER_FILE, rows - start)
                table = _rows(file, count, run)
                write_table(table, str(folder / part_name(file)), kind=KIND, version=VERSION)
                progress.advance(count)
        write_json(str(done), {"rows": rows})
    return str(folder)


def write_labels(labels: Path, rows: int) -> str:
    """Write the true labels of every hundredth image if they are missing; returns the file."""
    if not labels.exists():
        tables = []
        for file, start in enumerate(range(0, rows, ROWS_PER_FILE)):
            random = np.random.default_rng(file)
            count = min(ROWS_PER_FILE, rows - start)
            uris, truth_N = _uris(random, count), _truth(random, count)
            tables.append(pa.table({"uri": uris, "label": pa.array(CLASSES).take(pa.array(truth_N))})[::100])
        write_table(pa.concat_tables(tables), str(labels), kind="labels", version=1)
    return str(labels)


def _rows(file: int, count: int, run: int) -> pa.Table:
    random = np.random.default_rng(file)
    uris, truth_N = _uris(random, count), _truth(random, count)
    columns = _image_columns(random, count, run)
    random = np.random.default_rng((file, run + 1))
    columns |= _score_columns(random, truth_N)
    failed_N = random.random(count) < 0.008
    kind_N = random.integers(0, len(_FAILURES), count)
    for i, name in enumerate(("status", "error_code", "error")):
        words = pa.array([kind[i] for kind in _FAILURES]).take(pa.array(kind_N))
        sound = pa.scalar("ok" if name == "status" else None, pa.string())
        columns[name] = pc.if_else(pa.array(failed_N), words, sound)
    columns |= {"uri": uris, "runtime": pa.repeat("int8", count), "run_id": pa.repeat(f"{run:016x}", count)}
    columns |= {"bundle_id": pa.repeat(f"{run + 7:016x}", count), "accept": pa.nulls(count, pa.bool_())}
    columns["scored_at"] = pa.repeat(pa.scalar(_NOON + dt.timedelta(minutes=file), pa.timestamp("us", tz="UTC")), count)
    unscored = pa.array(failed_N)
    for name in ("label", "score", "margin", "entropy", "top5_labels", "top5_scores", *VEHICLE_COLUMNS):
        columns[name] = pc.if_else(unscored, pa.scalar(None, columns[name].type), columns[name])
    return pa.table([columns[field.name].cast(field.type) for field in PREDICTION_SCHEMA], schema=PREDICTION_SCHEMA)


def _image_columns(random: Random, count: int, run: int) -> dict[str, Any]:
    changed = pa.array((random.random(count) < 0.005) & (run > 0))
    etags, new_etags = _hex(random, count, 16), _hex(random, count, 16)
    phash_N = random.integers(0, 2**63, count).astype(np.int64)
    copies_N = random.random(count) < 0.01
    phash_N[copies_N] = random.integers(0, 1000, int(copies_N.sum())).astype(np.int64)
    return {
        "etag": pc.if_else(changed, new_etags, etags),
        "size_bytes": pa.array(random.lognormal(11.5, 0.6, count).astype(np.int64)),
        "width": pa.array(random.choice([640, 800, 1024, 1600], count)),
        "height": pa.array(random.choice([480, 600, 768, 1067], count)),
        "phash": pa.array(phash_N),
    }


def _score_columns(random: Random, truth_N: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Draw labels that are right in about four of five, and scores that are mostly high."""
    count, kinds = len(truth_N), len(CLASSES)
    ranked_N5 = (truth_N[:, None] + np.array([0, 1, 14, 15, 28])) % kinds
    # The same images are hard for every run.
    wrong_N = np.random.default_rng(int(truth_N[:8].sum())).random(count) < 0.18
    wrong_N ^= random.random(count) < 0.03
    ranked_N5[wrong_N, :2] = ranked_N5[wrong_N, 1::-1]
    score_N = np.where(wrong_N, random.beta(4, 4, count), random.beta(9, 1.2, count))
    rest_N4 = np.sort(random.dirichlet([2, 1, 1, 1], count), axis=1)[:, ::-1] * (1 - score_N)[:, None]
    scores_N5 = np.sort(np.column_stack([score_N, rest_N4]), axis=1)[:, ::-1].astype(np.float32)
    names, first = pa.array(CLASSES), pa.array(ranked_N5[:, 0])
    offsets = pa.array(np.arange(0, 5 * count + 1, 5, dtype=np.int32))
    columns = {
        "label": names.take(first),
        "score": pa.array(scores_N5[:, 0]),
        "margin": pa.array(scores_N5[:, 0] - scores_N5[:, 1]),
        "entropy": pa.array(-(scores_N5 * np.log(scores_N5 + 1e-9)).sum(axis=1)),
        "top5_labels": pa.ListArray.from_arrays(offsets, names.take(pa.array(ranked_N5.ravel()))),
        "top5_scores": pa.ListArray.from_arrays(offsets, pa.array(scores_N5.ravel())),
    }
    return columns | {name: pa.array(values).take(first) for name, values in vehicle_columns(CLASSES).items()}


def _truth(random: Random, count: int) -> npt.NDArray[np.int64]:
    """Draw classes, a few of them frequent and most of them rare."""
    shares_K = 1.0 / np.arange(1, len(CLASSES) + 1) ** 0.7
    return random.choice(len(CLASSES), count, p=shares_K / shares_K.sum())


def _uris(random: Random, count: int) -> pa.Array:
    return pc.binary_join_element_wise("s3://photos/2026/03/", _hex(random, count, 8), ".jpg", "")


def _hex(random: Random, count: int, size_bytes: int) -> pa.Array:
    """Draw `count` texts of 2 * size_bytes hex digits."""
    text = random.bytes(count * size_bytes).hex().encode()
    offsets = np.arange(0, len(text) + 1, 2 * size_bytes, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets.tobytes()), pa.py_buffer(text))
