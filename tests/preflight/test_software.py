"""What the software checks say of a machine where something is missing, too old, broken, or dies."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from carray.preflight import doctor, isolated, machine

REAL_VERSION = importlib.metadata.version


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch):
    """Give a function that pretends versions of distributions; None is not installed."""

    def pretend(**given: str | None) -> None:
        def version(name: str) -> str:
            if name not in given:
                return REAL_VERSION(name)
            if given[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return str(given[name])

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_every_declared_version_is_known_and_met_here():
    packages, search = machine.check_packages()
    assert {packages.status, search.status} == {"ok"}
    assert not search.absent
    wanted = machine.requirements()
    assert wanted["ray"] == "2.60"
    assert wanted["Pillow"] == "11.3"
    assert set(machine.SEARCH_ONLY) < set(wanted)


def test_an_old_version_fails_with_the_line_that_mends_it(versions):
    versions(onnxruntime="1.9.2", duckdb=None)
    packages, _ = machine.check_packages()
    assert packages.status == "fail"
    assert packages.seen == "onnxruntime 1.9.2 is below 1.20, duckdb is missing"
    assert packages.remedy == "pip install 'duckdb>=2.0' 'onnxruntime>=1.20'"


def test_a_scoring_image_without_torch_is_no_failure(versions):
    versions(torch=None, torchvision=None, timm=None)
    packages, search = machine.check_packages()
    assert packages.status == search.status == "ok"
    assert search.absent
    assert search.seen.startswith("not installed: torch, torchvision, timm")


def test_an_old_torch_fails(versions):
    versions(torch="2.5.1+cu121", timm=None)
    _, search = machine.check_packages()
    assert search.status == "fail"
    assert "torch 2.5.1+cu121 is below 2.6" in search.seen


@pytest.mark.parametrize(
    ("version", "oldest", "new_enough"),
    [("2.6", "2.6.0", True), ("2.10", "2.9", True), ("1.20rc1", "1.20", True), ("1.9", "1.20", False), ("4", "", True)],
)
def test_versions_compare_as_numbers(version, oldest, new_enough):
    assert (machine._numbers(version) >= machine._numbers(oldest)) == new_enough


def shadow(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Put modules before the installed ones, for the processes that are started."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(machine, "ROOT", Path(os.pathsep.join([str(folder), str(machine.ROOT)])))


@pytest.mark.parametrize("part", ["decoders", "scoring"])
def test_parts_that_work_say_so(part):
    (found,) = doctor.look_in_process(part, title=part, seconds=60)
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("part", "modules", "seen", "remedy"),
    [
        (
            "decoders",
            {"cv2": "raise ImportError('libGL.so.1: cannot open shared object file')"},
            "libGL.so.1: cannot open shared object file",
            "uninstall opencv-python",
        ),
        ("scoring", {"onnxruntime": "import os, signal; os.kill(os.getpid(), signal.SIGILL)"}, "SIGILL", "newer"),
        ("scoring", {"onnxruntime": "import missing_thing"}, "No module named 'missing_thing'", "missing_thing"),
        ("training", {"torch": "raise OSError('libcudart.so.12: cannot open')"}, "libcudart.so.12", "CUDA"),
    ],
)
def test_what_cannot_be_imported_is_a_line(monkeypatch, tmp_path, part, modules, seen, remedy):
    shadow(tmp_path, monkeypatch, **modules)
    (found,) = doctor.look_in_process(part, title=part, seconds=60)
    assert (found.name, found.status) == (part, "fail")
    assert seen in found.seen
    assert remedy in found.remedy


def test_a_decoder_that_makes_other_colours_fails(monkeypatch, tmp_path):
    black = "import numpy as np\n__version__ = '0'\ndecode_jpeg = lambda *a, **k: np.zeros((16, 16, 3), np.uint8)\n"
    shadow(tmp_path, monkeypatch, simplejpeg=black)
    (found,) = doctor.look_in_process("decoders", title="decoders", seconds=60)
    assert found.status == "fail"
    assert found.seen == "jpeg: colours are off by 220 of 255"
    assert "simplejpeg" in found.remedy


def test_a_part_that_hangs_is_killed(monkeypatch, tmp_path):
    shadow(tmp_path, monkeypatch, onnxruntime="import time; time.sleep(60)")
    (found,) = doctor.look_in_process("scoring", title="scoring", seconds=1.5)
    assert (found.status, found.seen) == ("fail", "not finished within 2 s")


def test_weights_are_looked_for_in_packages_and_on_the_hub(monkeypatch):
    from carray.search.train import weights

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert isolated._look_for_weights().status == "ok"
    monkeypatch.setattr(weights, "package_file", lambda backbone: None)
    found = isolated._look_for_weights()
    assert found.status == "warn"
    assert "does not answer (http://127.0.0.1:9" in found.seen
    assert "carray[weights]" in found.remedy
