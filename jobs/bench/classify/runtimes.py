"""Compares the runtimes of bundles on one core: rate by batch size, start, memory; also int8 through OpenVINO.

    python -m jobs.bench.classify.runtimes --bundle B1 --bundle B2

Prints a table in Markdown, the source of the one in results/LOG.md, and ends with one JSON line. Rates are measured in
turn, by the fastest pass, in processor time, so that other work on the machine disturbs little; start and memory in
fresh processes. Cost: half a minute a bundle with int8, on a machine that has bf16 and openvino.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from carray.bundle.bundle_folder import INT8_MODEL, MODEL, open_bundle
from carray.bundle.runtimes import OnnxRuntime, OpenVinoRuntime, measure_rates

ARMS: dict[str, tuple[str, type[OnnxRuntime] | type[OpenVinoRuntime]]] = {
    "fp32": (MODEL, OnnxRuntime),
    "bf16": (MODEL, OpenVinoRuntime),
    "int8": (INT8_MODEL, OnnxRuntime),
    "int8 by OpenVINO": (INT8_MODEL, OpenVinoRuntime),
}
BATCHES = (1, 4, 8, 32)
SECONDS = 4.0
"""How long the arms are measured in turn at each batch size."""


def main() -> None:
    """Measure the bundles, or one start in this process, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", action="append", required=True, type=Path, help="folder of a bundle; repeatable")
    parser.add_argument("--start", choices=ARMS, help="measure only how this arm starts, in this process")
    given = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if given.start:
        print(json.dumps(_start(given.bundle[0], given.start)))
        return
    rows = [row for bundle in given.bundle for row in _compare(bundle)]
    print("| network, pixels | runtime | " + " | ".join(f"batch {n}" for n in BATCHES) + " | start | memory |")
    print("|" + "---|" * (len(BATCHES) + 4))
    for row in rows:
        rates = " | ".join(f"{row['rates'][n]:.0f}" for n in BATCHES)
        print(f"| {row['net']} | {row['arm']} | {rates} | {row['seconds']:.2f} s | {row['megabytes']:.0f} MB |")
    print(json.dumps({"rows": rows}))


def _compare(bundle: Path) -> list[dict[str, Any]]:
    info = open_bundle(str(bundle))
    arms = {name: arm for name, arm in ARMS.items() if arm[0] in info.files}
    runtimes = {name: kind((bundle / file).read_bytes(), threads=1) for name, (file, kind) in arms.items()}
    rates: dict[str, dict[int, float]] = {name: {} for name in arms}
    for images in BATCHES:
        pixels_BHWC = _pixels(info.pixels.input_size, images)
        passes = {name: partial(runtime.score, pixels_BHWC) for name, runtime in runtimes.items()}
        for name, rate in measure_rates(passes, dict.fromkeys(arms, images), seconds=SECONDS).items():
            rates[name][images] = rate
    net = f"{info.net.get('backbone', info.net.get('family'))}, {info.pixels.input_size}"
    return [{"net": net, "arm": name, "rates": rates[name], **_fresh_start(bundle, name)} for name in arms]


def _pixels(size: int, images: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8)


def _fresh_start(bundle: Path, arm: str) -> dict[str, float]:
    """Give the smallest figures of three fresh processes."""
    command = [sys.executable, "-m", __spec__.name, "--bundle", str(bundle), "--start", arm]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    return {name: min(one[name] for one in found) for name in found[0]}


def _start(bundle: Path, arm: str) -> dict[str, float]:
    """Measure a core's seconds from importing the library to the first batch, and what memory scoring then adds."""
    file, kind = ARMS[arm]
    model, pixels_BHWC = (bundle / file).read_bytes(), _pixels(open_bundle(str(bundle)).pixels.input_size, 8)
    before, started = _memory_mb(), time.process_time()
    runtime = kind(model, threads=1)
    runtime.score(pixels_BHWC)
    seconds = time.process_time() - started
    for images in (8, 5, 8):
        runtime.score(pixels_BHWC[:images])
    return {"seconds": seconds, "megabytes": _memory_mb() - before}


def _memory_mb() -> float:
    """Read this process's share of memory, as shared pages are counted in parts."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
