"""One function for each parser of untrusted bytes: given any bytes, it returns or raises an error that carray declares.

The contract of every `fuzz_NAME(data)`: a `CarrayError` is an answer, and what comes back is of the declared shape;
any other exception, a wrong shape, endless work or endless memory is a finding. `jobs.drills.fuzz` drives the functions
with bytes that look for new paths, test_fuzzing.py with seeds, small changes of them, and everything ever found.
"""

from __future__ import annotations

import json
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from carray.bundle.bundle_folder import open_bundle
from carray.bundle.runtimes import check_graph
from carray.classify.attempts import AttemptFile
from carray.classify.ledger import done_shards, read_run, read_totals
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import read_notes, read_shard, uncovered
from carray.classify.sources import open_source
from carray.core.errors import CarrayError, DecodeError
from carray.core.settings import load_settings
from carray.core.store import lease, objects
from carray.core.store.files import absolute, is_s3
from carray.core.store.image_bytes import is_image_key, key_suffix
from carray.core.store.lease import hold_run
from carray.core.store.objects import StoreError, split_uri
from carray.core.uri_tables import BOX
from carray.images import decoding, pixels
from carray.images.pixels import PixelSettings
from carray.images.vehicles import parse_vehicle
from carray.manifest import matlab
from carray.manifest.manifest_file import read_manifest
from carray.manifest.stanford_cars import _annotation, read_devkit
from carray.manifest.tables import read_source_table
from carray.pages.templates import readable
from carray.queries.reading import open_labels, open_predictions, read_predictions
from carray.queries.sql import check_sql, connect
from carray.search.run_folder import read_log, read_search, read_trial_ends, read_trials
from carray.search.space import TuneSettings

__all__ = ["REPLAYS", "TARGETS", "Target"]

Target = Callable[[bytes], None]

PIXELS_HERE = 1_000_000
"""Stands for decoding.MAX_PIXELS: a decoder's mistakes show in small pictures, too, and thousands a second of them."""


def refuse_bucket(bucket: str, key: str, **_: Any) -> Any:
    """Stand in for the client of every bucket."""
    raise StoreError("not_found", "no store is asked here")


"""Stands for every bucket that a file may name: fuzzing asks nobody."""


def fuzz_pixels(data: bytes) -> None:
    """Decode an image; the first byte chooses how."""
    how, image = data[:1] or b"\0", data[1:]
    settings = PixelSettings(
        decode_size=32,
        input_size=24,
        aspect=("squash", "crop", "pad")[how[0] % 3],  # type: ignore[arg-type]
        reduced_scale=how[0] & 4 == 0,
    )
    box = (1, 2, 30, 20) if how[0] & 8 else None
    try:
        with changed(decoding, MAX_PIXELS=PIXELS_HERE, MAX_STORED_PIXELS=4 * PIXELS_HERE):
            decoded = pixels.decode(image, settings, box=box)
    except DecodeError as err:
        assert err.code in {"empty", "unsupported", "too_large", "truncated", "damaged", "bad_box"}, err.code
        assert "\n" not in str(err)
        return
    assert decoded.pixels_HWC.shape == (32, 32, 3)
    assert decoded.pixels_HWC.dtype == np.uint8
    assert decoded.width > 0 < decoded.height
    assert -(2**63) <= decoded.phash < 2**63
    assert pixels.view(decoded.pixels_HWC, settings).shape == (24, 24, 3)


def fuzz_bundle(data: bytes) -> None:
    """Open a bundle whose description is these bytes."""
    with folder_with({"bundle.json": data}) as place, suppress(CarrayError):
        info = open_bundle(str(place))
        assert info.classes and info.temperature > 0


def fuzz_graph(data: bytes) -> None:
    """Look whether an ONNX file keeps to itself."""
    with suppress(CarrayError):
        check_graph(data)


def fuzz_checkpoint(data: bytes) -> None:
    """Unpack a training's checkpoint, and read the note of a trial's weights."""
    from carray.search.train.checkpoint import TrialFiles, unpack

    with suppress(CarrayError):
        parts, _ = unpack(data, {"net": {}})
        assert not parts.get("net")
    with folder_with({"trials/t00000/best.safetensors": data}) as place:
        note = TrialFiles(str(place), 0)._read_note()
        assert isinstance(note["epoch"], int) and isinstance(note["val_top1"], float)


def fuzz_inventory(data: bytes) -> None:
    """List an S3 Inventory whose manifest is these bytes."""
    with folder_with({"day/manifest.json": data, "data/keys.csv": b'"bucket","a.jpg"\n'}) as place:
        list_source(f"{place}/day/manifest.json")


def fuzz_inventory_files(data: bytes) -> None:
    """List an S3 Inventory of one file of keys, whose format the first byte chooses."""
    kind = ("CSV", "Parquet", "ORC")[(data[:1] or b"\0")[0] % 3]
    manifest = {
        **{"sourceBucket": "bucket", "destinationBucket": "arn:aws:s3:::store", "fileFormat": kind},
        **{"fileSchema": "Bucket, Key, Size, ETag, IsLatest", "files": [{"key": "x/data/keys"}]},
    }
    with folder_with({"day/manifest.json": json.dumps(manifest).encode(), "data/keys": data[1:]}) as place:
        list_source(f"{place}/day/manifest.json")


def fuzz_text_table(data: bytes) -> None:
    """Read a CSV or TSV of images: as a source to prepare, as one to classify, and as labels."""
    name = f"images.{'tsv' if data[:1] == b'T' else 'csv'}"
    with folder_with({name: data[1:]}) as place:
        read_table_everywhere(f"{place}/{name}")


def fuzz_parquet(data: bytes) -> None:
    """Read a Parquet file as everything that one can be."""
    with folder_with({"images.parquet": data}) as place:
        path = f"{place}/images.parquet"
        read_table_everywhere(path)
        with suppress(CarrayError):
            read_manifest(path)
        with suppress(CarrayError):
            assert "uri" in read_predictions(path).columns
        with suppress(CarrayError), connect({"predictions": open_predictions(path)}) as connection:
            connection.sql("SELECT label, count(*) FROM predictions GROUP BY 1").fetchall()


def fuzz_yaml(data: bytes) -> None:
    """Read settings from a YAML file."""
    with folder_with({"settings.yaml": data}) as place:
        for model in (ClassifySettings, TuneSettings):
            try:
                load_settings(model, config=f"{place}/settings.yaml")
            except CarrayError as err:
                assert len(str(err)) < 10_000 + 100 * len(data)


def fuzz_override(data: bytes) -> None:
    """Read settings from the text behind `--set`."""
    text = data.decode(errors="surrogateescape")
    for model in (ClassifySettings, TuneSettings):
        with suppress(CarrayError):
            load_settings(model, overrides=text.split("\n"))


def fuzz_books(data: bytes) -> None:
    """Read each of a classification's books, all of which hold these bytes."""
    books = ("run.json", "listing.json", "ledger/000000.json", "attempts/000000.json")
    files = {f"_carray/{name}": data for name in books} | {"part-000000.parquet": b""}
    with folder_with(files) as place:
        out = str(place)
        for read in (read_run, read_totals, lambda out: done_shards(out, 1), lambda out: AttemptFile(out, 0).read()):
            with suppress(CarrayError):
                read(out)


def fuzz_lease(data: bytes) -> None:
    """Take over a run that another driver's note, these bytes, may hold."""
    hasty = {"PATIENCE_SECONDS": 0.0, "SETTLE_SECONDS": 0.0, "say": lambda text: None}
    with (
        folder_with({"driver.json": data}) as place,
        changed(lease, **hasty),
        suppress(CarrayError),
        hold_run(str(place), what="fuzz") as held,
    ):
        held.check()


def fuzz_shard(data: bytes) -> None:
    """Read a shard's list of images."""
    with folder_with({"_carray/shards/000000.arrow": data}) as place:
        with suppress(CarrayError):
            for image in read_shard(str(place), 0):
                assert isinstance(image.uri, str)
        with suppress(CarrayError):
            uncovered(read_notes(str(place)).values())


def fuzz_log(data: bytes) -> None:
    """Read what a search left: its settings, an epoch, and how a trial ended, all of which are these bytes."""
    files = {"search.json": data, "log/00000001.json": data, "trials/t00000/trial.json": data, "trials.parquet": data}
    with folder_with(files) as place:
        run = str(place)
        for read in (read_search, read_log, lambda run: read_trial_ends(run, 1), read_trials):
            with suppress(CarrayError):
                read(run)


def fuzz_sql(data: bytes) -> None:
    """Ask whether a text is one SELECT that reads nothing but its tables; what passes cannot change them."""
    sql = data.decode(errors="surrogateescape")
    connection = database()
    with suppress(CarrayError):
        check_sql(connection, sql)
    assert connection.execute("SELECT count(*) FROM predictions").fetchall() == [(1,)]


def fuzz_uri(data: bytes) -> None:
    """Spell a URI in its one way, twice, and take it apart."""
    text = data.decode(errors="surrogateescape")
    key_suffix(text)
    is_image_key(text)
    shown = readable(text)
    assert not {unicodedata.category(letter) for letter in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    try:
        once = absolute(text)
    except CarrayError as err:
        assert str(err).isprintable()
        return
    assert absolute(once) == once
    if is_s3(once):
        bucket, _ = split_uri(once)
        assert bucket and "/" not in bucket and "@" not in bucket
    else:
        assert once.startswith("/") and "/../" not in f"{once}/"


def fuzz_vehicle(data: bytes) -> None:
    """Read a class name."""
    text = data.decode(errors="surrogateescape")
    vehicle = parse_vehicle(text)
    assert (vehicle.make is None) == (vehicle.model is None) == (vehicle.year is None)
    if vehicle.make and vehicle.model:
        words = text.split()
        assert text.startswith(vehicle.make, len(text) - len(text.lstrip())) or " ".join(words[:2]) == vehicle.make
        assert 1900 <= int(vehicle.year or 0) <= 2100


def fuzz_devkit(data: bytes) -> None:
    """Take a devkit's annotations apart, as the process that reads MATLAB's format hands them over."""
    with suppress(ValueError, RecursionError):
        entries = json.loads(data)
        for entry in entries if isinstance(entries, list) else [entries]:
            with suppress(CarrayError):
                found = _annotation(entry, ["a", "b"], "place")
                assert "/" not in found["name"] and all(isinstance(found[corner], int) for corner in BOX)


def replay_matlab(data: bytes) -> None:
    """Read a devkit whose two MATLAB files are both these bytes: a process an input, too slow to fuzz."""
    files = {"devkit/cars_meta.mat": data, "devkit/cars_train_annos.mat": data}
    with folder_with(files) as place, changed(matlab, SECONDS=2), suppress(CarrayError):
        read_devkit(str(place), f"{place}/devkit")


@contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    """Give a module other values for a while."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def folder_with(files: dict[str, bytes]) -> Iterator[Path]:
    """Give a folder of these files, in memory where the machine has such a place."""
    home = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="carray-fuzz-", dir=home) as folder:
        for name, data in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(folder)


def list_source(place: str) -> None:
    """List a source to its end, whatever it is, without asking any store."""

    def take(piece: Any) -> None:
        piece.batch.validate(full=True)

    with changed(objects, _OPENERS={"s3": refuse_bucket}), suppress(CarrayError):
        source = open_source(place, ClassifySettings(), uses_boxes=True)
        source.list(take, gaps=[("", None)], threads=1, stop=threading.Event())


def read_table_everywhere(path: str) -> None:
    """Read a table of images as every command that takes one does."""
    with suppress(CarrayError):
        rows = read_source_table(path).rows
        assert list(rows.columns) == ["uri", "escaped", "label", "split", *BOX, "folder"]
    list_source(path)
    with suppress(CarrayError), connect({"labels": open_labels(path)}) as connection:
        connection.sql("SELECT label, count(*) FROM labels GROUP BY 1").fetchall()


_connections: list[Any] = []


def database() -> Any:
    """Give a DuckDB with a table of predictions, the same one to every call."""
    import duckdb

    if not _connections:
        _connections.append(duckdb.connect(":memory:"))
        _connections[0].execute("CREATE TABLE predictions AS SELECT 'a' AS uri, 0.5 AS score, 'Audi' AS make")
    return _connections[0]


TARGETS: dict[str, Target] = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}
REPLAYS = TARGETS | {"matlab": replay_matlab}
