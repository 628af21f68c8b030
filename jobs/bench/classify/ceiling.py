"""Measures how near the job comes to a ceiling that shares no code with it.

The ceiling reads files, decodes them by libjpeg-turbo at the job's reduced scale, resizes once by OpenCV, crops, and
runs the bundle's ONNX file in onnxruntime, in batches of the job's size; no hash, table or check. One process per core,
all at once, each over its share of the images. The clock runs from the first start, with networks loaded and warm, to
the last end. The job's steady rate is compared with the median of a ceiling before it and one after it.

    python -m jobs.bench.classify.ceiling BUNDLE FOLDER fp32 32
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carray.bundle.bundle_folder import RUNTIME_FILES, open_bundle
from jobs.bench.classify.arms import batch_images, classify, median_row
from jobs.bench.classify.setup import Bench
from jobs.bench.classify.watch import run_watched
from jobs.bench.rows import cores

RUNS = 3


def measure_ceiling(bench: Bench, bundle: str, folder: str, runtime: str, *, part: str, runs: int) -> dict[str, Any]:
    """Measure ceiling, job, ceiling, job and so on to a last ceiling; returns a row of medians."""
    ceilings, rows = [_ceiling_rate(bench, bundle, folder, runtime)], []
    for _ in range(runs):
        row = classify(bench, bundle, folder, runtime=runtime, engine=bench.engine, name=f"{part}-{runtime}").row
        ceilings.append(_ceiling_rate(bench, bundle, folder, runtime))
        ceiling, steady = statistics.median(ceilings[-2:]), row["steady_images_per_second"]
        fraction = None if steady is None else round(steady / ceiling, 3)
        rows.append(row | {"ceiling_images_per_second": round(ceiling, 2), "fraction_of_ceiling": fraction})
    each = ", ".join(str(row["fraction_of_ceiling"]) for row in rows)
    note = f"ceilings {', '.join(f'{rate:.1f}' for rate in ceilings)}; the job between them {each} of theirs"
    return median_row(rows) | {"part": part, "note": note}


def _ceiling_rate(bench: Bench, bundle: str, folder: str, runtime: str) -> float:
    """Measure the ceiling's images a second, all cores together."""
    command = ["-m", "jobs.bench.classify.ceiling", bundle, folder, runtime, batch_images(bundle, runtime)]
    result = run_watched(command, log=bench.work / "log" / f"ceiling-{runtime}.log").result
    return float(result["images"] / result["seconds"])


def main(bundle: str, folder: str, runtime: str, batch: int) -> None:
    """Run the ceiling's processes; the last line of output is JSON."""
    paths, context = sorted(Path(folder).iterdir()), multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(cores()), context.SimpleQueue()
    loops = [
        context.Process(target=_loop, args=(bundle, runtime, batch, paths[i :: cores()], barrier, answers))
        for i in range(cores())
    ]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    if any(loop.exitcode for loop in loops):
        raise SystemExit("a process of the ceiling failed")
    spans = [answers.get() for _ in loops]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    print(json.dumps({"images": len(paths), "seconds": seconds}))


def _loop(bundle: str, runtime: str, batch: int, paths: Sequence[Path], barrier: Any, answers: Any) -> None:
    import cv2
    import numpy as np
    import onnxruntime
    import simplejpeg

    info = open_bundle(bundle)
    size, cover = info.pixels.input_size, info.pixels.decode_size
    side = round(size / info.pixels.view_crop)
    corner = (side - size) // 2
    scales = (8, 4, 2) if info.pixels.reduced_scale else ()  # for these libjpeg-turbo has fast code
    cv2.setNumThreads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = str(Path(bundle) / RUNTIME_FILES[runtime])
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def read(path: Path) -> Any:
        data = path.read_bytes()
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        scale = next((scale for scale in scales if -(-min(height, width) // scale) >= cover), 1)
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale))
        square_HWC = cv2.resize(pixels_HWC, (side, side), interpolation=cv2.INTER_AREA)
        return square_HWC[corner : corner + size, corner : corner + size]

    def score(chunk: Sequence[Path]) -> None:
        session.run(["logits"], {"pixels": np.stack([read(path) for path in chunk])})

    score(paths[:batch])
    barrier.wait()
    start = time.monotonic()
    for first in range(0, len(paths), batch):
        score(paths[first : first + batch])
    answers.put((start, time.monotonic()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
