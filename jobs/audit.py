"""Asks whether what is installed is known to be vulnerable, where the database of that can be reached.

    python jobs/audit.py

From: the packages beside this Python. To: one line, and exit code 1 where an advisory with a mended version applies.
The database is the package index's own (PyPI's JSON, by pip-audit); without it nothing is known, which is said and is
no failure. Whether installed packages fit each other (`pip check`) needs no network. Part of `make check`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.bench.advisories import database_answers, verdict


def main() -> None:
    """Check the environment's consistency, then its advisories."""
    fits = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if fits.returncode:
        raise SystemExit(f"audit: installed packages do not fit each other:\n{fits.stdout}")
    if not database_answers():
        print("audit: no answer from the database of known vulnerabilities, so nothing was looked up in it")
        return
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line, bad = verdict(done.stdout)
    print(f"audit: {line}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
