"""No secret of the environment appears in an artifact, a log, a ledger or anything that Ray lists."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from secret_search import files_below, leaks

from carray.core.tables import write_table
from carray.testing.drawing import DEMO_CLASSES, draw_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def canaries() -> dict[str, str]:
    names = "WRONG_SECRET HF_TOKEN MLFLOW_TRACKING_PASSWORD RAY_AUTH_TOKEN GITHUB_TOKEN".split()
    return {name: secrets.token_hex(20) for name in names}


@pytest.fixture(scope="module")
def left(tmp_path_factory, s3_server, canaries) -> Iterator[tuple[Path, str, list[tuple[str, bytes]]]]:
    """Run the whole flow with known secrets in the environment; gives the folder, the output and all that it left."""
    folder, bucket = tmp_path_factory.mktemp("flow"), f"secrets-{secrets.token_hex(6)}"
    client = s3_server.client()
    client.create_bucket(Bucket=bucket)
    draw_dataset(folder / "images", images_per_class=8)
    for label in DEMO_CLASSES[:2]:
        for path in sorted((folder / "images" / label).iterdir()):
            client.put_object(Bucket=bucket, Key=f"images/{label}/{path.name}", Body=path.read_bytes())
    client.put_object(Bucket=bucket, Key="images/broken.jpg", Body=b"no image")
    home = Path(tempfile.mkdtemp(prefix="ray-"))  # short: the names of Ray's sockets have 107 letters at most
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    places = {"CARRAY_CACHE": str(folder / "cache"), "RAY_TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("whole_flow.py"), folder, f"s3://{bucket}"],
        env={**kept, **places, **s3_server.environment, **canaries, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        timeout=400,
        check=False,
        cwd=folder,
    )
    output = (done.stdout + done.stderr).decode()
    (folder / "output.txt").write_text(output)
    try:
        assert done.returncode == 0, output[-4000:]
        objects = [
            (entry["Key"], client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read())
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for entry in page["Contents"]
        ]
        yield folder, output, [("output", output.encode()), *objects, *files_below(folder, home)]
    finally:
        os.environ.get("KEEP") or shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_the_flow_came_to_its_results_and_to_its_errors(left) -> None:
    folder, output, blobs = left
    for command in ("prepare", "tune", "evaluate", "report"):
        assert f"exit 0: {command}" in output, output[-3000:]
    assert "exit 4: classify" in output or "exit 3: classify" in output  # wrong credentials
    names = [name for name, _ in blobs]
    for wanted in ("run/bundle/bundle.json", "predictions/_carray/ledger/", "run/log/", "ray.json"):
        assert any(wanted in name for name in names), wanted
    assert any("/logs/" in name and "raylet" in name for name in names)
    told = json.loads((folder / "ray.json").read_text())
    assert "ResourceTrainable" in told["v0/actors?detail=true"]  # a trial, whose environment Ray lists
    if told["log"] == "no agent came that could start a job":
        pytest.skip("Ray started no agent for jobs in time; all else is searched, but a submitted job")
    assert "job SUCCEEDED" in output and any("as-a-job/" in name for name in names)
    assert "-m carray classify" in told["jobs/"]


@pytest.mark.slow
def test_no_secret_comes_out(left, canaries, s3_server) -> None:
    assert leaks({**canaries, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}, left[2]) == []


@pytest.mark.parametrize("shift", range(3))
def test_the_search_finds_a_secret_wherever_it_lies(tmp_path, shift) -> None:
    import base64
    import gzip

    secret = secrets.token_hex(20)
    table = pa.table({"error": [f"refused {secret}"] * 3})
    write_table(table, f"{tmp_path}/value.parquet", kind="k", version=1)
    write_table(pa.table({"a": [1]}), f"{tmp_path}/note.parquet", kind="k", version=1, provenance={"by": secret})
    with pa.ipc.new_file(
        f"{tmp_path}/shard.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(table)
    (tmp_path / "plain.txt").write_text(f"x{secret}y")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(secret.encode()))
    (tmp_path / "encoded.txt").write_bytes(base64.b64encode(b"k" * shift + secret.encode() + b"tail"))
    (tmp_path / "clean.txt").write_text(secret[:-1])
    found = leaks({"it": secret}, files_below(tmp_path))
    assert len(set(found)) == 6 and not any("clean" in line for line in found)
