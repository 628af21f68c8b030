"""Reads what the package index knows of vulnerabilities, and what pip-audit made of it."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

__all__ = ["database_answers", "verdict"]

PROBE = "https://pypi.org/pypi/pip/23.0/json"
"""What pip-audit asks for of every package: a version by itself, which a mirror may not serve."""
PROBE_SECONDS = 3


def database_answers() -> bool:
    """Say whether the index tells of vulnerabilities: a mirror may serve packages and know of none."""
    try:
        with urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS) as answer:
            return "vulnerabilities" in json.load(answer)
    except (OSError, ValueError):
        return False


def verdict(text: str) -> tuple[str, bool]:
    """Read pip-audit's JSON: a line, and whether there is something to mend.

    A package that the database does not know is not thereby well: only those that it answered about are counted.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, LookupError, TypeError):
        return "the database broke off, so nothing is known", False
    known = [package for package in packages if "vulns" in package]
    found = [(package, advisory) for package in known for advisory in package["vulns"]]
    mended = [
        f"{package['name']} {package['version']} has {advisory['id']}, mended in {advisory['fix_versions'][0]}"
        for package, advisory in found
        if advisory["fix_versions"]
    ]
    open_ones = [f"{package['name']} ({advisory['id']})" for package, advisory in found if not advisory["fix_versions"]]
    line = f"{len(known)} of {len(packages)} packages looked up, {len(found)} known vulnerabilities"
    line += f"; no mended version yet of {', '.join(open_ones)}" if open_ones else ""
    return "\n  ".join([line, *mended]), bool(mended)
