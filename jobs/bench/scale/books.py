"""Measures the cost of books as they grow: a run's ledger, a search's log and its decisions, in a folder or a bucket.

Each function yields (name, value, unit, of how many). carray's own code writes and reads the books.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from carray.classify.ledger import LedgerEntry, done_shards, enter_shard
from carray.classify.predictions_folder import part_name
from carray.core.store.files import join, write_bytes, write_json
from carray.search import run_folder
from carray.search.judge import Judge
from carray.search.space import TuneSettings, draw_trials

Row = tuple[str, float, str, int]
_WRITERS = 16


def ledger(out: str, shards: int) -> Iterator[Row]:
    """Enter shards as many workers do, then read what is done as a resume does."""

    def enter(shard: int) -> None:
        write_bytes(join(out, part_name(shard)), b"", durable=False)  # its name is all that is asked for
        codes, examples = {"truncated": 3}, {"truncated": "s3://bucket/prefix/0123456789abcdef.jpg"}
        counts = {"rows": 10_000, "scored": 10_000, "ok": 9_997, "fetch_errors": 0, "decode_errors": 3}
        enter_shard(out, LedgerEntry(shard=shard, **counts, error_codes=codes, examples=examples, seconds=1.0))

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(enter, range(shards)))
    seconds, done = _timed(lambda: done_shards(out, shards))
    if len(done) != shards:
        raise SystemExit(f"{len(done)} of {shards} shards were found")
    yield "ledger_read", shards / seconds, "entries a second", shards


def log(run: str, trials: int, epochs: int) -> Iterator[Row]:
    """Write a search's log as its driver does, read it back as a resume does, and derive the tables."""
    settings = TuneSettings.model_validate({"search": {"trials": trials, "epochs": epochs}})
    configurations = [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]
    fingerprint = {"version": run_folder.VERSION, "manifest": "m", "manifest_fingerprint": "0", "created_at": ""}
    stored = fingerprint | {"settings": settings.model_dump(mode="json"), "configurations": configurations}
    write_json(join(run, run_folder.SEARCH), stored)
    entries = list(made_up_log(trials, epochs))
    few = entries[:100]
    started = time.perf_counter()
    for entry in few:
        run_folder.write_log_entry(run, entry)
    yield "log_write", len(few) / (time.perf_counter() - started), "epochs a second", len(few)
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda entry: run_folder.write_log_entry(run, entry), entries[100:]))
    seconds, found = _timed(lambda: run_folder.read_log(run))
    if len(found) != len(entries):
        raise SystemExit(f"{len(found)} of {len(entries)} epochs were found")
    yield "log_read", len(entries) / seconds, "epochs a second", len(entries)
    seconds, _ = _timed(lambda: run_folder.write_tables(run))
    yield "tables", seconds, "seconds", len(entries)


def decisions(scheduler: str, trials: int, epochs: int) -> Iterator[Row]:
    """Decide about every epoch of many trials, with a log in memory."""
    values = {"trials": trials, "epochs": epochs, "scheduler": scheduler}
    judge = Judge(TuneSettings.model_validate({"search": values}).search)
    ended, count = set[int](), 0
    started = time.perf_counter()
    for entry in made_up_log(trials, epochs):
        if entry["number"] not in ended:
            count += 1
            if judge.decide(entry) != "continue":
                ended.add(entry["number"])
            judge.add(entry)
    seconds = time.perf_counter() - started
    yield f"decide_{scheduler}", count / seconds, "epochs a second", count


def proposals(trials: int) -> Iterator[Row]:
    """Have TPE propose a configuration after so many trials."""
    from carray.search.tpe import Observation, propose

    settings = TuneSettings.model_validate({"search": {"trials": trials + 1, "searcher": "tpe"}})
    drawn = draw_trials(settings)
    seen = [Observation(i, drawn[i].model_dump(mode="json"), 1, (i * 37 % 101) / 101) for i in range(trials)]
    seconds, _ = _timed(lambda: propose(settings, trials, seen))
    yield "propose_tpe", seconds, "seconds", trials


def made_up_log(trials: int, epochs: int) -> Iterator[dict[str, Any]]:
    """Yield the epochs of many trials that run side by side and learn at different rates."""
    for step in range(trials * epochs):
        epoch, number = step // trials + 1, step % trials
        score = (number * 7919 % trials) / trials * (1 - 0.5**epoch)
        yield {
            "sequence": step + 1,
            "trial_id": run_folder.trial_id(number),
            "number": number,
            "family": "cnn" if number % 2 else "transfer",
            "epoch": epoch,
            **{"train_loss": 2 - score, "val_loss": 2 - score, "val_top1": score, "val_top5": score},
            **{"learning_rate": 0.01, "seconds": 60.0, "images_per_second": 100.0, "note": None},
            **{"decision": "continue", "clock_seconds": 60.0 * epoch, "devices": 1.0, "logged_at": "2026-01-01"},
        }


def _timed(action: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result
