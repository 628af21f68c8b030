"""Measures the search: its speed beside the recipe of Ray's documentation, what early stopping saves, what it reaches.

    python jobs/bench_tune.py --data ../shared/stanford-cars [--work runs/bench-tune] [--parts cnn,frozen] [--quick]

From: the devkit layout (cars_train/, cars_test/, devkit/). To: rows of results/tune.csv, one a measured arm, and curves
in results/tune/. Every part has the same manifest, made once.

    fixed      what a trial costs beside its training: (seconds of n trials - seconds of 1) / (n - 1)
    cnn        epochs per core-minute of a small CNN at 64 pixels, both arms; cnn_wide: of one twice as wide
    frozen     of EfficientNet-Lite0 at 160 pixels, its last two stages learning
    all        of the whole of it, one epoch on a quarter of the images
    curves     trains 32 configurations in full, on a quarter of the classes, and replays them; replay: only that, from
               the committed curves
    live       one search with ASHA over the same configurations
    rung0      how rung 0 ranks backbones and sizes, beside what they come to, on half of the classes
    accuracy   one search by jobs/configs/cars-cpu.yaml with its final fit, measured on cars_test once

Cost on two cores: fixed to all 30 minutes, curves and live 10, rung0 5, accuracy 55. `--quick` runs every part on a
few images in minutes, to see that it works, and writes to the work folder only. Ends with one JSON line;
`epochs_times_recipe` is the smaller of cnn and frozen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench import accuracy, curves, ranks, rates, subsets
from jobs.bench.rows import ORIGIN, ROOT, append_rows, origin, table_text

PARTS = ["fixed", "cnn", "frozen", "all", "curves", "live", "rung0", "accuracy"]
MORE_PARTS = ["cnn_wide", "replay"]
COLUMNS = [
    *ORIGIN,
    *["part", "arm", "train_images", "val_images", "input_size", "trials", "epochs", "repeats", "wall_seconds"],
    *["epochs_per_core_minute", "steady_epochs_per_core_minute", "times_recipe", "steady_times_recipe"],
    *["fixed_seconds_per_trial", "shuffles", "target_val_top1", "seconds_to_target", "sooner_times", "sooner_low"],
    *["sooner_high", "sooner_median_low", "sooner_median_high", "candidates", "spearman", "search_minutes"],
    *["refit_minutes", "total_minutes", "val_top1", "test_top1", "test_top5", "test_loss"],
    *["reference_images_per_second", "note"],
]


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    arguments = _arguments()
    work = arguments.work.resolve()
    shutil.rmtree(work / "measured", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(arguments, work)
    results = (work / "results") if arguments.quick else ROOT / "results"
    about = origin(" ".join(["jobs/bench_tune.py", *_words(arguments)]))
    done: list[dict[str, Any]] = []
    for part in arguments.parts:
        print(f"== {part}", flush=True)
        rows = _measure(part, arguments, manifest, work / "measured", results / "tune")
        append_rows(results / "tune.csv", COLUMNS, [about | row for row in rows])
        print(table_text(rows, COLUMNS), flush=True)
        done += rows
    print("\n" + table_text(done, [name for name in COLUMNS if name not in {*ORIGIN, "note"}]))
    print(json.dumps(_summary(done)))


def _measure(
    part: str, arguments: argparse.Namespace, manifest: str, work: Path, results: Path
) -> list[dict[str, Any]]:
    quick = arguments.quick
    plan = curves.QUICK if quick else curves.FULL
    if part == "fixed":
        return rates.measure_fixed(manifest, work, quick=quick)
    if part in rates.CASES:
        case = (rates.QUICK_CASES if quick else rates.CASES)[part]
        return rates.measure_case(case, manifest, work, loaders=arguments.loaders)
    if part == "curves":
        row = curves.train_curves(plan, manifest, work, results)
        return [row, *curves.replay_curves(results)[0]]
    if part == "replay":
        return curves.replay_curves(results)[0]
    if part == "live":
        return curves.run_live(plan, manifest, work, results, curves.replay_curves(results)[1])
    if part == "rung0":
        return [ranks.measure_rung0(manifest, work, results, quick=quick)]
    config, extra = (_QUICK_CONFIG, _QUICK_SEARCH) if quick else (accuracy.CONFIG, [])
    return [accuracy.measure_accuracy(manifest, work, config=config, extra=extra)]


_QUICK_CONFIG = "jobs/configs/quick.yaml"
_QUICK_SEARCH = ["--trials", "2", "--epochs", "1", "--set", "search.refit=true"]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the figures that are looked for first; null where the part was not run."""

    def of(part: str, arm: str, name: str) -> Any:
        return next((row.get(name) for row in rows if row["part"] == part and row["arm"] == arm), None)

    times = [of(part, "carray", "times_recipe") for part in ("cnn", "frozen")]
    return {
        "epochs_times_recipe": None if None in times else min(times),
        "sooner_times_unpruned": of("replay", "asha", "sooner_times"),
        "sooner_interval": [of("replay", "asha", "sooner_low"), of("replay", "asha", "sooner_high")],
        "sooner_live": of("live", "asha", "sooner_times"),
        "all_times_recipe": of("all", "carray", "times_recipe"),
        "fixed_seconds_per_trial": of("fixed_frozen", "carray", "fixed_seconds_per_trial"),
        "rung0_spearman": of("rung0", "carray", "spearman"),
        "test_top1": of("accuracy", "carray", "test_top1"),
        "total_minutes": of("accuracy", "carray", "total_minutes"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))
    parser.add_argument("--data", default=beside, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--manifest", help="one that carray prepare made of it already")
    parser.add_argument("--work", default=ROOT / "runs" / "bench-tune", type=Path, help="where searches run")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join([*PARTS, *MORE_PARTS])}")
    parser.add_argument("--loaders", default=0, type=int, help="the recipe's DataLoader processes a trial")
    parser.add_argument("--quick", action="store_true", help="a few images, to see that it works")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts.split(",")
    unknown = sorted(set(arguments.parts) - {*PARTS, *MORE_PARTS})
    if unknown:
        parser.error(f"--parts has {', '.join(unknown)}; allowed are {', '.join([*PARTS, *MORE_PARTS])}")
    if arguments.manifest is None and not (arguments.data / "devkit").is_dir():
        parser.error(f"--data is {arguments.data}, which holds no devkit/; give the folder of Stanford Cars")
    return arguments


def _manifest(arguments: argparse.Namespace, work: Path) -> str:
    if arguments.manifest:
        manifest = str(Path(arguments.manifest).resolve())
    else:
        manifest = str(work / "manifest.parquet")
        if not Path(manifest).exists():
            print(accuracy.run_carray("prepare", arguments.data.resolve(), "--out", manifest))
    if not arguments.quick:
        return manifest
    return subsets.first_classes(manifest, 6, work / "quick.parquet", train=12, val=4, test=4).uri


def _words(arguments: argparse.Namespace) -> list[str]:
    """Give the arguments as they are to be repeated, without places of this machine."""
    words = [] if arguments.parts == PARTS else ["--parts", ",".join(arguments.parts)]
    return [*words, *(["--loaders", str(arguments.loaders)] if arguments.loaders else [])]


if __name__ == "__main__":
    main()
