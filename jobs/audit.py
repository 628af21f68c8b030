"""Reports known vulnerabilities of the installed packages, if the database of them can be reached.

    python jobs/audit.py

Prints one line; exit code 1 if an advisory with a fixed version applies. The database is the package index's own
(PyPI's JSON, by pip-audit); without it nothing is known, which is said and is no failure. Whether installed packages
fit each other (`pip check`) needs no network. Part of `make check`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from typing import Any

PROBE = "https://pypi.org/pypi/pip/23.0/json"
"""What pip-audit requests of every package: a version by itself, which a mirror may not serve."""
PROBE_SECONDS = 3


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


def database_answers() -> bool:
    """Return whether the index knows of vulnerabilities: a mirror may serve packages only."""
    try:
        with urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS) as answer:
            return "vulnerabilities" in json.load(answer)
    except (OSError, ValueError):
        return False


def verdict(text: str) -> tuple[str, bool]:
    """Read pip-audit's JSON: a line, and whether there is something to update.

    Only packages that the database answered about are counted as looked up.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, LookupError, TypeError):
        return "the database broke off, so nothing is known", False
    known = [package for package in packages if "vulns" in package]
    found = [(package, advisory) for package in known for advisory in package["vulns"]]
    fixed = [
        f"{package['name']} {package['version']} has {advisory['id']}, fixed in {advisory['fix_versions'][0]}"
        for package, advisory in found
        if advisory["fix_versions"]
    ]
    open_ones = [f"{package['name']} ({advisory['id']})" for package, advisory in found if not advisory["fix_versions"]]
    line = f"{len(known)} of {len(packages)} packages looked up, {len(found)} known vulnerabilities"
    line += f"; no fixed version yet of {', '.join(open_ones)}" if open_ones else ""
    return "\n  ".join([line, *fixed]), bool(fixed)


if __name__ == "__main__":
    main()
