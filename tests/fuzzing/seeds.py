"""Makes the seed inputs of fuzzing: for each target a few small generated files of the kind that it reads."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from carray.classify.predictions_folder import ClassifySettings, prediction_schema
from carray.classify.shards import SHARD_SCHEMA
from carray.core.settings import dump_yaml
from carray.manifest.manifest_file import MANIFEST_SCHEMA
from carray.search.space import TuneSettings

__all__ = ["seeds_of"]


def seeds_of(target: str) -> list[bytes]:
    """Give a target's seeds, always the same ones."""
    return globals()[f"_{target}"]()


def _picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 32))


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pixels() -> list[bytes]:
    image, exif = _picture(), Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 3)
    frames = [image, image.rotate(90)]
    pictures = [
        _saved(image, "JPEG", exif=exif),
        _saved(image, "JPEG", progressive=True, subsampling=2),
        _saved(image.convert("L"), "JPEG"),
        _saved(image.convert("CMYK"), "JPEG"),
        _saved(image, "MPO", save_all=True, append_images=frames[1:]),
        _saved(image, "PNG", exif=exif.tobytes()),
        _saved(grey16, "PNG"),
        _saved(image.convert("LA"), "PNG"),
        _saved(image.convert("P"), "PNG", transparency=1),
        _saved(image.convert("1"), "PNG"),
        _saved(image, "GIF", save_all=True, append_images=frames[1:]),
        _saved(image, "WEBP"),
        _saved(image, "AVIF", exif=exif),
        _heic(image),
        _saved(image.convert("RGBA"), "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
        _saved(image, "BMP"),
        _saved(image.convert("P"), "BMP"),
        _saved(image, "TIFF"),
        _saved(grey16, "TIFF", compression="tiff_lzw"),
        _saved(image, "TIFF", compression="tiff_adobe_deflate"),
        _saved(image, "TIFF", compression="jpeg"),
        _saved(image.convert("1"), "TIFF", compression="group4"),
    ]
    return [bytes([number]) + picture for number, picture in enumerate(pictures)]


def _heic(image: Image.Image) -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer)
    return buffer.getvalue()


def _bundle() -> list[bytes]:
    from carray.bundle.bundle_folder import BundleInfo, bundle_id_of
    from carray.images.pixels import PixelSettings

    pixels = PixelSettings()
    info = BundleInfo(
        version=1,
        bundle_id=bundle_id_of("", classes=["a", "b"], pixels=pixels, temperature=1.0),
        created_at="2026-01-01T00:00:00+00:00",
        classes=["a", "b"],
        pixels=pixels,
        uses_boxes=False,
        temperature=1.0,
        embedding_size=4,
        files={},
        metrics={"val": {"top1": 0.5}},
        parity={},
        net={"family": "cnn"},
        search={},
        software={"torch": "2"},
    )
    return [info.model_dump_json().encode()]


def _graph() -> list[bytes]:
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
    elsewhere = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = elsewhere.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../w")
    return [model.SerializeToString(), elsewhere.SerializeToString()]


def _checkpoint() -> list[bytes]:
    from safetensors.numpy import save

    metadata = {"note": "{}", "epoch": "3", "val_top1": "0.5"}
    return [save({"net/w": np.ones((2, 3), np.float32), "optimizer/0.step": np.ones(1, np.float32)}, metadata)]


def _inventory() -> list[bytes]:
    manifest = {
        **{"sourceBucket": "bucket", "destinationBucket": "arn:aws:s3:::store", "version": "2016-11-30"},
        **{"creationTimestamp": "1600000000000", "fileFormat": "CSV", "fileSchema": "Bucket, Key"},
        "files": [{"key": "x/data/keys.csv", "size": 17, "MD5checksum": "0" * 32}, {"key": "x/data/keys.csv"}],
    }
    return [json.dumps(manifest).encode()]


def _inventory_files() -> list[bytes]:
    from pyarrow import orc

    names = {"bucket": ["b"], "key": ["a.jpg"], "size": [3], "e_tag": ["e"], "is_latest": [True]}
    table, files = pa.table(names), io.BytesIO()
    orc.write_table(table, files)
    csv = b'"bucket","a%20b.jpg","3","e","true"\n"bucket","c.jpg","4","f","false"\n'
    return [b"\0" + csv, b"\1" + _parquet_of(table), b"\2" + files.getvalue()]


def _text_table() -> list[bytes]:
    csv = "uri,label,split,x1,y1,x2,y2\na.jpg,BMW X5 SUV 2007,train,1,2,3,4\n/b.jpg,,,,,,\n"
    utf16 = b"C" + csv.encode("utf-16")
    return [
        b"C" + csv.encode(),
        b"T" + csv.replace(",", "\t").encode(),
        b'Curi,label\n"a\nb",NA\n',
        utf16,
        b"Cpath; class\na; x\n",
    ]


def _parquet_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _parquet() -> list[bytes]:
    note = json.dumps({"kind": "manifest", "version": 1, "classes": ["b"]}).encode()
    manifest = pa.Table.from_pylist(
        [{"uri": "/a.jpg", "escaped": False, "label": "b", "split": "train", "status": "ok", "sha256": "0"}],
        schema=MANIFEST_SCHEMA.with_metadata({b"carray": note}),
    )
    row = {
        "uri": "s3://b/a.jpg",
        "status": "ok",
        "label": "b",
        "score": 0.5,
        "top5_labels": ["b"],
        "top5_scores": [0.5],
    }
    predictions = pa.Table.from_pylist([row], schema=prediction_schema())
    return [_parquet_of(table) for table in (manifest, predictions, pa.table({"uri": ["a"], "label": ["b"]}))]


def _yaml() -> list[bytes]:
    shared = "a: &a {trials: 2}\nsearch: {<<: *a, epochs: 3}\n"
    odd = "families: {cnn: {space: {width: [8, 16], learning_rate: {log_uniform: [0.001, 0.1]}}}}\n"
    return [dump_yaml(ClassifySettings()).encode(), dump_yaml(TuneSettings()).encode(), shared.encode(), odd.encode()]


def _override() -> list[bytes]:
    return [b"search.trials=8\npixels.decode_size=64", b"outputs=[embedding]\nsplit=val", b"a.b.c={d: [1, 2.5, null]}"]


def _books() -> list[bytes]:
    run = {
        **{"version": 1, "run_id": "r", "bundle_id": "b", "bundle": "/b", "source": "/s", "split": None},
        **{"all_files": False, "runtime": "fp32", "columns": ["uri"], "created_at": "", "software": {}},
    }
    totals = {"images": 3, "shards": 1, "repeated": 0, "skipped_by_suffix": {"txt": 1}}
    counts = {"rows": 3, "scored": 3, "ok": 2, "fetch_errors": 0, "decode_errors": 1, "error_codes": {"empty": 1}}
    attempt = {"shard": 0, "pid": 1, "driver": "d", "images": [1, 2], "alone": False, "lost": [3], "deaths": 1}
    documents: list[dict[str, Any]] = [run, totals, {"shard": 0, **counts, "seconds": 1.5}, attempt]
    return [json.dumps(document).encode() for document in documents]


def _lease() -> list[bytes]:
    return [b'{"token": "t", "host": "elsewhere", "pid": 1, "at": "2026-01-01T00:00:00+00:00"}']


def _shard() -> list[bytes]:
    row = {"uri": "s3://b/a.jpg", "escaped": False, "etag": "e", "size_bytes": 3, "x1": 1, "y1": 1, "x2": 2, "y2": 2}
    note = {"images": 1, "covers": [["", "a.jpg"]], "skipped": {"txt": 1}, "ordered": True}
    schema, sinks = SHARD_SCHEMA.with_metadata({b"carray": json.dumps(note).encode()}), []
    for compression in ("zstd", None):
        sinks.append(io.BytesIO())
        with pa.ipc.new_file(sinks[-1], schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(pa.Table.from_pylist([row, {"uri": "b"}], schema=schema))
    return [sink.getvalue() for sink in sinks]


def _log() -> list[bytes]:
    entry = {
        **{"sequence": 1, "number": 0, "family": "cnn", "epoch": 1, "train_loss": 1.5, "val_loss": None},
        **{"val_top1": 0.5, "val_top5": 1.0, "seconds": 2.0, "images_per_second": 9.0, "note": None},
        **{"decision": "continue", "clock_seconds": 2.0, "devices": 1.0},
    }
    search = {"version": 2, "manifest": "m", "manifest_fingerprint": "f", "settings": {}, "configurations": [{}, None]}
    return [json.dumps(value).encode() for value in (entry, search, {"number": 0, "status": "failed", "reason": "x"})]


def _sql() -> list[bytes]:
    return [
        b"SELECT make, count(*) AS n FROM predictions GROUP BY ALL ORDER BY n DESC LIMIT 3",
        b"WITH x AS (COPY (SELECT 1) TO 'f') SELECT * FROM x",
        b"FROM predictions SELECT uri, unnest([1, 2]) WHERE score > 0.5 UNION ALL SELECT 'a', 1",
        b"PIVOT predictions ON make USING count(*)",
        b"SELECT * FROM read_text('/etc/passwd')",
        b"DELETE FROM predictions; SELECT 1",
    ]


def _uri() -> list[bytes]:
    texts = "s3://bucket/a//b/c.jpg", "../a/./b.PNG", "s3://KEY:SECRET@bucket/a", "https://u:p@host/a?X-Amz-Signature=1"
    return [text.encode() for text in (*texts, "~/a.jpg", "/a/b%20c.jpeg", "s3:///a")] + [b"/a/\xff.jpg"]


def _vehicle() -> list[bytes]:
    names = "Acura RL Sedan 2012", "AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "a b 1899"
    return [name.encode() for name in names]


def _devkit() -> list[bytes]:
    boxes = dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), (1, 2, 3, 4), strict=True))
    entries = [
        {**boxes, "class": 1, "fname": "a.jpg"},
        {**boxes, "fname": "folder/b.jpg"},
        {**boxes, "class": 9.5},
        "x",
    ]
    return [json.dumps(entries).encode()]
