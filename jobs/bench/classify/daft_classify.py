# /// script
# requires-python = ">=3.11"
# dependencies = ["daft==0.7.26", "onnxruntime==1.32.0", "numpy==2.4.6"]
# ///
"""Labels a folder or bucket with Daft and a bundle's ONNX file, in the form that Daft's own documentation teaches.

https://docs.daft.ai: `from_glob_path`, `download`, `decode_image`, `resize`, a class UDF with one onnxruntime session a
core, `write_parquet`. Daft needs another pyarrow than carray, so it runs in an environment of its own, which
`jobs.bench.classify.setup` makes from the lines above. The last line of output is JSON.

    python daft_classify.py SOURCE MODEL.onnx INPUT_SIZE BATCH_IMAGES OUT
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import daft
import numpy as np
from daft import DataType, col
from daft.io import IOConfig, S3Config

CORES = len(os.sched_getaffinity(0))


def main(source: str, model: str, size: int, batch: int, out: str) -> None:
    """Write the path and the index of the likeliest class of each JPEG below a source."""

    @daft.cls(max_concurrency=CORES)
    class Net:
        def __init__(self) -> None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        @daft.method.batch(return_dtype=DataType.int64(), batch_size=batch)
        def __call__(self, images: Any) -> Any:
            pixels_BHWC = images.to_arrow().storage.flatten().to_numpy().reshape(-1, size, size, 3)
            return self._session.run(["logits"], {"pixels": pixels_BHWC})[0].argmax(1).astype(np.int64)

    config = _store() if source.startswith("s3://") else None
    pixels = col("path").download(io_config=config).decode_image(mode="RGB").resize(size, size)
    frame = daft.from_glob_path(f"{source}/*.jpg", io_config=config).select("path")
    frame = frame.with_column("image", pixels.cast(DataType.image("RGB", size, size)))
    written = frame.with_column("label", Net()(col("image"))).select("path", "label").write_parquet(out)
    print(json.dumps({"files": len(written.to_pydict()["path"])}), flush=True)


def _store() -> IOConfig:
    names = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "key_id": "AWS_ACCESS_KEY_ID",
        "access_key": "AWS_SECRET_ACCESS_KEY",
        "region_name": "AWS_REGION",
    }
    return IOConfig(s3=S3Config(**{name: os.environ.get(variable) for name, variable in names.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
