"""Ends a command's log with lines that say what happened and what to do, whatever ended it.

From: a command, and what its stages advise while it runs. To: the last lines of standard error, and an exit code.
A command runs in a child process, in a session of its own, which it shares with the processes that it starts, such as a
private Ray. The parent, which stays in the shell's process group, passes signals on, ends what the child left behind
when that is gone, and speaks last: Ray's own code ends a driver without a word when the head node is lost, and the
kernel when memory is.
Invariants: a signal to the process, to its group, or to all processes at once stops the command in order, with the code
that a shell gives (128 + its number); the second one, or GRACE_SECONDS, ends it at once. Else the child decides the
exit code where it ends by itself, and a signal that kills it is 128 + its number.
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
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

from carray.core.errors import CarrayError, SettingsError, StoppedError, StorageError
from carray.core.leftovers import remove_scratch
from carray.core.text import readable

__all__ = [
    "advise",
    "end_in_words",
    "foresee",
    "keeping_handlers",
    "restore_handlers",
    "run_watched",
    "stopping_afterwards",
    "stopping_in_order",
]

GRACE_SECONDS = 30
"""How long a command that was told to stop may take; most give it as long before they kill it."""
_SAME_SECONDS = 1.0
"""A stop that comes again within these is the same one, sent to process and group, or to parent and child."""
_BOARD_BYTES = 64 * 1024
_MOST_CHARACTERS = 400
"""Of what an error of other people's says: some carry whole stacks."""
_PR_SET_PDEATHSIG = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
_OURS = (*_STOPS, signal.SIGTSTP, signal.SIGALRM)

_board: mmap.mmap | None = None
"""What this process and the parent that watches it can both see; None where nobody watches."""
_written: dict[str, Any] = {}
"""What stands on the board."""
_advice = ""
_kept = ""
"""Says what a stop keeps; part of the sentence about it."""
_ask: Callable[[StoppedError], None] | None = None
"""Takes the error of a stop, where no exception may be raised."""
_stopped: StoppedError | None = None
"""Why the command is being stopped; None while it is not."""


def advise(text: str) -> None:
    """Say what is to be done should the command end before its time; a later call replaces it, "" takes it back."""
    global _advice
    _advice = text
    _write_board(advice=text)


def foresee(err: CarrayError) -> None:
    """Leave an error with the parent that watches, where Ray's own end may come before the command's."""
    if _stopped in (None, err):  # what fails while a job is being stopped follows from that
        _write_board(code=err.exit_code, lines=_lines(err))


def end_in_words(command: Callable[[], Any]) -> int:
    """Run a command to its end, say its last words or leave them to the parent that watches; gives its exit code."""
    advise("")
    _show_every_letter()
    with _answering_stops():
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
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)  # none may fall between the fork and the handlers
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return _Watch(child, board).wait()
    _board = board
    os.setsid()
    _die_with(parent)
    with _answering_stops():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        code = end_in_words(command)
        if _stopped is not None:  # threads that wait for a store are not waited for
            with suppress(OSError, AttributeError):
                sys.stdout.flush()
            os._exit(code)
    return code


class _Stop(BaseException):
    """Passes through Ray's libraries, which print a stack of every Exception, or take it for a trial's."""


@contextmanager
def stopping_in_order(kept: str, *, ask: Callable[[StoppedError], None] | None = None) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM, which a spot machine or `ray job stop` sends, into an orderly end.

    Args:
        kept: Says what is kept.
        ask: Takes the error that is then to be raised, where waiting inside Ray's own code bears no exception; without
            it the block is left at once.

    Raises:
        StoppedError: a signal came.
    """
    global _kept, _ask
    with _answering_stops():
        before = _kept, _ask
        _kept, _ask = kept, ask
        try:
            yield
        except (_Stop, Exception):  # what fails while a job is being stopped follows from that
            if _stopped is None:
                raise
            raise _stopped from None
        finally:
            _kept, _ask = before


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Let a library put no handler in the place of ours; without ours, it does as it likes."""
    real = signal.signal

    def keep(number: Any, handler: Any) -> Any:
        return signal.getsignal(number) if number in (*_STOPS, signal.SIGUSR1) else real(number, handler)

    if _answer in (signal.getsignal(number) for number in _STOPS):
        signal.signal = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = real


def restore_handlers() -> None:
    """Install the handlers that Python knows of again, after native code put the system's own in their place."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


@contextmanager
def stopping_afterwards() -> Iterator[None]:
    """Let a block end before it is stopped: an exception is lost where Python calls back, as it does in each fork."""
    global _ask
    before, _ask = _ask, lambda err: None
    try:
        with keeping_handlers():
            yield
    finally:
        _ask = before
    if _stopped is not None:
        if before is None:
            raise _Stop
        before(_stopped)


@contextmanager
def _answering_stops() -> Iterator[None]:
    """Answer signals in this block; the command's outermost one decides, and one that is ignored stays so."""
    global _stopped
    before = {number: signal.getsignal(number) for number in _STOPS}
    if threading.current_thread() is not threading.main_thread() or _answer in before.values():
        yield
        return
    _stopped = None
    ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, _answer)
    try:
        yield
    finally:
        _stopped = None
        for number in ours:
            signal.signal(number, before[number])


def _answer(number: int, _frame: Any) -> None:
    global _stopped
    if _stopped is not None:  # the parent decides when it has been long enough
        if _board is None and time.monotonic() - _stopped.at > _SAME_SECONDS:
            os._exit(_stopped.exit_code)
        return
    why = _STOPS[signal.Signals(number)] + (f"; {_kept}" if _kept else ".")
    _stopped = StoppedError(f"stopped by {why}", number)
    with suppress(OSError):  # now, since `ray job stop` kills after three seconds; print may be interrupted by this
        os.write(2, f"carray: stopping on {readable(why)}\n".encode())
    foresee(_stopped)
    if _ask is None:
        raise _Stop
    _ask(_stopped)


class _Watch:
    """Watches the child that runs a command."""

    def __init__(self, child: int, board: mmap.mmap) -> None:
        self._child, self._board = child, board
        self._number = 0
        self._since = 0.0

    def wait(self) -> int:
        """Pass signals on until the child has ended, end what it left, and say its last words; gives the exit code."""
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup`, and a shell's `&` in a script, set it
                signal.signal(number, self._pass_on)
        signal.signal(signal.SIGALRM, lambda *_: self._signal_session(signal.SIGKILL))
        signal.signal(signal.SIGTSTP, self._pause)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)  # its id is no other's as long as it is not reaped
        signal.alarm(0)
        self._signal_session(signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        if status:  # Ray's own code, too, ends a driver whose raylet is gone, without cleaning up
            remove_scratch()
        code, lines = _exit_lines(os.waitstatus_to_exitcode(status), _read_board(self._board), self._number)
        _say(lines)
        return code

    def _pass_on(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._since = number, now
            os.kill(self._child, number)
            signal.alarm(GRACE_SECONDS)
        elif now - self._since > _SAME_SECONDS:
            self._signal_session(signal.SIGKILL)

    def _pause(self, _number: int, _frame: Any) -> None:
        """Let Ctrl-Z stop the whole command, until the shell lets it go on."""
        self._signal_session(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_session(signal.SIGCONT)

    def _signal_session(self, number: int) -> None:
        """Send a signal to every process of the child's session, and to no other."""
        for place in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                if int(place.read_text().rpartition(")")[2].split()[3]) == self._child:
                    os.kill(int(place.parent.name), number)
        with suppress(ProcessLookupError):
            os.kill(self._child, number)


def _outcome(command: Callable[[], Any]) -> tuple[int, list[str]]:
    """Run a command; gives its exit code and what is to be said of it."""
    try:
        command()
    except (_Stop, Exception, SystemExit) as err:
        if _stopped is not None:  # what fails while a job is being stopped follows from that
            return _stopped.exit_code, _lines(_stopped)
        return _failure(err)
    return 0, []


def _failure(err: BaseException) -> tuple[int, list[str]]:
    if isinstance(err, CarrayError):
        return err.exit_code, _lines(err)
    if isinstance(err, SystemExit):
        if err.code == signal.SIGTERM:  # Ray's own answer to it, while it starts
            return 143, _with_advice("stopped by SIGTERM.")
        if err.code == 130:  # Typer's, where a library took Ctrl-C for itself
            return 130, _with_advice("stopped by Ctrl-C.")
        return err.code if isinstance(err.code, int) else int(err.code is not None), []
    if isinstance(err, OSError) and err.errno in _FULL:
        return StorageError.exit_code, _with_advice(_unwritten(err))
    with suppress(OSError, AttributeError):
        sys.stdout.flush()
    traceback.print_exception(err)  # for whoever mends it
    return 1, _with_advice(f"unexpected {_name(err)}; the lines above say where: please report them.")


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


def _name(err: BaseException) -> str:
    """Name an error by its kind and the last line of what it says: Ray's carry a worker's whole stack before it."""
    said = [line.strip() for line in str(err).splitlines() if line.strip()]
    text = f"{type(err).__name__}: {said[-1]}" if said else type(err).__name__
    return shorten(text, _MOST_CHARACTERS, placeholder=" ...")


def _exit_lines(ended: int, board: dict[str, Any], stop: int) -> tuple[int, list[str]]:
    """Give the exit code and the last lines of a child.

    Args:
        ended: The code that it ended with, below 0 by a signal.
        board: What it left.
        stop: The signal that the parent passed on to it, or 0.
    """
    advice = [board["advice"]] if board["advice"] else []
    if "code" in board and (not stop or board["code"] in (0, 128 + stop)):
        return board["code"], board["lines"]
    if stop and ended:
        return 128 + stop, [f"stopped by {_STOPS[signal.Signals(stop)]}.", *advice]
    if ended == 0:
        return 0, []
    return ended if ended > 0 else 128 - ended, [_silent_end(ended), *advice]


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
        _written.update({"advice": _advice, **values})
        text = json.dumps(_written).encode()
        if len(text) < _BOARD_BYTES:
            _board[: len(text) + 1] = text + b"\0"


def _read_board(board: mmap.mmap) -> dict[str, Any]:
    try:
        return {"advice": "", **json.loads(board[:].split(b"\0", 1)[0])}
    except ValueError:  # killed while it wrote
        return {"advice": ""}


def _die_with(parent: int) -> None:
    """Let a command not outlive the process that a shell or Ray's job server knows: another may take the run over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)
