"""Environment variables: carray's own, checked before a command starts, and those that turn telemetry off.

No other module reads a variable that begins with CARRAY_. onnxruntime (since 1.29), Ray, MLflow and the model hub's
client report usage by default; carray turns each off when it is imported, unless the user has set its variable.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from carray.core.errors import SettingsError

__all__ = ["TELEMETRY_OFF", "cache_home", "check_variables", "features_bytes", "turn_telemetry_off"]

CACHE, FEATURES_GB = "CARRAY_CACHE", "CARRAY_FEATURES_GB"
_DEFAULT_FEATURES_GB = "20"
_KNOWN = (CACHE, FEATURES_GB, "CARRAY_CARS", "CARRAY_DRILL", "CARRAY_PREDICTIONS", "CARRAY_TEST_CLUSTER")
"""All but the first two are for benchmarks, tests and the notebook."""
TELEMETRY_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def turn_telemetry_off() -> None:
    """Turn the libraries' telemetry off, in this process and its children."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)


def check_variables() -> None:
    """Check every variable, make paths absolute for workers in other folders, and warn of unknown names.

    Raises:
        SettingsError: one sentence for each variable that cannot be used.
    """
    from carray.core.progress import say
    from carray.core.text import did_you_mean

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
            hint = did_you_mean(name, _KNOWN, f"it reads {CACHE} and {FEATURES_GB}.")
            say(f"warning: carray reads no variable {name}; {hint}")


def cache_home() -> Path:
    """Find this machine's cache folder, absolute: $CARRAY_CACHE, else ~/.cache/carray.

    Raises:
        SettingsError: CARRAY_CACHE names no folder of this machine.
    """
    from carray.core.store.files import absolute, is_s3

    given = os.environ.get(CACHE)
    if not given:
        shared = os.environ.get("XDG_CACHE_HOME", "")  # by its specification ignored where it is relative
        return Path(shared if os.path.isabs(shared) else os.path.expanduser("~/.cache"), "carray")
    try:
        path = absolute(given)
    except SettingsError as err:
        raise SettingsError(f"{CACHE}: {err}") from None
    if is_s3(path):
        raise SettingsError(f"{CACHE} is {given!r}, but the cache is read by mapping files; name a local folder.")
    home = Path(path)
    existing = next(folder for folder in (home, *home.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise SettingsError(f"{CACHE} is {given!r}, but {existing} is a file; name a folder.")
    return home


def features_bytes() -> int:
    """Read the size limit of a machine's cached features: $CARRAY_FEATURES_GB, else 20 GB.

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
