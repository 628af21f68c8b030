"""SIGTERM is one sentence, whatever the libraries in between make of it."""

from __future__ import annotations

import os
import signal

import pytest

from carray.core.errors import StoppedError
from carray.core.stopping import sigterm_came, stopping_on_sigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_signal_is_a_sentence_and_what_was_there_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(StoppedError, match="^stopped by SIGTERM; shards stay, and the same"),
        stopping_on_sigterm("shards stay"),
    ):
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before and not sigterm_came()


def test_a_library_may_turn_it_into_an_error_of_its_own() -> None:
    """Ray's waiting is interrupted by whatever the handler raises, and raises a SystemError."""
    with pytest.raises(StoppedError), stopping_on_sigterm("shards stay"):
        try:
            terminate()
        except BaseException:
            assert sigterm_came()
            raise SystemError("a result with an exception set") from None


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="^other$"), stopping_on_sigterm("shards stay"):
        raise ValueError("other")
