"""Reads a variable of a MATLAB file in a child process, since scipy's reader crashes on some damaged files.

The child, which imports only this module, is limited to SECONDS of a core and 4 GB of addresses.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["read_variable"]

SECONDS = 20
_BYTES = 4 << 30


def read_variable(data: bytes, name: str) -> list[Any] | None:
    """Read a variable as a list of texts, numbers or mappings; None where the file has none of that name.

    Raises:
        ValueError: the file cannot be read; says why.
    """
    # One thread: OpenBLAS reserves addresses for each.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__, name, str(SECONDS)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, env=environment, timeout=3 * SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it could not be read within {3 * SECONDS} s") from None
    try:
        found = json.loads(done.stdout)
        values, reason = found["values"], found["reason"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"reading it ended a process with status {done.returncode}") from None
    if reason:
        raise ValueError(reason)
    return values if isinstance(values, list) else None


def _plain(value: Any) -> Any:
    fields = getattr(getattr(value, "dtype", None), "names", None)
    if fields:
        return {field: _plain(value[field]) for field in fields}
    value = value.item() if getattr(value, "size", 0) == 1 else value
    return value if isinstance(value, int | float | str) else str(value)


def _main() -> None:
    import resource

    import numpy as np
    from scipy.io import loadmat

    name, seconds = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    found: dict[str, Any] = {"values": None, "reason": ""}
    try:
        values = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True, variable_names=[name])
        found["values"] = [_plain(value) for value in np.atleast_1d(values[name])] if name in values else None
    except Exception as err:  # scipy's reader raises anything at all on damaged files
        found["reason"] = " ".join(str(err).split())[:200] or type(err).__name__
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main()
