"""Runs every stage on an object store, on a private Ray with a job server, and then stores what Ray lists.

    python whole_flow.py FOLDER s3://BUCKET

From: drawn images. To: what the commands write into the bucket and FOLDER; FOLDER/ray.json holds Ray's own listings.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import ray
from ray.job_submission import JobSubmissionClient

from carray.__main__ import main
from carray.core.ray.connect import start_ray

SETTINGS = """
search: {trials: 1, epochs: 1}
pixels: {decode_size: 32, input_size: 24}
families: {cnn: {default: {input_size: 24, stages: 2, width: 4, batch_images: 8}}}
"""
NO_AGENT = "no agent came that could start a job"
LISTINGS = ("jobs/", "v0/actors?detail=true", "v0/tasks?detail=true", "v0/workers?detail=true", "v0/runtime_envs")


def run(*arguments: str) -> None:
    """Run a command line; click ends even a good one with SystemExit."""
    try:
        main(list(arguments))
    except SystemExit as end:
        print(f"exit {end.code or 0}: {arguments[0]}", flush=True)


def flow(folder: Path, bucket: str) -> None:
    """Run every stage, and commands that fail."""
    (folder / "settings.yaml").write_text(SETTINGS)
    manifest, bundle = f"{bucket}/manifest.parquet", f"{bucket}/run/bundle"
    run("prepare", f"{bucket}/images", "--out", manifest)
    run("tune", "--manifest", manifest, "--out", f"{bucket}/run", "--config", f"{folder}/settings.yaml")
    run("evaluate", bundle, "--manifest", manifest, "--split", "train", "--out", f"{folder}/evaluation")
    run("classify", bundle, f"{bucket}/images", "--out", f"{bucket}/predictions", "--set", "outputs=[embedding]")
    run("query", f"{bucket}/predictions", "by-label", "--out", f"{folder}/answer.csv")
    run("query", f"{bucket}/predictions", "SELECT getenv('HF_TOKEN')")
    run("report", f"{bucket}/predictions", "--out", f"{folder}/report.html")
    run("classify", bundle, f"{bucket}/nothing-here", "--out", f"{bucket}/nowhere")
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ["WRONG_SECRET"]
    run("classify", bundle, f"{bucket}/images", "--out", f"{folder}/denied")
    (folder / "table.csv").write_text(f"uri\n{bucket}/images/a.jpg\n")
    os.environ["AWS_SECRET_ACCESS_KEY"] = right


def submit(address: str, bucket: str) -> str:
    """Submit a classification as a job, wait for its end and return its log."""
    client = JobSubmissionClient(address)
    line = f"{sys.executable} -m carray classify {bucket}/run/bundle {bucket}/images --out {bucket}/as-a-job"
    job, until = "", time.monotonic() + 120
    while not job:
        try:
            job = client.submit_job(entrypoint=line)
        except RuntimeError as err:  # Ray's agent, which starts jobs, takes its time on a busy machine, or never comes
            if "No available agent" not in str(err):
                raise
            if time.monotonic() > until:
                return NO_AGENT
            time.sleep(1)
    while not client.get_job_status(job).is_terminal() and time.monotonic() < until:
        time.sleep(0.5)
    print(f"job {client.get_job_status(job)}", flush=True)
    return client.get_job_logs(job)


def listings(address: str) -> dict[str, str]:
    """Ask the job server for its jobs, actors, tasks, workers and environments."""
    asked = {}
    for name in LISTINGS:
        request = urllib.request.Request(f"{address}/api/{name}")
        request.add_header("Authorization", f"Bearer {os.environ['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            asked[name] = answer.read().decode()
    return asked


def main_flow(folder: Path, bucket: str) -> None:
    """Start the private Ray, with the job server that carray itself leaves out, and run."""
    init = ray.init
    ray.init = lambda **options: init(**{**options, "include_dashboard": True})
    with start_ray(num_cpus=2):
        flow(folder, bucket)
        address = f"http://{ray._private.worker.global_worker.node.webui_url}"
        log = submit(address, bucket)
        (folder / "ray.json").write_text(json.dumps({"log": log, **listings(address)}))


if __name__ == "__main__":
    main_flow(Path(sys.argv[1]), sys.argv[2])
