"""Runs the whole flow on Stanford Cars: prepare, tune, evaluate, classify from bucket to bucket, and as Ray jobs.

    python -m jobs.bench.cars --data ../shared/stanford-cars --work runs/cars

Appends a row to results/cars.csv, and writes tables and pictures to results/cars/. Resumes what `--work` already holds.
The buckets are in a real object store on loopback (extra `dev`). Cost: 50 minutes on two cores, 40 of them the search;
`--submit` adds 12. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd

import carray
from carray.core.store.files import write_json
from carray.core.store.listing import list_keys
from carray.testing.object_store import S3Server, start_store
from jobs.bench.rows import ROOT, Program, prepare_cars, run_carray, set_words

CONFIG = "jobs/configs/cars-cpu.yaml"
TABLES = ("per_class", "confused_pairs", "levels", "confusion_kinds", "calibration", "coverage")
"""Tables of an evaluation that hold no path of this machine."""
PICTURES = (
    *("Accuracy by level", "Kinds of mistakes", "Scores before calibration", "Scores after calibration"),
    "Accuracy of what is accepted",
)
"""Pictures of the evaluation's page without photographs."""
SUBMITTED_MINUTES = 6
"""Budget of the submitted search: it shows that the job runs, and is too short for a comparison."""
_PAGE_STYLE = 'style="background: {paper}; font-family: sans-serif"'
_DASHBOARD = "http://127.0.0.1:8275"


def main() -> None:
    """Run the flow, and write the results."""
    program = Program(__doc__, "cars.csv")
    program.cars_options("cars")
    program.option("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the search")
    program.option("--submit", action="store_true", help="also submit both jobs to a Ray started for it")
    arguments = program.parse()
    program.check_cars()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    search = ["--config", CONFIG, *set_words(arguments.set)]
    row = learn(arguments.data.resolve(), work, search)
    with start_store(work / "store") as store:
        os.environ.update(store.environment)
        row |= classify_bucket(arguments.data.resolve(), work, store)
        if arguments.submit:
            row |= submit_jobs(work, arguments.set)
    keep_results(work)
    program.record([row])
    print(json.dumps(row))


def learn(data: Path, work: Path, search: list[str]) -> dict[str, Any]:
    """Prepare, tune and evaluate; returns the figures of the winner."""
    manifest = prepare_cars(data, work)
    run_carray("tune", "--manifest", manifest, "--out", work / "run", *search)
    run_carray("leaderboard", work / "run")
    run_carray("evaluate", work / "run" / "bundle", "--manifest", manifest, "--out", work / "evaluation")
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())
    trials, epochs = (pd.read_parquet(work / "run" / f"{name}.parquet") for name in ("trials", "epochs"))
    started = pd.Timestamp(json.loads((work / "run" / "search.json").read_text())["created_at"])
    minutes = (pd.to_datetime(epochs["logged_at"]).max() - started).total_seconds() / 60
    return {
        "trials": len(trials),
        "epochs": len(epochs),
        "search_minutes": round(minutes, 1),
        "winner": trials["trial_id"].iloc[0],
        "val_top1": round(float(trials["val_top1"].iloc[0]), 4),
        "test_top1": metrics["top1"],
        "test_top5": metrics["top5"],
        "test_images": metrics["images"],
    }


def classify_bucket(data: Path, work: Path, store: S3Server) -> dict[str, Any]:
    """Upload cars_test to one bucket, classify it into another, and compute the accuracy with pandas."""
    store.create_bucket("photos", {f"cars_test/{path.name}": path for path in (data / "cars_test").iterdir()})
    store.create_bucket("predictions")
    uploaded, out = sum(1 for _ in list_keys("s3://photos/cars_test")), "s3://predictions/cars_test"
    outcome = run_carray("classify", work / "run" / "bundle", "s3://photos/cars_test", "--out", out)
    return {
        "bucket_images": uploaded,
        "bucket_rows": outcome["rows"],
        "bucket_top1": accuracy_of(out, work / "manifest.parquet"),
        "classify_seconds": outcome["seconds"],
        "classify_images_per_second": outcome["images_per_second"],
    }


def accuracy_of(predictions: str, manifest: Path) -> float:
    """Compute the share of rows whose label is the manifest's, joined by file name."""
    rows = carray.read_predictions(predictions, columns=["uri", "label"])
    truth = pd.read_parquet(manifest).query("split == 'test'")
    rows["name"], truth["name"] = rows["uri"].str.rsplit("/", n=1).str[-1], truth["uri"].str.rsplit("/", n=1).str[-1]
    joined = rows.merge(truth, on="name", suffixes=("", "_true"), validate="one_to_one")
    if len(joined) != len(rows):
        raise SystemExit(f"{len(rows) - len(joined)} rows of {predictions} have no truth in {manifest}")
    return float((joined["label"] == joined["label_true"]).mean())


def submit_jobs(work: Path, changes: list[str]) -> dict[str, Any]:
    """Submit both jobs to a Ray head with a token, started here on loopback and ended by its pid."""
    token = work / "token"
    token.write_text(os.urandom(16).hex() * 2)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ports = {"port": 6399, "dashboard-port": 8275, "dashboard-agent-listen-port": 8276}
    command = [_ray(), "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += [f"--{name}={number}" for name, number in ports.items()]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    manifest, run_folder, out = work / "manifest.parquet", work / "submitted-run", "s3://predictions/submitted"
    limit = "search.time_budget_minutes"
    others = [change for change in changes if not change.startswith(f"{limit}=")]
    search = ["--config", CONFIG, *set_words([*others, f"{limit}={SUBMITTED_MINUTES}"])]
    try:
        _wait_for_head(environment)
        tuned = _submit(environment, "tune.py", "--manifest", manifest, "--out", run_folder, *search)
        scored = _submit(environment, "classify.py", work / "run" / "bundle", "s3://photos/cars_test", "--out", out)
    finally:
        head.terminate()
        head.wait()
        token.unlink()
    return {
        "submitted_search_trials": tuned["trials"],
        "submitted_search_val_top1": tuned["best_val_top1"],
        "submitted_classify_rows": scored["rows"],
        "submitted_classify_top1": accuracy_of(out, manifest),
    }


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _wait_for_head(environment: dict[str, str]) -> None:
    for _ in range(60):
        command = [_ray(), "job", "list", "--address", _DASHBOARD]
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(2)
    raise SystemExit("the Ray head did not answer within two minutes")


def _submit(environment: dict[str, str], job: str, *arguments: object) -> dict[str, Any]:
    """Submit one job as cluster/README.md says, and follow it; returns the JSON of its last line."""
    command = [_ray(), "job", "submit", "--address", _DASHBOARD, "--working-dir", ".", "--", sys.executable]
    command += [f"jobs/{job}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-4000:], file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"the submitted {job} failed")
    return dict(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))


def keep_results(work: Path) -> None:
    """Copy tables and pictures to results/cars/."""
    folder = ROOT / "results" / "cars"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [work / "run" / name for name in ("trials", "epochs")] + [work / "evaluation" / name for name in TABLES]
    for source in sources:
        pd.read_parquet(f"{source}.parquet").to_csv(folder / f"{source.name}.csv", index=False)
    shutil.copy(work / "run" / "curves.png", folder)
    shutil.copy(work / "evaluation" / "confusion.png", folder)
    shutil.copy(work / "run" / "bundle" / "bundle.json", folder)
    save_pictures(work / "evaluation" / "report.html", folder, PICTURES)
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())
    paths = ("bundle", "manifest")  # of this machine
    write_json(str(folder / "metrics.json"), {name: value for name, value in metrics.items() if name not in paths})


def save_pictures(page: Path, folder: Path, titles: Collection[str]) -> None:
    """Write the SVG pictures of a page with these titles as files, in the colours of the page's light theme."""
    text = page.read_text()
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", text[text.index(":root") : text.index("@media")]))
    for svg in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL):
        title = unescape(re.search(r"<title[^>]*>(.*?)</title>", svg, flags=re.DOTALL)[1])  # type: ignore[index]
        if title not in titles:
            continue
        svg = svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {_PAGE_STYLE.format(**colours)} ', 1)
        file = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        file.write_text(re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], svg) + "\n")


if __name__ == "__main__":
    main()
