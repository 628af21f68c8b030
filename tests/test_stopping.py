"""Ctrl-C and SIGTERM, to a command or its process group, stop it cleanly; jobs.drills.stop tries many moments."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.drills.stop import Scene, after, set_scene, stop

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return set_scene(tmp_path_factory.mktemp("scene"))


def there(pattern: str) -> Callable[[Path, str], bool]:
    """Give the moment at which a file of such a name is there."""
    return lambda folder, said: any(folder.rglob(pattern))


def said(words: str) -> Callable[[Path, str], bool]:
    """Give the moment at which the command has said such words."""
    return lambda folder, said: words in said


MOMENTS = [
    ("prepare", after(0.8), INT, "group"),
    ("query", there("tmp/carray-query-*"), TERM, "process"),
    ("query", there("tmp/carray-query-*"), INT, "group"),
    ("train", said("epoch 1/"), INT, "group"),
    ("tune", said("epoch 1/"), INT, "group"),
    ("classify", there("ledger/*.json"), TERM, "group"),
]
MORE = [
    ("tune", said("train: on"), INT, "process"),
    ("tune", there("tmp/ray"), TERM, "group"),
    ("prepare", after(0.3), TERM, "process"),
    ("train", there("driver.json"), TERM, "process"),
    ("train", there(".building-*"), TERM, "group"),
    ("train", said("bundle: packing"), INT, "process"),
    ("tune", there("driver.json"), INT, "process"),
    ("tune", there(".building-*"), INT, "group"),
    ("tune", said("epoch 1/"), TERM, "all"),
    ("tune", said("epoch 2/"), TERM, "group"),
    ("tune", said("bundle: packing"), TERM, "group"),
    ("classify", there("driver.json"), INT, "group"),
    ("classify", there("ledger/*.json"), INT, "process"),
    ("classify", there("ledger/*.json"), TERM, "all"),
    ("evaluate", after(1.5), INT, "group"),
    ("report", after(1.5), TERM, "group"),
]


@pytest.mark.parametrize(
    ("name", "ready", "number", "target"),
    [*MOMENTS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)],
    ids=lambda value: value if isinstance(value, str) else value.name if isinstance(value, signal.Signals) else "",
)
def test_a_signal_ends_a_command_in_order(
    scene: Scene, name: str, ready: Callable[[Path, str], bool], number: signal.Signals, target: str
) -> None:
    ended = stop(scene, name, ready=ready, number=number, target=target)
    assert ended.complaints == [], ended.said
    assert not ended.void, "it had ended before"
