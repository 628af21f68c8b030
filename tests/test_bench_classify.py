"""The arithmetic behind results/classify.csv: rates, slopes, steady state, what /proc says, and the last line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jobs.bench.classify.arms import median_row
from jobs.bench.classify.peers import headline_times, scale_up
from jobs.bench.classify.setup import daft_python, few, link_images
from jobs.bench.classify.watch import (
    JobFailed,
    fit_line,
    headline,
    run_watched,
    steady_rate,
)
from jobs.bench.rows import ROOT
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
    """The child burns a second and holds 200 MB; the parent only waits."""
    burn = "import time; held = b'x' * 200_000_000\nwhile time.process_time() < 1.2: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    finished = run_watched(["-c", f"{program}\nprint('{{\"rows\": 3}}')"], log=tmp_path / "job.log")
    assert finished.core_seconds > 0.6
    assert finished.wall_seconds > 1.2
    assert finished.result == {"rows": 3}
    assert finished.driver_peak_mb < 100
    assert finished.worker_peak_mb == 0


def test_the_forks_of_a_fork_server_are_workers(tmp_path: Path) -> None:
    """The fork holds 200 MB; neither the driver nor the server that it is forked from is a worker."""
    (tmp_path / "holding.py").write_text(
        "import time\n"
        "def preload(): pass\n"
        "def work(link):\n    held = b'x' * 200_000_000\n    time.sleep(2)\n    link.send_bytes(b'held')\n"
    )
    program = (
        "from carray.core.fork_server import ForkServer\n"
        "server = ForkServer('holding')\nprint(server.fork().recv_bytes())\nserver.kill()"
    )
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    finished = run_watched(["-c", program], log=tmp_path / "job.log", environment=path)
    assert finished.driver_peak_mb < 100 < 200 < finished.worker_peak_mb
    assert finished.worker_pss_mb > 150


def test_a_failed_job_says_why(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="no such thing"):
        run_watched(["-c", "raise SystemExit('no such thing')"], log=tmp_path / "job.log")


def test_a_job_is_given_up_after_its_time(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    with pytest.raises(JobFailed, match="took over 1 s"):
        run_watched(["-c", program], log=tmp_path / "job.log", most_seconds=1)
    assert time.monotonic() - started < 30, "nor is its child waited for"


def test_the_ceiling_scores_every_image(small_bundle: str, tmp_path: Path, make_image) -> None:
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(make_image(i, width=900, height=600))
    command = ["-m", "jobs.bench.classify.ceiling", small_bundle, tmp_path, "fp32", 4]
    result = run_watched(command, log=tmp_path.with_name("ceiling") / "log").result
    assert result["images"] == 12
    assert result["seconds"] > 0


def test_the_last_line_names_what_a_peer_took_by_part_and_runtime() -> None:
    ours = {"arm": "carray", "engine": "local", "times_timm": 9.0, "times_daft": 1.2}
    rows = [
        {"part": "peers", "arm": "timm", "runtime": "torch fp32"},
        ours | {"part": "peers", "runtime": "int8"},
        ours | {"part": "peers", "runtime": "int8", "engine": "ray", "times_timm": 5.0},
        ours | {"part": "peers-large", "runtime": "fp32", "times_daft": 1.1},
        ours | {"part": "nets", "runtime": "int8"},
    ]
    assert headline_times(rows) == {
        "times_timm": 9.0,
        "times_daft": 1.2,
        "times_timm_large_fp32": 9.0,
        "times_daft_large_fp32": 1.1,
    }


def test_without_an_environment_for_daft_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert daft_python.__wrapped__() is None
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("Daft is left out, since its environment cannot be made: ")


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
