"""Sees to it that the last lines of a command's log say what happened and what to do, whatever ended it.

From: a command, and what its stages advise while it runs. To: the last lines of standard error, and an exit code.
On a cluster Ray's own code ends a driver without a word when the head node is lost, and the kernel when memory is; so
a job runs in a child process, and the parent speaks once the child, and all that Ray still had to say, is gone.
Invariants: the child decides the exit code where it ends by itself; a signal that kills it is 128 + its number, as in a
shell; SIGTERM reaches the child however it is sent, and its second coming is no other.
"""

from __future__ import annotations

import codecs
import ctypes
import errno
import io
import json
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from textwrap import shorten
from typing import Any

from carray.core.errors import CarrayError, SettingsError, StoppedError, StorageError
from carray.core.text import readable

__all__ = ["advise", "end_in_words", "foresee", "run_watched", "stopping_on_sigterm"]

_BOARD_BYTES = 64 * 1024
_MOST_CHARACTERS = 400
"""Of what an error of other people's says: some carry whole stacks."""
_PR_SET_PDEATHSIG = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_board: mmap.mmap | None = None
"""What this process and the parent that watches it can both see; None where nobody watches."""
_advice = ""


def advise(text: str) -> None:
    """Say what is to be done should the command end before its time; a later call replaces it, "" takes it back."""
    global _advice
    _advice = text
    _write_board(advice=text)


def foresee(err: CarrayError) -> None:
    """Leave an error with the parent that watches, where Ray's own end may come before the command's."""
    _write_board(code=err.exit_code, lines=_lines(err))


def end_in_words(command: Callable[[], Any]) -> int:
    """Run a command to its end, say its last words or leave them to the parent that watches; gives its exit code."""
    advise("")
    _show_every_letter()
    code, lines = _outcome(command)
    try:
        if sys.stdout is not None:  # as it is where the descriptor was closed
            sys.stdout.flush()
    except OSError as err:
        code, lines = StorageError.exit_code, [*lines, _unwritten(err)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
    if _board is None:
        _say(lines)
    else:
        _write_board(code=code, lines=lines)
    return code


def run_watched(command: Callable[[], Any]) -> int:
    """Run a command as `end_in_words` does, in a child process, and say its last words when that is gone.

    Gives the exit code, in the child and in the parent alike: each of them is to end with it.
    """
    global _board
    board = mmap.mmap(-1, _BOARD_BYTES)  # anonymous, and shared with a child
    _hold_signals(signal.SIG_BLOCK)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _hold_signals(signal.SIG_UNBLOCK)
        _die_with_the_parent()
        _board = board
        return end_in_words(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child, too

    def pass_on(number: int, _frame: Any) -> None:
        with suppress(ProcessLookupError):  # it ended of its own copy
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    _hold_signals(signal.SIG_UNBLOCK)
    _, status = os.waitpid(child, 0)
    code, lines = _last_words(os.waitstatus_to_exitcode(status), _read_board(board))
    _say(lines)
    return code


class _Stop(BaseException):
    """Passes through Ray's libraries, which print a stack of every Exception, or take it for a trial's."""


@contextmanager
def stopping_on_sigterm(sentence: str, *, ask: Callable[[StoppedError], None] | None = None) -> Iterator[None]:
    """Turn SIGTERM, which a spot machine or `ray job stop` sends, into an orderly end.

    Args:
        sentence: What is kept.
        ask: Takes the error that is then to be raised, where waiting inside Ray's own code bears no exception; without
            it the block is left at once.

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = StoppedError(f"stopped by SIGTERM; {sentence}")
    came = threading.Event()

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one who stops a job may send it to parent and child
        _say([f"stopping on SIGTERM; {sentence}"])  # now: `ray job stop` kills after three seconds
        came.set()
        foresee(stopped)
        if ask is None:
            raise _Stop
        ask(stopped)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (_Stop, Exception):  # what fails while a job is being stopped follows from that
        if not came.is_set():
            raise
        raise stopped from None
    finally:
        if not came.is_set():
            signal.signal(signal.SIGTERM, before)


def _outcome(command: Callable[[], Any]) -> tuple[int, list[str]]:
    """Run a command; gives its exit code and what is to be said of it."""
    try:
        command()
    except CarrayError as err:
        return err.exit_code, _lines(err)
    except SystemExit as err:
        if err.code == signal.SIGTERM:  # Ray's own answer to it, where none of ours was in place yet
            return 143, _with_advice("stopped by SIGTERM.")
        if err.code == 130:  # so does Typer end
            return 130, _with_advice("stopped by Ctrl-C.")
        return err.code if isinstance(err.code, int) else int(err.code is not None), []
    except Exception as err:
        if isinstance(err, OSError) and err.errno in _FULL:
            return StorageError.exit_code, _with_advice(_unwritten(err))
        with suppress(OSError, AttributeError):
            sys.stdout.flush()
        traceback.print_exc()  # for whoever mends it
        return 1, _with_advice(f"unexpected {_name(err)}; the lines above say where: please report them.")
    return 0, []


def _unwritten(err: OSError) -> str:
    where = err.filename or "standard output, or the temporary folder,"
    return f"{where} cannot be written ({err.strerror}); free space there, or name another place."


def _show_every_letter() -> None:
    """Let a letter that the terminal's or pipe's encoding lacks be spelled as JSON spells it, not be an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("spelled", _spelled)
        sys.stdout.reconfigure(errors="spelled")


def _spelled(err: UnicodeError) -> tuple[str, int]:
    assert isinstance(err, UnicodeEncodeError)
    return json.dumps(err.object[err.start : err.end])[1:-1], err.end


def _lines(err: CarrayError) -> list[str]:
    return _with_advice(*(err.problems if isinstance(err, SettingsError) else [str(err)]))


def _with_advice(*lines: str) -> list[str]:
    return [*lines, _advice] if _advice else list(lines)


def _name(err: Exception) -> str:
    """Name an error by its kind and the last line of what it says: Ray's carry a worker's whole stack before it."""
    said = [line.strip() for line in str(err).splitlines() if line.strip()]
    text = f"{type(err).__name__}: {said[-1]}" if said else type(err).__name__
    return shorten(text, _MOST_CHARACTERS, placeholder=" ...")


def _last_words(ended: int, board: dict[str, Any]) -> tuple[int, list[str]]:
    """Give the exit code and the last lines of a child that ended with code `ended`, below 0 by a signal."""
    if "code" in board:
        return board["code"], board["lines"]
    if ended == 0:
        return 0, []
    return ended if ended > 0 else 128 - ended, [_silent_end(ended), *([board["advice"]] if board["advice"] else [])]


def _silent_end(ended: int) -> str:
    if ended == -signal.SIGTERM:
        return "stopped by SIGTERM."
    if ended == -signal.SIGKILL:
        return (
            "the driver was killed (SIGKILL): most often for want of memory on its machine, else by whoever stopped "
            "the job."
        )
    if ended < 0:
        return f"the driver crashed ({signal.Signals(-ended).name}); Ray's lines above may say where."
    return (
        f"Ray ended the driver (exit code {ended}): most often its head node, or the Ray of this machine, is gone; see "
        "Ray's lines above, and `ray status`."
    )


def _say(lines: list[str]) -> None:
    for line in lines:
        with suppress(OSError):  # nobody is left to tell
            print(f"carray: {readable(line)}", file=sys.stderr, flush=True)


def _write_board(**values: Any) -> None:
    if _board is not None:
        text = json.dumps({"advice": _advice, **values}).encode()
        if len(text) < _BOARD_BYTES:
            _board[: len(text) + 1] = text + b"\0"


def _read_board(board: mmap.mmap) -> dict[str, Any]:
    try:
        return {"advice": "", **json.loads(board[:].split(b"\0", 1)[0])}
    except ValueError:  # killed while it wrote
        return {"advice": ""}


def _hold_signals(how: int) -> None:
    """Let no signal fall between the fork and the handlers."""
    signal.pthread_sigmask(how, {signal.SIGTERM, signal.SIGINT})


def _die_with_the_parent() -> None:
    """Let a driver not outlive the process that Ray's job server knows: another may take the run over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
