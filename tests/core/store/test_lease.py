"""One driver at a time: the dead are followed at once, the silent after a while, the living never."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from carray.core.errors import BudgetError
from carray.core.store import conditional
from carray.core.store import lease as leases
from carray.core.store.files import exists, join, read_json, write_bytes, write_json
from carray.core.store.lease import hold_run, process_space


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3')}/out"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.2)


def note_of(pid, host=None, **more):
    here = {"host": host or socket.gethostname(), "space": process_space()}
    return {"token": "other", **here, "pid": pid, "at": "then", **more}


def test_a_run_is_held_and_given_back(out, short):
    place = join(out, "driver.json")
    with hold_run(out, what="tune") as lease:
        first = read_json(place)
        assert (first["token"], first["pid"]) == (lease.token, os.getpid())
        deadline = time.monotonic() + 10
        while read_json(place)["at"] == first["at"]:
            assert time.monotonic() < deadline, "the note is renewed"
        lease.check()
    assert not exists(place)


def test_a_dead_driver_of_this_machine_is_followed_at_once(out, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_json(join(out, "driver.json"), note_of(ended.pid))
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 3600.0)
    with hold_run(out, what="tune") as lease:
        lease.check()


def test_a_silent_driver_of_another_machine_is_followed_after_a_while(out, short, capfd):
    write_json(join(out, "driver.json"), note_of(1, host="elsewhere"))
    with hold_run(out, what="tune") as lease:
        lease.check()
    assert "waiting 1 s to see whether another driver (process 1 on elsewhere)" in capfd.readouterr().err


def test_a_number_of_another_container_says_nothing_about_a_process(out, short, capfd):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_json(join(out, "driver.json"), note_of(ended.pid, space="another container of this host name"))
    with hold_run(out, what="tune") as lease:
        lease.check()
    assert "tune: waiting 1 s to see whether" in capfd.readouterr().err


def test_a_living_driver_is_left_alone(out, short):
    with hold_run(out, what="tune") as lease:
        with pytest.raises(BudgetError, match=rf"process {os.getpid()} on .*is working on .*only one driver can"):
            hold_run(out, what="tune").__enter__()
        lease.check()


def test_whoever_lost_the_run_stops_and_leaves_the_note(out, short):
    with hold_run(out, what="tune") as lease:
        deadline = time.monotonic() + 10
        with pytest.raises(BudgetError, match="was taken over by another driver"):
            while time.monotonic() < deadline:
                write_json(join(out, "driver.json"), note_of(1, host="elsewhere"))  # as its beats do
                lease.check()
                time.sleep(0.01)
    assert read_json(join(out, "driver.json"))["token"] == "other"


def test_of_many_that_begin_together_one_has_the_run(out, short, monkeypatch):
    """All find the folder free; the first to create the note has it."""
    barrier, ended, held, refused = threading.Barrier(4), threading.Barrier(4), [], []

    def begin():
        barrier.wait()
        try:
            with hold_run(out, what="tune") as lease:
                held.append(lease.token)
                ended.wait(30)
        except BudgetError:
            refused.append(1)
            ended.wait(30)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)


def test_a_store_that_ignores_conditions_is_found_out_and_said(out, short, monkeypatch, capfd):
    """The last to write has the run, as the other one sees when it looks."""

    def ignore(uri, data, etag, *, durable):
        write_bytes(uri, data)
        return "any"

    with monkeypatch.context() as patch:
        patch.setattr(conditional, "_write_once", ignore)
        with hold_run(out, what="tune") as lease:
            assert "without conditional writes (If-None-Match)" in capfd.readouterr().err
            deadline = time.monotonic() + 10
            with pytest.raises(BudgetError, match="was taken over by another driver"):
                while time.monotonic() < deadline:
                    write_json(join(out, "driver.json"), note_of(1, host="elsewhere"))
                    lease.check()
                    time.sleep(0.01)
    with hold_run(f"{out}2", what="tune"):
        assert "conditional writes" not in capfd.readouterr().err
