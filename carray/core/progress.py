"""Shows progress on standard error: a bar on a terminal, plain lines (done/total, rate, errors, ETA) in a log.

Standard output holds results only; its last line is one JSON document where the command's help says so.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar

from carray.core.text import readable

__all__ = ["Progress", "breaking_silence", "print_result", "say"]

LOG_EVERY_SECONDS = 10.0
"""Time between plain lines: a ten-hour job writes 3,600 of them."""
SILENCE_SECONDS = 60.0
"""Time without progress after which a job prints a line, to show that it does not hang."""


def say(text: str) -> None:
    """Write one line to standard error, with unprintable characters spelled out."""
    print(readable(text), file=sys.stderr, flush=True)


@contextmanager
def breaking_silence(text: Callable[[], str], *, each_seconds: float = SILENCE_SECONDS) -> Iterator[Callable[[], None]]:
    """Print once a minute how long nothing has happened, and `text`; yields a function to call on progress."""
    last_event, ended = [time.monotonic()], threading.Event()

    def watch() -> None:
        last_line = last_event[0]
        while not ended.wait(each_seconds / 4):
            now = time.monotonic()
            if now - max(last_line, last_event[0]) >= each_seconds:
                last_line = now
                say(f"nothing for {now - last_event[0]:,.0f} s: {text()}")

    def note_event() -> None:
        last_event[0] = time.monotonic()

    thread = threading.Thread(target=watch, name="silence", daemon=True)
    thread.start()
    try:
        yield note_event
    finally:
        ended.set()


def print_result(result: Mapping[str, Any]) -> None:
    """Write a command's result as one JSON line, the last of standard output."""
    sys.stderr.flush()
    text = json.dumps(result, ensure_ascii=False, sort_keys=False)
    # JSON does not escape Unicode's line ends and direction marks.
    print("".join(letter if readable(letter) == letter else json.dumps(letter)[1:-1] for letter in text), flush=True)


class Progress:
    """Progress in images, epochs or trials; use as a context manager, from one thread.

    The total may be changed while it runs.
    """

    _bars: ClassVar[list[Progress]] = []

    def __init__(self, what: str, *, total: int | None, unit: str = "images") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.errors = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not Progress._bars:  # one bar at a time; another Progress writes lines
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            Progress._bars.remove(self)
        say(self._line(finished=error is None))

    @property
    def rate(self) -> float:
        """Units done a second."""
        return self.done / max(time.monotonic() - self._started, 1e-9)

    def advance(self, done: int = 1, *, errors: int = 0) -> None:
        """Count finished units, `errors` of which are error rows."""
        self.done += done
        self.errors += errors
        if self._bar is not None:
            self._bar.update(self._task, total=self.total, completed=self.done, errors=self.errors, rate=self.rate)
        elif time.monotonic() - self._last_line >= LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            say(self._line(finished=False))

    def _open_bar(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn(self.what),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(self.unit + ", {task.fields[rate]:,.0f} a second, {task.fields[errors]} errors"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self.what, total=self.total, errors=0, rate=0.0)
        self._bar.start()
        Progress._bars.append(self)

    def _line(self, *, finished: bool) -> str:
        total = f"/{self.total:,}" if self.total is not None else ""
        line = f"{self.what}: {self.done:,}{total} {self.unit}, {self.rate:,.1f} a second, {self.errors:,} errors"
        if finished or self.total is None or not self.rate:
            return f"{line}, {time.monotonic() - self._started:,.0f} s"
        return f"{line}, ETA {(self.total - self.done) / self.rate:,.0f} s"
