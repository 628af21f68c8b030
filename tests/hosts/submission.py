"""Is a job as its user submits it, with the documented line, from the head of a test cluster.

From: a line of a README, and a cluster. To: how it ended and what it said; a job can be stopped and submitted again.
"""

from __future__ import annotations

import secrets
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from hosts.cluster import Cluster
from hosts.machine import CLONE

__all__ = ["Submission"]

_PATIENCE_SECONDS = 300
_STOP_SECONDS = 60


@dataclass
class Submission:
    """Is one line, submitted once or several times."""

    cluster: Cluster
    words: tuple[str, ...]
    """After `ray job submit --working-dir . --`."""
    out: str
    """What the line's --out names."""
    log: Path
    codes: list[int | None] = field(default_factory=list)
    """How each submission ended; None where it did not in time."""
    _id: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _said_before: int = 0

    def start(self) -> None:
        """Submit the line, and follow the job."""
        self._id = f"{self.log.stem}-{secrets.token_hex(3)}"
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        line = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", self._id, "--", *self.words]
        with self.log.open("ab") as log:
            self._process = self.cluster.host("head").start(
                *line, environment=self.cluster.user, folder=str(CLONE), log=log
            )

    @property
    def alive(self) -> bool:
        """Say whether the job is still followed."""
        return self._process is not None and self._process.poll() is None

    def wait_for_words(self, words: str, seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until the job has said something, or has ended, or for so long."""
        until = time.monotonic() + seconds
        while self.alive and words not in self.said() and time.monotonic() < until:
            time.sleep(0.2)

    def wait(self, seconds: float = _PATIENCE_SECONDS) -> int | None:
        """Wait for the end of the job, and give the exit code of the line; None when it did not come in time."""
        assert self._process is not None
        try:
            code: int | None = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        self.codes.append(code)
        return code

    @property
    def ended_well(self) -> bool:
        """Say whether the job was done: the line's exit code is 0 for one that was stopped, too."""
        return self.codes[-1] == 0 and f"Job '{self._id}' succeeded" in self.said()

    def stop(self) -> None:
        """Stop the job as its user does.

        Raises:
            OSError: Ray refused.
        """
        done = self.cluster.ray("job", "stop", self._id, seconds=_STOP_SECONDS)
        if done.returncode:
            raise OSError(f"the job could not be stopped: {done.stdout[-500:]}{done.stderr[-500:]}")

    def said(self) -> str:
        """Give what the last submission printed."""
        with self.log.open("rb") as file:
            file.seek(self._said_before)
            return file.read().decode(errors="replace")
