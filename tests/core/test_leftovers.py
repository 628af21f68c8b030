"""What a killed process left half-made is deleted by the next one; what a living one makes is left alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from carray.core.leftovers import scratch_folder

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from carray.core.leftovers import scratch_folder
with scratch_folder("carray-test-") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_scratch_folder_of_a_killed_process_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    foreign = tmp_path / "carray-test-of-somebody"
    foreign.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    with scratch_folder("carray-test-") as ours:
        assert sorted(tmp_path.iterdir()) == sorted([foreign, theirs, Path(ours)])
    holder.kill()
    holder.communicate()
    assert theirs.exists()
    with scratch_folder("carray-test-") as ours:
        assert sorted(tmp_path.iterdir()) == sorted([foreign, Path(ours)])
    assert list(tmp_path.iterdir()) == [foreign]
