"""Ends a command's log with lines that say what happened and what to do, whatever ended it.

A command runs in a child process with a session of its own. The parent passes signals on, kills what the child left
running, and prints the last lines: Ray ends a driver without a message when the head node is lost, as the kernel does
when memory runs out. A signal, to one process or to the whole group, stops the command in order, with the exit code of
a shell (128 + its number); a second signal, or GRACE_SECONDS, kills it.
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
    "deferring_stops",
    "die_with",
    "keeping_handlers",
    "record_error",
    "restore_handlers",
    "run_command",
    "run_watched",
    "stopping_in_order",
]

GRACE_SECONDS = 30
"""The most time to stop in; spot machines and job servers allow about as much."""
_SAME_SECONDS = 1.0
"""A second signal within this time is the same one, sent to process and group, or to parent and child."""
_SHARED_BYTES = 64 * 1024
_MESSAGE_CHARACTERS = 400
"""Limit of a library's error message: some carry whole stacks."""
_PR_SET_PDEATHSIG = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STOPS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
_OURS = (*_STOPS, signal.SIGTSTP, signal.SIGALRM)

_shared: mmap.mmap | None = None
"""Memory shared with the parent process, holding JSON; None without such a parent."""
_written: dict[str, Any] = {}
"""The content of the shared memory."""
_advice = ""
_what_stays = ""
"""The end of the sentence about a stop: which work is kept."""
_ask: Callable[[StoppedError], None] | None = None
"""Receives a stop's error where no exception may be raised."""
_stopped: StoppedError | None = None
"""Why the command is being stopped; None while it is not."""


def advise(text: str) -> None:
    """Set the line that tells the user what to do if the command ends early; "" removes it."""
    global _advice
    _advice = text
    _share(advice=text)


def record_error(err: CarrayError) -> None:
    """Report an error to the parent at once, since Ray may end this process before the command ends."""
    if _stopped in (None, err):  # errors after a stop are its consequences
        _share(code=err.exit_code, lines=_lines(err))


def run_command(command: Callable[[], Any]) -> int:
    """Run a command, and print its last lines or hand them to the parent; returns its exit code."""
    advise("")
    _spell_unencodable_letters()
    with _answering_stops():
        code, lines = _outcome(command)
        try:
            if sys.stdout is not None:  # None where the descriptor was closed
                sys.stdout.flush()
        except OSError as err:
            code, lines = StorageError.exit_code, [*lines, _unwritten(err)]
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        if _shared is None:
            _print_lines(lines)
        else:
            _share(code=code, lines=lines)
    return code


def run_watched(command: Callable[[], Any]) -> int:
    """Run a command as `run_command` does, but in a child process, and print its last lines when that has ended.

    Returns the exit code in the child and in the parent; both must end with it.
    """
    global _shared
    shared = mmap.mmap(-1, _SHARED_BYTES)  # anonymous, and shared with a child
    signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)  # until the handlers are installed
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return _Watch(child, shared).wait()
    _shared = shared
    os.setsid()
    die_with(parent)
    with _answering_stops():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        code = run_command(command)
        if _stopped is not None:  # without waiting for threads that wait for a store
            with suppress(OSError, AttributeError):
                sys.stdout.flush()
            os._exit(code)
    return code


class _Stop(BaseException):
    """Raised on a stop; not an Exception, for which Ray prints a stack or fails a trial."""


@contextmanager
def stopping_in_order(what_stays: str, *, ask: Callable[[StoppedError], None] | None = None) -> Iterator[None]:
    """Stop in order on Ctrl-C and on SIGTERM, which spot machines and `ray job stop` send.

    Args:
        what_stays: The end of the sentence about the stop.
        ask: Receives the error for the caller to raise, where an exception inside Ray's code would do harm; without it
            the block is left at once.

    Raises:
        StoppedError: a signal came.
    """
    global _what_stays, _ask
    with _answering_stops():
        before = _what_stays, _ask
        _what_stays, _ask = what_stays, ask
        try:
            yield
        except (_Stop, Exception):  # errors after a stop are its consequences
            if _stopped is None:
                raise
            raise _stopped from None
        finally:
            _what_stays, _ask = before


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Prevent a library from replacing our signal handlers, if they are installed."""
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
    """Install Python's signal handlers again, after native code reset them to the system's."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOPS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


@contextmanager
def deferring_stops() -> Iterator[None]:
    """Finish a block before a stop takes effect: an exception in a callback, such as in fork, would be lost."""
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
    """Handle signals in the outermost such block; an ignored signal stays ignored."""
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
    if _stopped is not None:  # with a parent, the parent decides when to kill
        if _shared is None and time.monotonic() - _stopped.at > _SAME_SECONDS:
            os._exit(_stopped.exit_code)
        return
    why = _STOPS[signal.Signals(number)] + (f"; {_what_stays}" if _what_stays else ".")
    _stopped = StoppedError(f"stopped by {why}", number)
    with suppress(OSError):  # at once, since `ray job stop` kills after 3 s; print is not reentrant
        os.write(2, f"carray: stopping on {readable(why)}\n".encode())
    record_error(_stopped)
    if _ask is None:
        raise _Stop
    _ask(_stopped)


class _Watch:
    """The parent of the process that runs a command."""

    def __init__(self, child: int, shared: mmap.mmap) -> None:
        self._child, self._shared = child, shared
        self._number = 0
        self._since = 0.0

    def wait(self) -> int:
        """Pass signals on until the child ends, kill its session, and print its last lines; returns the exit code."""
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup`, and a shell's `&` in a script, set it
                signal.signal(number, self._pass_on)
        signal.signal(signal.SIGALRM, lambda *_: self._signal_session(signal.SIGKILL))
        signal.signal(signal.SIGTSTP, self._pause)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)  # not reaped yet, so its id is not reused
        signal.alarm(0)
        self._signal_session(signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        if status:  # Ray ends a driver without cleaning up when its raylet is gone
            remove_scratch()
        code, lines = _exit_lines(os.waitstatus_to_exitcode(status), _read_shared(self._shared), self._number)
        _print_lines(lines)
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
        """Pause the whole command on Ctrl-Z, until the shell continues it."""
        self._signal_session(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal_session(signal.SIGCONT)

    def _signal_session(self, number: int) -> None:
        """Send a signal to every process of the child's session, and to no other."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self._child:
                    os.kill(int(stat.parent.name), number)
        with suppress(ProcessLookupError):
            os.kill(self._child, number)


def _outcome(command: Callable[[], Any]) -> tuple[int, list[str]]:
    """Run a command; returns its exit code and the lines to print."""
    try:
        command()
    except (_Stop, Exception, SystemExit) as err:
        if _stopped is not None:  # errors after a stop are its consequences
            return _stopped.exit_code, _lines(_stopped)
        return _failure(err)
    return 0, []


def _failure(err: BaseException) -> tuple[int, list[str]]:
    if isinstance(err, CarrayError):
        return err.exit_code, _lines(err)
    if isinstance(err, SystemExit):
        if err.code == signal.SIGTERM:  # raised by Ray while it starts
            return 143, _with_advice("stopped by SIGTERM.")
        if err.code == 130:  # raised by Typer, where a library handled Ctrl-C
            return 130, _with_advice("stopped by Ctrl-C.")
        return err.code if isinstance(err.code, int) else int(err.code is not None), []
    if isinstance(err, OSError) and err.errno in _FULL:
        return StorageError.exit_code, _with_advice(_unwritten(err))
    with suppress(OSError, AttributeError):
        sys.stdout.flush()
    traceback.print_exception(err)
    return 1, _with_advice(f"unexpected {_name(err)}; the lines above say where: please report them.")


def _unwritten(err: OSError) -> str:
    where = err.filename or "standard output, or the temporary folder,"
    return f"{where} cannot be written ({err.strerror}); free space there, or name another place."


def _spell_unencodable_letters() -> None:
    """Write letters that standard output's encoding lacks as JSON's escapes."""
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
    """Name an error by its class and its message's last line; in Ray's, a worker's stack comes before."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    text = f"{type(err).__name__}: {lines[-1]}" if lines else type(err).__name__
    return shorten(text, _MESSAGE_CHARACTERS, placeholder=" ...")


def _exit_lines(ended: int, shared: dict[str, Any], stop: int) -> tuple[int, list[str]]:
    """Decide the exit code and the last lines of a child.

    Args:
        ended: Its own exit code, negative for a signal.
        shared: What it left in the shared memory.
        stop: The signal that the parent passed on to it, or 0.
    """
    advice = [shared["advice"]] if shared["advice"] else []
    if "code" in shared and (not stop or shared["code"] in (0, 128 + stop)):
        return shared["code"], shared["lines"]
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
            "the driver was killed (SIGKILL): most often because its machine ran out of memory, else by whoever "
            "stopped the job."
        )
    if ended < 0:
        return f"the driver crashed ({signal.Signals(-ended).name}); Ray's lines above may say where."
    return (
        f"Ray ended the driver (exit code {ended}): most often its head node, or the Ray of this machine, is gone; see "
        "Ray's lines above, and `ray status`."
    )


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        with suppress(OSError):  # standard error is closed
            print(f"carray: {readable(line)}", file=sys.stderr, flush=True)


def _share(**values: Any) -> None:
    if _shared is not None:
        _written.update({"advice": _advice, **values})
        text = json.dumps(_written).encode()
        if len(text) < _SHARED_BYTES:
            _shared[: len(text) + 1] = text + b"\0"


def _read_shared(shared: mmap.mmap) -> dict[str, Any]:
    try:
        return {"advice": "", **json.loads(shared[:].split(b"\0", 1)[0])}
    except ValueError:  # killed while it wrote
        return {"advice": ""}


def die_with(parent: int) -> None:
    """End with the parent, which the shell or Ray's job server knows: another driver may then take the run over."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)
