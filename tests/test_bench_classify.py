"""The arithmetic behind results/classify.csv: rates, slopes, steady state, what /proc says, and the last line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs.bench.classify.peers import median_row, scale_up
from jobs.bench.classify.setup import few, link_images
from jobs.bench.classify.watch import (
    JobFailed,
    fit_line,
    headline,
    run_watched,
    steady_rate,
)
from jobs.processes import size_of, times_of


def test_steady_rate_leaves_start_up_and_end_out() -> None:
    """Ten seconds to start, then 64 images a second for two workers in step, then a straggler of 30 s."""
    finished = [(10.0 + i, 32) for i in range(1, 41) for _ in range(2)] + [(80.0, 10)]
    assert steady_rate(finished) == pytest.approx(64.0)
    assert sum(images for _, images in finished) / 80 < 40


def test_steady_rate_takes_images_of_one_moment_together() -> None:
    """Rows of one batch share its time: cutting a batch in two would count its images as done in no time."""
    rows = [(float(i), 1) for i in range(20) for _ in range(32)]
    assert steady_rate(rows) == pytest.approx(32.0)


@pytest.mark.parametrize("finished", [[], [(1.0, 64)], [(1.0, 64), (2.0, 64)], [(1.0, 8)] * 10])
def test_steady_rate_of_too_little_is_none(finished: list[tuple[float, int]]) -> None:
    assert steady_rate(finished) is None


def test_line_takes_the_start_up_off() -> None:
    line = fit_line((1000, 12.0 + 8.0), (10_000, 12.0 + 80.0))
    assert line == pytest.approx((12.0, 0.008))
    with pytest.raises(ValueError, match="two sizes"):
        fit_line((10, 1.0), (10, 2.0))


def test_headline_units() -> None:
    figures = headline(7200, wall_seconds=60.0, core_seconds=90.0, cores=2)
    assert figures == {
        "images_per_second": 120.0,
        "images_per_second_per_core": 60.0,
        "core_hours_per_million": round(90 / 7200 * 1e6 / 3600, 1),
    }


def test_process_whose_name_has_brackets() -> None:
    rest = "S 41 7 7 0 -1 4194560 10 0 0 0 250 50 9999 9999 20 0 8 0 123456 1000 100"
    assert times_of(f"42 (ray::(odd) name) {rest}") == (123456, 3.0)


def test_sizes_are_in_millions_of_bytes() -> None:
    status = "Name:\tpython\nVmHWM:\t  400000 kB\nVmRSS:\t  1 kB\n"
    assert size_of(status, "VmHWM") == pytest.approx(409.6)
    assert size_of(status, "Pss") == 0.0


def test_own_process_is_read_right() -> None:
    _, cpu_seconds = times_of(Path("/proc/self/stat").read_text())
    assert cpu_seconds == pytest.approx(time.process_time(), abs=0.2)
    assert size_of(Path("/proc/self/status").read_text(), "VmHWM") > 10


def test_a_watched_job_counts_its_children(tmp_path: Path) -> None:
    """The child burns a second and holds 200 MB; the parent only waits, and says something."""
    burn = "import time; held = b'x' * 200_000_000\nwhile time.process_time() < 1.2: pass"
    program = (
        "import subprocess, sys; print('now', file=sys.stderr, flush=True)\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])"
    )
    finished = run_watched(["-c", f"{program}\nprint('{{\"rows\": 3}}')"], log=tmp_path / "job.log")
    assert finished.core_seconds > 0.6
    assert finished.wall_seconds > 1.2
    assert finished.result == {"rows": 3}
    assert finished.driver_peak_mb < 100
    assert 0 < (finished.seconds_of_line("now") or 0) < finished.wall_seconds
    assert finished.seconds_of_line("never") is None


def test_a_failed_job_says_why(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no such thing"):
        run_watched(["-c", "raise SystemExit('no such thing')"], log=tmp_path / "job.log")


def test_a_peer_that_had_fewer_images_is_scaled_at_its_steady_rate() -> None:
    row = {"images": 100, "wall_seconds": 30.0, "steady_images_per_second": 5.0, "note": "slow"}
    scaled = scale_up(row, 1100)
    assert scaled["whole_seconds"] == 230.0
    assert scaled["startup_seconds"] == 10.0
    assert "100 images" in scaled["note"]
    assert scale_up(row, 100)["whole_seconds"] == 30.0
    assert scale_up(row | {"steady_images_per_second": None}, 200)["whole_seconds"] == 60.0


def test_rows_of_one_arm_are_joined() -> None:
    rows = [{"arm": "carray", "images": 7, "wall_seconds": seconds, "ray_seconds": None} for seconds in (3.0, 5.0)]
    assert median_row(rows) == {"repeats": 2, "arm": "carray", "images": 7, "wall_seconds": 4.0, "ray_seconds": None}


def test_folders_of_links(tmp_path: Path) -> None:
    photographs = []
    for i in range(3):
        photographs.append(tmp_path / "half" / f"{i}.jpg")
        photographs[-1].parent.mkdir(exist_ok=True)
        photographs[-1].write_bytes(bytes([i]))
    folder = link_images(photographs, tmp_path / "seven", 7)
    assert sorted(path.read_bytes()[0] for path in folder.iterdir()) == [0, 0, 0, 1, 1, 2, 2]
    assert all(path.stat().st_nlink == 1 for path in photographs), "the photographs themselves are left alone"
    assert len(list(Path(few(str(folder), 2)).iterdir())) == 2
    assert link_images([], tmp_path / "seven", 7) == folder, "made once"
