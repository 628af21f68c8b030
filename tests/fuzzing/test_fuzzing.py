"""Every parser of untrusted bytes, on seed inputs, on small mutations of them and on every past finding.

`jobs.drills.fuzz` searches for new inputs; the tests here are short and deterministic.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from seeds import seeds_of
from targets import REPLAYS, TARGETS

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow and pandas about such files

ROUNDS = {"pixels": 400, "parquet": 40, "text_table": 60, "inventory": 60, "inventory_files": 60, "checkpoint": 60}
"""Changed inputs of a target, 150 where none are named: about a second of each."""
FOUND = sorted(path for path in HERE.glob("found/*/*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_answered_now(path: Path) -> None:
    REPLAYS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_small_changes_of_them_are_answered(name: str) -> None:
    chance, seeds = random.Random(name), seeds_of(name)
    for data in (b"", b"\0", *seeds):
        TARGETS[name](data)
    for _ in range(ROUNDS.get(name, 150)):
        TARGETS[name](changed(chance.choice(seeds), chance))


@pytest.mark.parametrize("name", ["vehicle", "uri", "override", "yaml", "sql", "devkit", "lease"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.text(max_size=200), st.binary(max_size=200)))
def test_any_text_is_answered(name: str, text: str | bytes) -> None:
    TARGETS[name](text.encode(errors="surrogatepass") if isinstance(text, str) else text)


def changed(data: bytes, chance: random.Random) -> bytes:
    """Mutate a file in one to four places: flip a bit, cut, repeat or insert bytes."""
    for _ in range(chance.randint(1, 4)):
        place, end = sorted((chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)))
        kind = chance.randrange(4)
        if kind == 0 and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[min(end, place + 64) :]
        elif kind == 2:
            data = data[:end] + data[place : min(end, place + 64)] + data[end:]
        else:
            data = data[:place] + chance.randbytes(chance.randint(1, 8)) + data[place:]
    return data


def test_a_reader_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr("targets.parse_vehicle", broken)
    with pytest.raises(KeyError):
        test_seeds_and_small_changes_of_them_are_answered("vehicle")


def test_every_target_has_seeds_and_every_finding_a_target() -> None:
    assert all(seeds_of(name) for name in TARGETS)
    assert {path.parent.name for path in FOUND} <= set(REPLAYS)


@pytest.mark.slow
def test_atheris_finds_its_way_into_a_target(tmp_path: Path) -> None:
    """A few thousand inputs under the fuzzer itself, counted and not timed: the job's machinery works here."""
    pytest.importorskip("atheris", reason="the fuzzers need atheris (extra `dev`), which is made for x86-64")
    import subprocess

    (tmp_path / "corpus").mkdir()
    done = subprocess.run(
        [sys.executable, HERE / "run_target.py", "vehicle", "-runs=5000", "-seed=1", tmp_path / "corpus"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0 and "DONE" in done.stderr, done.stderr[-2000:]
