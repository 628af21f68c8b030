"""Reads carray's own environment variables, each checked before anything starts.

From: the environment. To: absolute paths and numbers.
Invariants: no other module of carray reads a variable whose name begins with CARRAY_; a relative path is made absolute
once, in this process's environment, so that workers, which run in folders of their own, see the same place.
"""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3

__all__ = ["cache_home", "check_variables", "features_bytes"]

CACHE, FEATURES_GB = "CARRAY_CACHE", "CARRAY_FEATURES_GB"
_DEFAULT_FEATURES_GB = "20"
_KNOWN = (CACHE, FEATURES_GB, "CARRAY_CARS", "CARRAY_DRILL", "CARRAY_PREDICTIONS", "CARRAY_TEST_CLUSTER")
"""Those after the first two belong to benchmarks, tests and the notebook."""


def check_variables() -> None:
    """Check every variable, and make the paths among them absolute for this process and those that it starts.

    Says so of a variable whose name carray does not know.

    Raises:
        SettingsError: one sentence for each variable that cannot be used.
    """
    problems = []
    for check in (cache_home, features_bytes):
        try:
            check()
        except SettingsError as err:
            problems += err.problems
    if problems:
        raise SettingsError(problems)
    if os.environ.get(CACHE):
        os.environ[CACHE] = str(cache_home())
    for name in sorted(os.environ):
        if name.startswith("CARRAY_") and name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it reads {CACHE} and {FEATURES_GB}."
            say(f"warning: carray reads no variable {name}; {hint}")


def cache_home() -> Path:
    """Give this machine's cache folder, absolute: $CARRAY_CACHE, else ~/.cache/carray.

    Raises:
        SettingsError: CARRAY_CACHE names no folder of this machine.
    """
    given = os.environ.get(CACHE)
    if not given:
        shared = os.environ.get("XDG_CACHE_HOME", "")  # which counts only where it is absolute, says its standard
        return Path(shared if os.path.isabs(shared) else os.path.expanduser("~/.cache"), "carray")
    try:
        place = absolute(given)
    except SettingsError as err:
        raise SettingsError(f"{CACHE}: {err}") from None
    if is_s3(place):
        raise SettingsError(f"{CACHE} is {given!r}, but the cache is read by mapping files; name a local folder.")
    home = Path(place)
    there = next(path for path in (home, *home.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise SettingsError(f"{CACHE} is {given!r}, but {there} is a file; name a folder.")
    return home


def features_bytes() -> int:
    """Give what all kept features of a machine may take: $CARRAY_FEATURES_GB, else 20 GB.

    Raises:
        SettingsError: CARRAY_FEATURES_GB is no number from 0 up.
    """
    given = os.environ.get(FEATURES_GB) or _DEFAULT_FEATURES_GB
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not (math.isfinite(gigabytes) and gigabytes >= 0):
        raise SettingsError(f"{FEATURES_GB} is {given!r}; allowed is a number of gigabytes from 0 up, such as 20.")
    return int(gigabytes * 1e9)
