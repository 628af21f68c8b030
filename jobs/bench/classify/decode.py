"""Measures the check for damaged images: false alarms on whole photographs, how much damage it sees, and its cost.

    python -m jobs.bench.classify.decode --data ../shared/stanford-cars

Reads JPEGs in cars_train/ and cars_test/, or any folder of JPEGs. Appends rows to results/decode.csv, one per kind of
damage. Ends with one JSON line.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image

from carray.core.errors import DecodeError
from carray.images.jpegs import has_several_scans
from carray.images.pixels import PixelSettings, decode
from jobs.bench.rows import Program, cores

TIMED, REPEATS = 400, 7
DAMAGED = 10
"""One photograph in so many is damaged."""
_SETTINGS = PixelSettings()

Damage = Callable[[bytes, bytes], bytes]
"""Returns the damaged bytes of a file; foreign bytes come from a second one."""


def _middle(data: bytes, put: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + put[: len(data) - at] + data[at + len(put) :]


def _as_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


KINDS: dict[str, Damage] = {
    "intact": lambda data, other: data,
    "jpeg: 4,096 zeros in the middle": lambda data, other: _middle(data, bytes(4096)),
    "jpeg: cut at 40 % and closed": lambda data, other: data[: len(data) * 2 // 5] + b"\xff\xd9",
    "jpeg: 512 bytes of another file": lambda data, other: _middle(data, other[2000:2512]),
    "jpeg: zeros from 40 % on": lambda data, other: data[: len(data) * 2 // 5].ljust(len(data), b"\0"),
    "png: 8 bytes changed": lambda data, other: _middle(png := _as_png(data), bytes(8 * [png[len(png) // 2] ^ 85])),
}


def main() -> None:
    """Measure, write the results, and print them."""
    program = Program(__doc__, "decode.csv")
    program.option("--data", required=True, type=Path, help="folder of JPEGs, or one with cars_test/ in it")
    arguments = program.parse()
    folders = [path for path in (arguments.data / "cars_train", arguments.data / "cars_test") if path.is_dir()]
    photographs = sorted(path for folder in folders or [arguments.data] for path in folder.glob("*.jpg"))
    if not photographs:
        program.parser.error(f"--data is {arguments.data}, which holds no *.jpg")
    rows = measure_kinds(photographs)
    rows[0] |= measure_cost(photographs)
    program.record(rows)
    false_alarms, percent = rows[0]["images"] - rows[0]["ok"], rows[0]["check_percent"]
    print(json.dumps({"images": rows[0]["images"], "false_alarms": false_alarms, "check_percent": percent}))


def measure_kinds(photographs: Sequence[Path]) -> list[dict[str, Any]]:
    """Decode every photograph as it is, and one in ten with each kind of damage; returns a row per kind."""
    rows = []
    for kind, damage in KINDS.items():
        chosen = photographs if kind == "intact" else photographs[::DAMAGED]
        others = [*chosen[1:], chosen[0]]
        with ThreadPoolExecutor(cores()) as pool:
            found = Counter(pool.map(lambda one, other, damage=damage: _code(one, other, damage), chosen, others))
        named = {code: found.pop(code, 0) for code in ("ok", "damaged", "truncated")}
        rows.append({"kind": kind, "images": len(chosen), **named, "other": found.total()})
    return rows


def measure_cost(photographs: Sequence[Path]) -> dict[str, float]:
    """Time the decoding of photographs, and its check for damage: the best of several times for each."""
    spent = check = 0.0
    for path in photographs[:: max(1, len(photographs) // TIMED)]:
        data = path.read_bytes()
        spent += _best(partial(decode, data, _SETTINGS))
        strict = _best(partial(simplejpeg.decode_jpeg, data, "RGB", strict=True))
        lax = _best(partial(simplejpeg.decode_jpeg, data, "RGB", strict=False))
        check += _best(partial(has_several_scans, data)) + max(0.0, strict - lax)
    count = len(photographs[:: max(1, len(photographs) // TIMED)])
    return {
        "decode_microseconds": round(1e6 * spent / count, 1),
        "check_microseconds": round(1e6 * check / count, 1),
        "check_percent": round(100 * check / spent, 2),
    }


def _code(path: Path, other: Path, damage: Damage) -> str:
    try:
        decode(damage(path.read_bytes(), other.read_bytes()), _SETTINGS)
    except DecodeError as err:
        return err.code
    return "ok"


def _best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
