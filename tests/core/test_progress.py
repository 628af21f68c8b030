"""A job that does not get on says so; one that does is not disturbed."""

from __future__ import annotations

import time

import pytest

from carray.core.progress import breaking_silence


def test_silence_is_broken_again_and_again_until_something_happens(capfd: pytest.CaptureFixture[str]) -> None:
    with breaking_silence(lambda: "2 CPUs", each_seconds=0.2) as hear:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            hear()
            time.sleep(0.02)
        assert capfd.readouterr().err == ""
        said, until = "", time.monotonic() + 30
        while said.count(": 2 CPUs") < 2 and time.monotonic() < until:
            time.sleep(0.05)
            said += capfd.readouterr().err
    assert said.splitlines()[0].startswith("nothing for 0 s: 2 CPUs")
    assert said.count(": 2 CPUs") >= 2
    capfd.readouterr()
    time.sleep(0.5)
    assert capfd.readouterr().err == "", "it ends with the work"
