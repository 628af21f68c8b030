"""What becomes of checks: one line each, whatever they do, and an exit code."""

from __future__ import annotations

import threading
import time

import pytest

from carray.preflight.findings import Check, Finding, exit_code, finding_text, merge_hosts, run_checks, summary


def test_findings_come_in_the_checks_order_whichever_is_first():
    checks = [
        Check("slow", lambda: (time.sleep(0.2), [Finding("slow", "ok", "1")])[1]),
        Check("fast", lambda: [Finding("fast", "ok", "2")]),
    ]
    assert [found.name for found in run_checks(checks)] == ["slow", "fast"]


def test_a_check_that_raises_is_a_line():
    def broken():
        raise OSError("libGL.so.1: cannot open\nshared object")

    (found,) = run_checks([Check("decoders", broken)])
    assert (found.name, found.status) == ("decoders", "fail")
    assert "OSError: libGL.so.1: cannot open shared object" in found.seen
    assert found.remedy


def test_a_check_that_hangs_is_a_line_in_time_and_holds_up_no_other():
    hanging = threading.Event()
    started = time.monotonic()
    checks = [
        Check("reads", lambda: hanging.wait(60) and [], seconds=0.3, storage=True),
        Check("cores", lambda: [Finding("cores", "ok", "2")]),
    ]
    late, other = run_checks(checks)
    hanging.set()
    assert time.monotonic() - started < 5
    assert (late.status, late.seen, late.storage) == ("fail", "no answer within 0 s", True)
    assert other.status == "ok"


def test_a_line_holds_no_password_and_no_control_code():
    found = Finding("reads", "fail", "http://user:secret@host/x\x1b[2J", "look")
    assert finding_text(found) == "fail  reads             http://…@host/x?[2J; look"


OK, WARN = Finding("cores", "ok", "2"), Finding("memory", "warn", "low", "free some")
BROKEN, AWAY = Finding("decoders", "fail", "broken"), Finding("reads", "fail", "away", storage=True)


@pytest.mark.parametrize(
    ("findings", "code"),
    [([OK, WARN], 0), ([OK, AWAY], 4), ([BROKEN, AWAY], 2), ([BROKEN], 2)],
)
def test_the_exit_code_is_of_what_failed(findings, code):
    assert exit_code(findings) == code


def test_a_machine_without_torch_scores_and_does_not_search():
    absent = Finding("training", "ok", "not here", absent=True)
    assert summary([OK, absent]) == {"ok": 2, "warn": 0, "fail": 0, "scoring": True, "search": False}
    assert summary([OK, BROKEN])["scoring"] is False
    assert summary([OK, WARN, AWAY])["search"] is True


def test_what_all_machines_say_is_one_line_and_the_one_that_differs_another():
    by_host = {name: [OK, Finding("memory", "ok", f"{name} GB")] for name in ("8", "9", "7")}
    by_host["7"] = [OK, WARN]
    lines = [finding_text(found).split(maxsplit=1) for found in merge_hosts(by_host)]
    assert [status for status, _ in lines] == ["ok", "ok", "warn"]
    assert lines[0][1].endswith("2 [8, 9, 7]")
    assert lines[1][1].endswith("8 GB [8; 1 other ok, too]")
    assert lines[2][1].endswith("low; free some [7]")
