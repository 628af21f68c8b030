"""Stops each long command by Ctrl-C and SIGTERM at many moments, and checks exit codes, last lines and what is left.

    python -m jobs.drills.stop --times 12 [--only tune classify ...]

Uses drawn vehicles (extra `dev`). Every stop has its own output, temporary and cache folder, so whatever is left there
is that command's. Prints a line per stop, appends a row per command to results/drill_stop.csv, and ends with one JSON
line; exit code 1 if a stop went wrong. Cost: about 15 s a stop of tune, train and classify on two cores, 5 s of the
others.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carray.manifest.prepare import prepare
from carray.testing.drawing import draw_dataset
from carray.testing.predictions import row, write_predictions
from jobs.bench.rows import set_words
from jobs.drills.harness import Command, drill_program
from jobs.processes import marked_pids, title

COMMANDS = ("prepare", "tune", "train", "classify", "evaluate", "report", "query")
TARGETS = ("process", "group", "all")
"""Who receives the signal: the started process, its process group (a shell, a terminal), or every process of the
command (systemd, Slurm)."""
_SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_PATIENCE_SECONDS = 400
_LEFT_SECONDS = 10
_ENDING_SECONDS = 2
_SLOW_SQL = "select count(*) from range(1000000) a, range(1000000) b where (a.range * b.range) % 7 = 3"
_SMALL = ["pixels.decode_size=56", "pixels.input_size=48"]
_TUNE: dict[str, Any] = {
    "search": {"trials": 3, "epochs": 3, "refit": True, "cpus_per_trial": 1},
    "pixels": {"decode_size": 56, "input_size": 48},
    "families": {"cnn": {"default": {"input_size": 48, "stages": 3, "width": 8, "batch_images": 16}}},
}


def main() -> None:
    """Run the drills, and write the results."""
    program = drill_program(__doc__, "drill_stop.csv", times=12, seed=False, kinds=COMMANDS)
    given = program.parse()
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        rows = run_stops(set_scene(Path(work)), given.only, times=given.times)
    program.record(rows)
    print(json.dumps(rows))
    sys.exit(0 if all(row["right"] == row["stops"] for row in rows) else 1)


@dataclass(frozen=True)
class Scene:
    """What the commands read."""

    work: Path
    images: Path
    manifest: Path
    bundle: Path
    predictions: Path

    def command(self, name: str, out: Path) -> list[str]:
        """Return a command line that takes some seconds, and writes below `out`."""
        config = ["--config", str(self.work / "tune.yaml")]
        shards = set_words(["shard_images_first=8", "shard_images_max=8"])
        words: dict[str, list[str]] = {
            "prepare": ["prepare", str(self.images), "--out", str(out / "manifest.parquet")],
            "tune": ["tune", "--manifest", str(self.manifest), "--out", str(out / "run"), *config],
            "train": ["train", "--manifest", str(self.manifest), "--out", str(out / "run"), "--epochs", "12"],
            "classify": ["classify", str(self.bundle), str(self.images), "--out", str(out / "rows"), *shards],
            "evaluate": ["evaluate", str(self.bundle), "--manifest", str(self.manifest), "--out", str(out / "page")],
            "report": ["report", str(self.predictions), "--out", str(out / "report.html")],
            "query": ["query", str(self.predictions), _SLOW_SQL],
        }
        small = ["hyper.family=cnn", "hyper.input_size=48", "hyper.stages=3", "hyper.width=8"]
        words["train"] += set_words([*small, *_SMALL])
        words["evaluate"] += ["--split", "train"]
        return [sys.executable, "-m", "carray", *words[name]]


@dataclass(frozen=True)
class Ended:
    """How a stopped command ended."""

    said: str
    """What it wrote."""
    code: int | None
    seconds: float
    """From the signal to the end; if it ended before that, from its start."""
    void: bool
    """Whether the command had ended before the signal."""
    complaints: list[str]


def set_scene(work: Path, *, images_per_class: int = 60) -> Scene:
    """Draw images, train a small network on them, and classify a few."""
    from carray.bundle.winner import keep_trained
    from carray.core.settings import parse_settings
    from carray.search.train_one import TrainSettings, train

    images, manifest, run = work / "images", work / "manifest.parquet", work / "run"
    draw_dataset(images, images_per_class=images_per_class)
    prepare(str(images), out=str(manifest))
    (work / "tune.yaml").write_text(json.dumps(_TUNE))
    small = {"hyper": {"family": "cnn", "input_size": 48, "stages": 2, "width": 4}, "epochs": 1}
    settings = parse_settings(TrainSettings, small | {"pixels": {"decode_size": 56, "input_size": 48}})
    train(str(manifest), run=str(run), settings=settings, finish=lambda run: {"bundle": keep_trained(run)})
    return Scene(work, images, manifest, run / "bundle", _write_predictions(work, images))


def _write_predictions(work: Path, images: Path) -> Path:
    rows = [row(str(path), phash=i) for i, path in enumerate(sorted(images.rglob("*.jpg")))]
    return Path(write_predictions(str(work / "predictions"), [rows]))


def stop(
    scene: Scene,
    name: str,
    *,
    ready: Callable[[Path, str], bool],
    number: signal.Signals,
    target: str,
) -> Ended:
    """Start a command, send it a signal, and check its end.

    Args:
        scene: What it reads.
        name: Of the command.
        ready: Whether to send the signal now, from the stop's folder and what was printed so far.
        number: The signal.
        target: Who receives it.
    """
    with _folder() as folder:
        surroundings = {"TMPDIR": str(folder / "tmp"), "CARRAY_CACHE": str(folder / "cache")}
        mark = f"stop-{secrets.token_hex(6)}"
        command = Command(scene.command(name, folder / "out"), folder / "log", mark, surroundings, _PATIENCE_SECONDS)
        try:
            began = time.monotonic()
            command.start()
            if not command.wait_until(lambda: ready(folder, command.said())) and command.alive:
                return Ended(command.said(), None, 0.0, True, [f"{name}: the moment did not come"])
            void = not command.alive
            began = began if void else time.monotonic()
            if not void:
                _send(command, number, target)
            code = command.wait()
            seconds = time.monotonic() - began
            void = void or (code == 0 and seconds < _ENDING_SECONDS)  # its work was done
            wrong = [] if void else [*_wrong_end(command.said(), code, number), *_left(folder, mark, target)]
            return Ended(
                command.said(), code, seconds, void, [f"{name}, {number.name} to {target}: {one}" for one in wrong]
            )
        finally:
            command.kill_all()


@contextmanager
def _folder() -> Iterator[Path]:
    # A short path, since that of Ray's sockets below it may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="cs-", dir="/tmp"))
    try:
        for name in ("tmp", "cache", "out"):
            (folder / name).mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _send(command: Command, number: signal.Signals, target: str) -> None:
    assert command.process is not None
    pid = command.process.pid
    for one in marked_pids(command.mark) if target == "all" else [pid]:
        with suppress(ProcessLookupError):
            (os.killpg if target == "group" else os.kill)(one, number)


def _wrong_end(said: str, code: int | None, number: signal.Signals) -> list[str]:
    complaints = [] if code == 128 + number else [f"exit code {code}, not {128 + number}"]
    lines = [line for line in said.splitlines() if line.strip()]
    if not any(line.startswith(f"carray: stopped by {_SIGNAL_NAMES[number]}") for line in lines[-2:]):
        complaints.append(f"the last lines are {lines[-2:]}")
    if not (lines and lines[-1].startswith("carray: ")):
        complaints.append("the last line is not the command's")
    return complaints + (["a traceback"] if "Traceback" in said else [])


def _left(folder: Path, mark: str, target: str) -> list[str]:
    until = time.monotonic() + _LEFT_SECONDS
    while (pids := marked_pids(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    complaints = [f"{title(pid)[:60]!r} goes on" for pid in pids]
    temporary = [path.name for path in (folder / "tmp").iterdir() if path.name != "ray"]  # Ray keeps its logs there
    unfinished = [path.name for pattern in (".building-*", "*.part", ".writing-*") for path in folder.rglob(pattern)]
    # If Ray's own processes are stopped, too, they end the driver; the next one follows its note at once.
    notes = [path.name for path in folder.rglob("driver.json")] if target != "all" else []
    return complaints + [f"{name} is left" for name in [*temporary, *unfinished, *notes]]


def moments(scene: Scene, name: str, count: int) -> list[float]:
    """Spread moments, in seconds, evenly over a command's undisturbed duration."""
    whole = stop(scene, name, ready=lambda folder, said: False, number=signal.SIGTERM, target="process")
    if whole.code:
        raise SystemExit(f"the undisturbed {name} ended with {whole.code}:\n{whole.said[-3000:]}")
    return [whole.seconds * (i + 0.5) / count for i in range(count)]


def after(seconds: float) -> Callable[[Path, str], bool]:
    """Return a `ready` that holds so many seconds after its first call."""
    started: list[float] = []

    def ready(_folder: Path, _said: str) -> bool:
        started.append(time.monotonic())
        return started[-1] - started[0] >= seconds

    return ready


def run_stops(scene: Scene, commands: Sequence[str], *, times: int) -> list[dict[str, Any]]:
    """Stop each command `times` times; returns a row per command."""
    rows = []
    for name in commands:
        began, ends = time.monotonic(), list(_stop_at(scene, name, times))
        stopped = [ended for ended in ends if not ended.void]
        rows.append(
            {
                "stopped": name,
                "stops": len(stopped),
                "right": len([ended for ended in stopped if not ended.complaints]),
                "slowest_seconds": round(max((ended.seconds for ended in stopped), default=0.0), 1),
                "drill_seconds": round(time.monotonic() - began, 1),
            }
        )
    return rows


def _stop_at(scene: Scene, name: str, times: int) -> Iterator[Ended]:
    """Stop a command at moments that are spread evenly, by each signal to each target in turn; prints a line each."""
    for i, seconds in enumerate([0.2 + i for i in range(times)] if name == "query" else moments(scene, name, times)):
        number, target = (signal.SIGINT, signal.SIGTERM)[i % 2], TARGETS[i // 2 % 3]
        ended = stop(scene, name, ready=after(seconds), number=number, target=target)
        outcome = "had ended" if ended.void else f"{ended.code} in {ended.seconds:.1f} s"
        line = f"{name} at {seconds:.1f} s, {number.name} to {target}: {outcome}"
        print("; ".join([line, *ended.complaints]), flush=True)
        yield ended


if __name__ == "__main__":
    main()
