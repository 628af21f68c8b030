"""The documented submit lines: they parse, their files exist, and what they upload is the code and nothing else."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACES = ["README.md", "cluster/README.md", "jobs/tune.py", "jobs/classify.py"]
MOST_BYTES = 2_000_000
"""Of a packed clone, which Ray does not compress; its limit is 512 MiB (100 MB in its documentation)."""


def submit_lines() -> list[tuple[str, str]]:
    """Give (file, line) of each `ray job submit` in the documents, with its continuation lines."""
    found = []
    for place in PLACES:
        text = (ROOT / place).read_text().replace("\\\n", " ")
        found += [(place, line.strip()) for line in text.splitlines() if re.match(r"\s*ray job submit .*-- ", line)]
    return found


def entrypoint_of(line: str) -> list[str]:
    """Parse Ray's own options with Ray's own parser, as `ray job submit` does; gives what it would run."""
    from ray.dashboard.modules.job.cli import submit

    words = shlex.split(line)
    context = submit.make_context("submit", words[3:])
    return list(context.params["entrypoint"])


def check_command(words: list[str]) -> None:
    """Parse the arguments of carray with its own parser, without running anything."""
    import typer

    from carray.__main__ import app

    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), words[1]
        words = ["carray", Path(words[1]).stem, *words[2:]]
    elif words[:3] == ["python", "-m", "carray"]:
        words = words[2:]
    assert words[0] == "carray", words
    group = typer.main.get_command(app)
    group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]
    for file in [word for word in words if word.startswith("jobs/")]:
        assert (ROOT / file).exists(), file


def test_every_place_shows_both_jobs() -> None:
    for place in PLACES[:2]:
        lines = " ".join(line for where, line in submit_lines() if where == place)
        assert "jobs/tune.py" in lines and "jobs/classify.py" in lines, place
    assert "python -m carray tune" in (ROOT / "cluster" / "README.md").read_text()
    assert "python -m carray classify" in (ROOT / "cluster" / "README.md").read_text()


@pytest.mark.parametrize(("place", "line"), submit_lines())
def test_a_line_is_right_as_pasted(place: str, line: str) -> None:
    check_command(entrypoint_of(line))


@pytest.mark.parametrize("file", sorted((ROOT / "cluster" / "kuberay").glob("rayjob-*.yaml")), ids=lambda f: f.stem)
def test_a_manifests_entrypoint_is_right(file: Path) -> None:
    check_command(shlex.split(yaml.safe_load(file.read_text())["spec"]["entrypoint"]))


@pytest.mark.parametrize(
    "line",
    [
        "ray job submit --working-dirs . -- python jobs/tune.py --manifest m --out o",
        "ray job submit --working-dir . -- python jobs/tuna.py --manifest m --out o",
        "ray job submit --working-dir . -- python jobs/tune.py --manifest m --outt o",
        "ray job submit --working-dir . -- python jobs/tune.py --manifest m --out o --config jobs/configs/none.yaml",
    ],
)
def test_a_wrong_line_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|jobs/tuna\.py|jobs/configs/none\.yaml"):
        check_command(entrypoint_of(line))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a clone in which somebody has worked: data, runs, results, environments and downloads lie about."""
    folder = tmp_path_factory.mktemp("work") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    litter = (
        ".git/objects/pack.pack .venv/lib/torch.so data/cars/1.jpg photos/2.JPG.jpg holiday/3.jpeg holiday/4.png a.tar "
        "run/bundle/model.onnx run/bundle/weights.safetensors run/log/1.json runs/x.json predictions/part.parquet "
        "predictions/_carray/ledger/0.json results/mine.parquet mine/table.parquet dist/carray.whl carray-demo/x.jpg "
        "evaluation/report.html carray/__pycache__/x.pyc .mypy_cache/x.json build/lib/x.py comparison/x.html backup.zip"
    )
    for name in litter.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(200_000))
    return folder


def test_what_is_uploaded_is_the_code_alone(clone: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(clone), package, include_gitignore=True)
    names = set(zipfile.ZipFile(package).namelist())
    code = {path.relative_to(clone).as_posix() for path in (clone / "carray").rglob("*") if path.suffix != ".pyc"}
    files = {name for name in code if (clone / name).is_file()}
    needed = {"jobs/tune.py", "jobs/classify.py", "jobs/configs/cars-cpu.yaml", "carray/pages/templates/base.html.j2"}
    assert (files | needed) - names == set()
    tops = {name.partition("/")[0] for name in names}
    assert tops - {"mine", "holiday", "photos"} == {
        *("carray", "jobs", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"),
        *(".gitignore", ".rayignore", ".dockerignore"),
    }
    litter = re.compile(r"\.(jpe?g|png|parquet|onnx|safetensors|pyc|zip|tar|whl|so|pack)$")
    assert [name for name in names if litter.search(name)] == []
    assert package.stat().st_size < MOST_BYTES


def test_the_wheel_has_every_file_and_runs_without_the_clone(clone: Path, tmp_path: Path) -> None:
    """Build the wheel as `make wheel` does, put it beside the libraries that are here, and ask it for help."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(clone)], capture_output=True, text=True)
    if done.returncode:  # without isolation it takes setuptools from this environment
        del pip[-1]
        subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(clone)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "carray").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()
    place = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(place)  # a wheel of Python alone is installed by unpacking it
    code = "import carray, sys; print(carray.__file__); from carray.__main__ import main; main(['classify', '--help'])"
    asked = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(place), "PATH": ""}, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(str(place)) and "--only-new" in asked.stdout
