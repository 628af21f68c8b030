"""Jobs submitted to a real Ray head with a token, as cluster/README.md says; its nodes have no carray of their own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from carray.testing.object_store import free_ports

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(ray_folder: Path) -> Iterator[dict[str, str]]:
    """Start a head on this machine; gives the environment of somebody who submits."""
    folder = ray_folder
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    named = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_TMPDIR": str(folder)}
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "RAY_ADDRESS"}}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])  # the environment's python and ray
    environment = {**kept, **named, "PATH": path}
    port, dashboard, agent = free_ports(3)
    options = f"--head --block --num-cpus=1 --port={port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard}"
    command = [RAY, "start", *options.split(), f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        submitter = {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        _wait_ready(submitter)
        yield submitter
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_ready(environment: dict[str, str]) -> None:
    until = time.monotonic() + 90
    while (done := ray(environment, "job", "list")).returncode:
        if time.monotonic() > until:
            raise RuntimeError(f"Ray's job server did not get ready:\n{done.stdout[-2000:]}")
        time.sleep(1)


def ray(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_a_job_from_the_working_directory(
    head: dict[str, str], small_bundle: str, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    submit = ["job", "submit", "--working-dir", ".", "--", "python", "jobs/classify.py", small_bundle]
    done = ray(head, *submit, str(image_folder), "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:]
    outcome = json.loads((out / "_carray" / "done.json").read_text())
    assert (outcome["images"], outcome["rows"]) == (12, 12)
    again = ray(head, *submit, str(image_folder), "--out", str(out))
    assert again.returncode == 0 and "nothing to do, all 12 images" in again.stdout


def test_a_node_without_carray_is_a_line_in_the_jobs_log(head: dict[str, str]) -> None:
    done = ray(head, "job", "submit", "--", "python", "-P", "-m", "carray", "tune", "--help")
    assert done.returncode != 0 and "No module named carray" in done.stdout


def test_who_has_no_token_submits_nothing(head: dict[str, str], tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    done = ray({**head, "RAY_AUTH_TOKEN_PATH": str(wrong)}, "job", "submit", "--", "python", "-c", "print('inside')")
    assert done.returncode != 0
    assert (
        "Authentication failed: Forbidden: Invalid authentication token" in done.stdout
        and "inside\n" not in done.stdout
    )
