"""Runs `carray classify` as its user does, watches how far it is, and says how it ended.

From: a bundle and a source. To: an output folder, and an exit code and a log a run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs.bench.processes import AGENTS_SECONDS, kill_marked, marked_pids, start_marked, title

__all__ = ["PATIENCE_SECONDS", "Job"]

PATIENCE_SECONDS = 180
_SHARDS = ("shard_images_first=16", "shard_images_max=32", "fetch_concurrency=4", "batch_images=8")
"""Some thirty shards of a few tenths of a second, so that a blow may fall between any two of a job's steps."""


@dataclass
class Job:
    """Is one output folder's command: it can be started again and again."""

    bundle: str
    source: str
    out: str
    log: Path
    mark: str
    environment: dict[str, str]
    codes: list[int | None] = field(default_factory=list)
    """The exit code of each run; None where it did not end by itself."""
    process: subprocess.Popen[bytes] | None = None
    _said_before: int = 0

    def start(self, *, retry_failed: bool = False) -> None:
        """Start the command."""
        settings = [word for setting in _SHARDS for word in ("--set", setting)]
        command = [sys.executable, "-m", "carray", "classify", self.bundle, self.source, "--out", self.out, *settings]
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        self.process = start_marked(
            [*command, *(["--retry-failed"] if retry_failed else [])],
            mark=self.mark,
            log=self.log,
            environment=self.environment,
        )

    @property
    def alive(self) -> bool:
        """Say whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int | None:
        """Wait for the command's end and give its exit code; None when it had to be killed."""
        assert self.process is not None
        try:
            code: int | None = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_marked(self.mark, self.process)
            self.process.wait()
            code = None
        self.codes.append(code)
        return code

    def said(self) -> str:
        """Give what the last run printed."""
        with self.log.open("rb") as file:
            file.seek(self._said_before)
            return file.read().decode(errors="replace")

    def shards_done(self) -> int:
        """Count the ledger's entries."""
        from carray.core.store.files import join, list_files

        return len(list_files(join(self.out, "_carray", "ledger")))

    def wait_for_shards(self, count: int) -> bool:
        """Wait until so many shards are done, and for none until Ray has begun to start; False when it ended before."""
        from carray.core.store.files import join, list_files

        until = time.monotonic() + PATIENCE_SECONDS
        while self.alive and time.monotonic() < until:
            begun = "Ray:" in self.said() or list_files(join(self.out, "_carray"))
            if begun and self.shards_done() >= count:
                return True
            time.sleep(0.05)
        return self.alive

    def fetch_errors(self) -> int:
        """Count the rows that the ledger says could not be fetched."""
        from carray.core.store.files import join, list_files, read_json

        return sum(int(read_json(uri)["fetch_errors"]) for uri in list_files(join(self.out, "_carray", "ledger")))

    def left(self, seconds: float = AGENTS_SECONDS) -> list[str]:
        """Name the processes that are still there some time after the end; they are killed."""
        until = time.monotonic() + seconds
        while (pids := marked_pids(self.mark)) and time.monotonic() < until:
            time.sleep(0.2)
        left = [title(pid).split("/")[-1][:60].strip() for pid in pids]
        kill_marked(self.mark, self.process)
        return left
