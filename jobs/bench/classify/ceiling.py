"""Measures bare loops of reading, decoding and the forward pass, and how near to them the whole job comes.

One process per core, all at once, each over its share of the images, with the job's `decode`, `view`, `Scorer` and
batch size, and nothing else. The clock runs from the first start, with networks loaded and warm, to the last end. The
job's steady rate is compared with the median of a ceiling before it and one after it.

    python -m jobs.bench.classify.ceiling --bundle B --images FOLDER --runtime fp32 --what both --batch 32
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.classify.arms import batch_images, classify
from jobs.bench.classify.setup import Bench
from jobs.bench.classify.watch import run_watched
from jobs.bench.rows import cores


def measure_ceiling(bench: Bench, bundle: str, folder: str, runtime: str, *, part: str, net: str) -> dict[str, Any]:
    """Measure ceiling, job and ceiling again, and each half of the work alone; returns a row."""
    bare = [bare_rate(bench, bundle, folder, runtime, what="both")]
    arm = classify(bench, bundle, folder, runtime=runtime, name=f"{part}-{net}-{runtime}")
    bare.append(bare_rate(bench, bundle, folder, runtime, what="both"))
    alone = {
        f"{what}_images_per_second": bare_rate(bench, bundle, folder, runtime, what=what)
        for what in ("decode", "forward")
    }
    ceiling, steady = statistics.median(bare), arm.row["steady_images_per_second"]
    return (
        arm.row
        | alone
        | {
            "part": part,
            "net": net,
            "ceiling_images_per_second": round(ceiling, 2),
            "fraction_of_ceiling": None if steady is None else round(steady / ceiling, 3),
            "note": f"ceiling {bare[0]:.1f} before and {bare[1]:.1f} after the job",
        }
    )


def bare_rate(bench: Bench, bundle: str, folder: str, runtime: str, *, what: str) -> float:
    """Measure the images a second of all cores together for `what`: both, decode or forward."""
    command = ["-m", "jobs.bench.classify.ceiling", "--bundle", bundle, "--images", folder, "--runtime", runtime]
    command += ["--what", what, "--batch", str(batch_images(bundle, runtime))]
    result = run_watched(command, log=bench.work / "log" / f"ceiling-{what}-{runtime}.log").result
    return round(result["images"] / result["seconds"], 2)


def main() -> None:
    """Run the bare loops; the last line of output is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bundle", "images", "runtime", "what"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    paths = sorted(str(path) for path in Path(arguments.images).iterdir())
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(cores()), context.SimpleQueue()
    task = (arguments.bundle, arguments.runtime, arguments.what, arguments.batch)
    loops = [context.Process(target=_loop, args=(task, paths[i :: cores()], barrier, answers)) for i in range(cores())]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    if any(loop.exitcode for loop in loops):
        raise SystemExit("a bare loop failed")
    spans = [answers.get() for _ in loops]
    seconds = max(end for _, end in spans) - min(start for start, _ in spans)
    print(json.dumps({"images": len(paths), "seconds": seconds}))


def _loop(task: tuple[str, str, str, int], paths: Sequence[str], barrier: Any, answers: Any) -> None:
    import cv2
    import numpy as np

    from carray.bundle.scorer import Scorer
    from carray.images.pixels import decode, view

    bundle, runtime, what, batch = task
    cv2.setNumThreads(1)
    scorer = Scorer(bundle, runtime=runtime, threads=1)
    pixels = scorer.info.pixels

    def read(path: str) -> Any:
        return view(decode(Path(path).read_bytes(), pixels).pixels_HWC, pixels)

    chunks = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    ready_BHWC = np.stack([read(path) for path in chunks[0]])
    scorer.score(ready_BHWC)
    barrier.wait()
    start = time.monotonic()
    for chunk in chunks:
        seen = [read(path) for path in chunk] if what != "forward" else []
        if what != "decode":
            scorer.score(np.stack(seen) if seen else ready_BHWC[: len(chunk)])
    answers.put((start, time.monotonic()))


if __name__ == "__main__":
    main()
