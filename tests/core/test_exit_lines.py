"""Whatever ends a job, its last lines say what happened and what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from carray.core.exit_lines import GRACE_SECONDS, advise, run_command

ROOT = Path(__file__).resolve().parents[2]

JOB = """
    import os, signal, sys, time
    from carray.core import exit_lines
    from carray.core.errors import SettingsError, StorageError
    from carray.core.exit_lines import advise, record_error, run_watched, stopping_in_order

    def command():
        advise("3 of 7 shards stay")
        how = sys.argv[1]
        if how == "sigterm":
            with stopping_in_order("all stays."):
                print("ready", flush=True)
                try:
                    time.sleep(60)
                finally:
                    time.sleep(0.5)  # a second SIGTERM falls into the clean-up
        if how == "asked":
            asked = []
            with stopping_in_order("all stays.", ask=asked.append):
                print("ready", flush=True)
                while not asked:
                    time.sleep(0.01)
                1 / 0  # what fails on the way out is not what happened
        if how == "early":
            print("ready", flush=True)
            time.sleep(60)
        if how == "hangs":
            import subprocess
            try:  # before the line, or the signal that answers it comes too early
                print(subprocess.Popen(["sleep", "600"], process_group=0).pid, flush=True)
                time.sleep(600)
            finally:
                time.sleep(600)
        if how == "storage":
            raise StorageError("the store is away.")
        if how == "settings":
            raise SettingsError(["one is wrong.", "two is wrong."])
        if how == "bug":
            raise KeyError("a stack\\n\\n  of lines\\nValueError: seven")
        if how == "silent":
            os.write(2, b"noise of a library\\n")
            os._exit(1)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "memory":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "foreseen":
            record_error(StorageError("the store is away."))
            os._exit(1)
        if how == "noise after the end":
            import atexit
            atexit.register(lambda: os.write(2, b"noise at exit\\n"))
            raise StorageError("the store is away.")
        if how == "crash after the end":
            import atexit
            atexit.register(lambda: os.kill(os.getpid(), signal.SIGABRT))
            print("done")

    exit_lines.GRACE_SECONDS = int(sys.argv[2])
    code = run_watched(command)
    raise SystemExit(code)
"""
STAYS = "carray: 3 of 7 shards stay"


def start(
    how: str, before: Callable[[], object] | None = None, grace_seconds: int = GRACE_SECONDS
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(JOB), how, str(grace_seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=before,
    )


@pytest.mark.parametrize(
    ("how", "code", "lines"),
    [
        ("done", 0, []),
        ("storage", 4, ["carray: the store is away.", STAYS]),
        ("settings", 2, ["carray: one is wrong.", "carray: two is wrong.", STAYS]),
        ("silent", 1, ["carray: Ray ended the driver (exit code 1)", STAYS]),
        ("crash", 139, ["carray: the driver crashed (SIGSEGV)", STAYS]),
        ("memory", 137, ["carray: the driver was killed (SIGKILL): most often because its machine", STAYS]),
        ("foreseen", 4, ["carray: the store is away.", STAYS]),
        ("noise after the end", 4, ["carray: the store is away.", STAYS]),
        ("crash after the end", 0, []),
    ],
)
def test_the_last_lines_are_ours(how: str, code: int, lines: list[str]) -> None:
    job = start(how)
    _, said = job.communicate(timeout=60)
    assert job.returncode == code, said
    last = said.splitlines()[-len(lines) :] if lines else []
    assert len(last) == len(lines), said
    assert all(line.startswith(expected) for line, expected in zip(last, lines, strict=True)), said
    assert sum(line.startswith("carray: ") for line in said.splitlines()) == len(lines), said


def test_a_bug_has_its_trace_above_and_words_below() -> None:
    _, said = (job := start("bug")).communicate(timeout=60)
    assert job.returncode == 1
    assert "Traceback (most recent call last)" in said
    *_, happened, todo = said.splitlines()
    assert happened.startswith("carray: unexpected KeyError: ") and "please report" in happened
    assert todo == STAYS


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
@pytest.mark.parametrize(("how", "kept"), [("sigterm", "; all stays."), ("asked", "; all stays."), ("early", ".")])
@pytest.mark.parametrize("to", ["the process", "its group", "parent and child"])
def test_a_signal_ends_it_in_order_however_it_is_sent(how: str, kept: str, to: str, number: int, name: str) -> None:
    job = start(how)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    if to == "its group":  # as a shell and a terminal do
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    if to == "parent and child":  # as `ray job stop` does
        os.kill(int(children[0]), number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + number, said
    assert said.splitlines()[-2] == f"carray: stopped by {name}{kept}"
    assert said.splitlines()[-1] == STAYS


def test_a_signal_that_is_ignored_stays_so() -> None:
    job = start("early", before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as a script's `&` does
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=60)[1].splitlines()[-2] == "carray: stopped by SIGTERM."
    assert job.returncode == 143


def test_the_second_signal_ends_at_once_what_does_not_end_and_what_it_started() -> None:
    job = start("hangs", grace_seconds=600)  # far beyond the next time limit
    assert job.stdout is not None
    started = int(job.stdout.readline())
    job.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 143
    assert said.splitlines()[-2:] == ["carray: stopped by SIGTERM.", STAYS]
    assert not Path(f"/proc/{started}/exe").exists()


def test_the_driver_does_not_outlive_the_process_that_was_started() -> None:
    job = start("sigterm")
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    child = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text())
    job.kill()
    job.communicate(timeout=60)
    until = time.monotonic() + 30
    while Path(f"/proc/{child}/exe").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}/exe").exists()


def test_unwatched_it_says_the_same_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        advise("all stays")
        raise OSError(5, "a disk")

    assert run_command(command) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "carray: unexpected OSError: [Errno 5] a disk; the lines above say where: please report them.",
        "carray: all stays",
    ]
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == "", "the advice of a command that ended is not the next one's"
