"""Runs the whole flow once on Stanford Cars: prepare, tune, evaluate, classify from bucket to bucket, and as Ray jobs.

    python jobs/bench_cars.py --data ../shared/stanford-cars --work runs/cars

From: the devkit layout (cars_train/, cars_test/, devkit/). To: a row in results/cars.csv, tables and pictures in
results/cars/. What `--work` already holds is not done again, since every stage only does what is missing. The buckets
lie in a real object store on loopback (extra `dev`). Cost: 50 minutes on two cores, 40 of them the search; `--submit`
adds 12. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd

import carray
from carray.core.store.files import write_json
from carray.core.store.listing import list_keys
from carray.testing.object_store import S3Server, start_store
from jobs.bench.page_pictures import save_pictures

CONFIG = "jobs/configs/cars-cpu.yaml"
SUBMITTED_COLUMNS = [
    f"submitted_{name}" for name in ("search_trials", "search_val_top1", "classify_rows", "classify_top1")
]
"""Of a row; empty without --submit."""
EVALUATED = ("per_class", "confused_pairs", "levels", "confusion_kinds", "calibration", "coverage")
"""Tables of an evaluation that hold no place of this machine."""
PICTURES = (
    *("Accuracy by level", "Kinds of mistakes", "Scores before calibration", "Scores after calibration"),
    "Accuracy of what is accepted",
)
"""Of the evaluation's page, those without photographs."""
SUBMITTED_MINUTES = 6
"""Of the search that is submitted as a job: enough to show that it runs, too short to be compared."""


def main() -> None:
    """Run what the arguments ask for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))
    parser.add_argument("--data", default=beside, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--work", default=ROOT / "runs" / "cars", type=Path, help="where manifest, run and so on lie")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting of the search")
    parser.add_argument("--submit", action="store_true", help="also submit both jobs to a Ray started for it")
    arguments = parser.parse_args()
    if not (arguments.data / "devkit").is_dir():
        parser.error(f"--data is {arguments.data}, which holds no devkit/; give the folder of Stanford Cars")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    search = ["--config", CONFIG, *(word for setting in arguments.set for word in ("--set", setting))]
    row = learn(arguments.data.resolve(), work, search)
    with start_store(work / "store") as store:
        os.environ.update(store.environment)
        row |= classify_bucket(arguments.data.resolve(), work, store)
        if arguments.submit:
            row |= submit_jobs(work, search)
    keep_results(work, row, arguments.set)
    print(json.dumps(row))


def run(*arguments: object, **options: Any) -> str:
    """Run a carray command; its standard output, while its progress goes to ours."""
    command = [sys.executable, "-m", "carray", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, **options)
    return done.stdout


def learn(data: Path, work: Path, search: list[str]) -> dict[str, Any]:
    """Prepare, tune and evaluate; the figures of the winner."""
    manifest = work / "manifest.parquet"
    if not manifest.exists():
        print(run("prepare", data, "--out", manifest))
    run("tune", "--manifest", manifest, "--out", work / "run", *search)
    print(run("leaderboard", work / "run"))
    print(run("evaluate", work / "run" / "bundle", "--manifest", manifest, "--out", work / "evaluation"))
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
    """Upload cars_test to one bucket, classify it into another, and ask pandas how many were right."""
    client = store.client()
    for bucket in ("photos", "predictions"):
        client.create_bucket(Bucket=bucket)
    for path in sorted((data / "cars_test").iterdir()):
        client.put_object(Bucket="photos", Key=f"cars_test/{path.name}", Body=path.read_bytes())
    uploaded = sum(1 for _ in list_keys("s3://photos/cars_test"))
    out = "s3://predictions/cars_test"
    outcome = json.loads(
        run("classify", work / "run" / "bundle", "s3://photos/cars_test", "--out", out).splitlines()[-1]
    )
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


def submit_jobs(work: Path, search: list[str]) -> dict[str, Any]:
    """Submit both jobs to a Ray head with a token, started here on loopback and ended here by its pid."""
    token = work / "token"
    token.write_text(os.urandom(16).hex() * 2)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ports = {"port": 6399, "dashboard-port": 8275, "dashboard-agent-listen-port": 8276}
    command = ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += [f"--{name}={number}" for name, number in ports.items()]
    ray = Path(sys.executable).parent
    head = subprocess.Popen([str(ray / command[0]), *command[1:]], env=environment, stdout=subprocess.DEVNULL)
    manifest, run_folder, out = work / "manifest.parquet", work / "submitted-run", "s3://predictions/submitted"
    limit = f"search.time_budget_minutes={SUBMITTED_MINUTES}"
    try:
        wait_for_head(environment)
        tuned = submit(environment, "tune.py", "--manifest", manifest, "--out", run_folder, *search, "--set", limit)
        scored = submit(environment, "classify.py", work / "run" / "bundle", "s3://photos/cars_test", "--out", out)
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


def wait_for_head(environment: dict[str, str]) -> None:
    """Wait until the job server answers."""
    ray = str(Path(sys.executable).parent / "ray")
    for _ in range(60):
        command = [ray, "job", "list", "--address", "http://127.0.0.1:8275"]
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(2)
    raise SystemExit("the Ray head did not answer within two minutes")


def submit(environment: dict[str, str], job: str, *arguments: object) -> dict[str, Any]:
    """Submit one job as cluster/README.md says and follow it; its last line, which is JSON."""
    submit = ["job", "submit", "--address", "http://127.0.0.1:8275", "--working-dir", "."]
    command = [
        str(Path(sys.executable).parent / "ray"),
        *submit,
        "--",
        sys.executable,
        f"jobs/{job}",
        *map(str, arguments),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-4000:], file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"the submitted {job} failed")
    return dict(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))


def keep_results(work: Path, row: dict[str, Any], settings: list[str]) -> None:
    """Copy tables and pictures to results/cars/ and append the row to results/cars.csv."""
    place = ROOT / "results" / "cars"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("trials", "epochs"):
        pd.read_parquet(work / "run" / f"{name}.parquet").to_csv(place / f"{name}.csv", index=False)
    for name in EVALUATED:
        pd.read_parquet(work / "evaluation" / f"{name}.parquet").to_csv(place / f"{name}.csv", index=False)
    shutil.copy(work / "run" / "curves.png", place)
    shutil.copy(work / "evaluation" / "confusion.png", place)
    shutil.copy(work / "run" / "bundle" / "bundle.json", place)
    save_pictures(work / "evaluation" / "report.html", place, PICTURES)
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())
    places = ("bundle", "manifest")  # of this machine, and nobody else's business
    write_json(str(place / "metrics.json"), {name: value for name, value in metrics.items() if name not in places})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    note = {
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit.stdout.strip(),
        "machine": f"{processor()}, {os.cpu_count()} cores, no accelerator",
        "command": " ".join(["jobs/bench_cars.py", *(f"--set {setting}" for setting in settings)]),
    }
    submitted = {name: row.get(name, "") for name in SUBMITTED_COLUMNS}
    row = {name: value for name, value in row.items() if name not in submitted} | submitted
    table = ROOT / "results" / "cars.csv"
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*note, *row])
        if fresh:
            writer.writeheader()
        writer.writerow(note | row)


def processor() -> str:
    """Name this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
