"""Searches on one GPU of a machine that has torch and no package registry: packs here, runs there.

    python jobs/bench_gpu.py pack --data ../shared/stanford-cars --out runs/gpu-pack
    python jobs/bench_gpu.py run --pack runs/gpu-pack --work runs/gpu --out gpu.json --slice-minutes 9
    python jobs/bench_gpu.py record gpu.json

`pack` writes parts of at most --limit-mib, to be carried with the clone one after another. `run` needs Python 3.11 or
newer with torch, torchvision, numpy and Pillow; what else carray's fit imports travels in the pack, or is stood in
for. It ends after --slice-minutes at the latest; where it prints {"again": true}, the same command goes on. `record`
writes a row of results/gpu.csv. There is no Ray: jobs/bench/gpu_search.py halves synchronously.
Not yet run on a GPU: `run --quick` was tried on a CPU, in a Python without pandas, pyarrow, OpenCV and Ray.
Cost: on the GPU the time budget of --config (20 minutes); packing takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.bench.gpu_machine import unpack_wheels
from jobs.bench.rows import ORIGIN, append_rows, origin

CONFIG = "jobs/configs/cars-gpu.yaml"
COLUMNS = [
    *ORIGIN,
    *["torch", "trials", "epochs", "search_minutes", "refitted", "val_top1", "test_images", "test_top1", "test_top5"],
    *["test_loss", "temperature", "stood_in_for", "winner"],
]


def main() -> None:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers()
    parser.set_defaults(command=lambda _: parser.print_help())  # `make bench` names no part
    beside = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))
    packing = commands.add_parser("pack", help="write what travels")
    packing.add_argument("--data", default=beside, type=Path, help="Stanford Cars in its devkit's layout")
    packing.add_argument("--manifest", help="one that carray prepare made of it already")
    packing.add_argument("--out", default=ROOT / "runs" / "gpu-pack", type=Path, help="folder of the parts; replaced")
    packing.add_argument("--limit-mib", default=59.0, type=float, help="of a part")
    packing.add_argument("--python", default="3.12", help="the other machine's, for compiled wheels")
    packing.set_defaults(command=pack)
    running = commands.add_parser("run", help="search, refit and measure, on the other machine")
    running.add_argument("--pack", default=ROOT / "runs" / "gpu-pack", type=Path, help="folder of the parts")
    running.add_argument("--work", default=ROOT / "runs" / "gpu", type=Path, help="where the search keeps its state")
    running.add_argument("--out", default=Path("gpu.json"), type=Path, help="the result")
    running.add_argument("--config", default=str(ROOT / CONFIG), help="YAML file of settings")
    running.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting of the search")
    running.add_argument("--slice-minutes", default=9.0, type=float, help="end by then; repeat the command to go on")
    running.add_argument("--workers", default=4, type=int, help="trials that share the device at once")
    running.add_argument("--quick", action="store_true", help="three tiny trials on a few images, on any machine")
    running.set_defaults(command=run)
    recording = commands.add_parser("record", help="append a result to results/gpu.csv")
    recording.add_argument("result", type=Path, help="what run wrote")
    recording.set_defaults(command=record)
    arguments = parser.parse_args()
    arguments.command(arguments)


def pack(arguments: argparse.Namespace) -> None:
    """Write the parts, and say how to use them."""
    from jobs.bench.gpu_pack import pack as write_parts

    manifest = arguments.manifest
    if manifest is None:
        manifest = str(arguments.out.parent / "gpu-manifest.parquet")
        command = [sys.executable, "-m", "carray", "prepare", str(arguments.data.resolve()), "--out", manifest]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    shutil.rmtree(arguments.out, ignore_errors=True)
    about = origin("jobs/bench_gpu.py pack")
    parts = write_parts(
        manifest, arguments.out, limit_mib=arguments.limit_mib, python=arguments.python, commit=about["commit"]
    )
    for place, mebibytes in parts:
        print(f"{place}  {mebibytes:.1f} MiB")
    print(json.dumps({"parts": len(parts), "mebibytes": round(sum(size for _, size in parts), 1)}))


def run(arguments: argparse.Namespace) -> None:
    """Search with what travelled, and write the result."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    unpacked = unpack_wheels(arguments.pack, work / "site")
    from jobs.bench.gpu_search import run_search

    result = run_search(
        arguments.pack,
        work,
        config=arguments.config,
        overrides=arguments.set,
        slice_minutes=arguments.slice_minutes,
        workers=arguments.workers,
        quick=arguments.quick,
    )
    if result is None:
        print(json.dumps({"again": True}))
        return
    words = ["jobs/bench_gpu.py run", *(f"--set {word}" for word in arguments.set)]
    about = origin(" ".join([*words, *(["--quick"] if arguments.quick else [])]), accelerator=result["device"])
    document: dict[str, Any] = {**about, **result, "unpacked": unpacked}
    arguments.out.write_text(json.dumps(document, indent=1))
    named = ("search_minutes", "trials", "epochs", "refitted", "val_top1", "test_top1", "test_top5", "test_loss")
    print(json.dumps({name: document[name] for name in named}))


def record(arguments: argparse.Namespace) -> None:
    """Append a result to results/gpu.csv."""
    result = json.loads(arguments.result.read_text())
    result["winner"] = json.dumps(result["winner"])
    result["stood_in_for"] = " ".join(result["stood_in_for"])
    append_rows(ROOT / "results" / "gpu.csv", COLUMNS, [{name: result[name] for name in COLUMNS}])


if __name__ == "__main__":
    main()
