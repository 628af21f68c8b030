"""Searches without Ray, on one device: successive halving over processes that share it; then refits and measures once.

From: a pack and jobs/configs/cars-gpu.yaml. To: gpu.json.
Invariants: carray's space and carray's Fit, with its seeds; but synchronous halving in this loop, where `carray tune`
has Ray's asynchronous one, since Ray is not on such a machine; an epoch's checkpoint is written before it counts, so
that a command which ended with its slice of time goes on when it is repeated; cars_test is opened after the winner is
chosen.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.bench.gpu_machine import decode_pack, open_blocks, prepare_imports

__all__ = ["run_search", "rungs", "survivors"]

QUICK = [
    *["search.trials=3", "search.epochs=2", "search.grace_epochs=1", "pixels.decode_size=72", "pixels.input_size=64"],
    *["families.transfer.default.input_size=64", "families.transfer.default.eval_size=64"],
    *["families.transfer.space.input_size=[64]", "families.transfer.space.batch_images=[16]"],
]
"""Settings of a try on a CPU."""
QUICK_CLASSES = 6


def run_search(
    pack: Path, work: Path, *, config: str, overrides: Sequence[str], slice_minutes: float, workers: int, quick: bool
) -> dict[str, Any] | None:
    """Search until all is done or the slice of time is up; gives the result, or None where a repetition must go on."""
    slice_end = time.time() + 60 * slice_minutes
    if (work / "result.json").exists():
        return dict(json.loads((work / "result.json").read_text()))  # cars_test is measured once
    stood_in = prepare_imports()
    import torch

    from carray.core.settings import load_settings
    from carray.trials.draw import draw_trials
    from carray.trials.space import TuneSettings

    settings = load_settings(TuneSettings, config=config, overrides=[*overrides, *(QUICK if quick else [])])
    work.mkdir(parents=True, exist_ok=True)
    os.environ["CARRAY_CACHE"] = str(work / "cache")
    clock = _Clock(work / "clock.json", budget=60 * (settings.search.time_budget_minutes or math.inf))
    if not (work / "test-splits.npy").exists():
        decode_pack(pack, work, settings.pixels, classes=QUICK_CLASSES if quick else None)
    weights = str((pack / "1" / "weights").resolve())
    hypers = [hyper.model_copy(update={"weights": weights}) for hyper in draw_trials(settings)]
    shared: dict[str, Any] = {
        "work": str(work),
        "settings": settings.model_dump(mode="json"),
        "hypers": [hyper.model_dump(mode="json") for hyper in hypers],
        "class_count": len(json.loads((pack / "1" / "pack.json").read_text())["classes"]),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, [shared]) as pool:
        # A fifth of the time is kept for the final fit, which no other trial runs beside.
        alive = _halve(pool, settings.search, len(hypers), min(slice_end, clock.end(0.8)), work)
        clock.keep()
        if alive is None and time.time() >= slice_end:
            return None
        histories = _histories(work, len(hypers))
        winner = max(histories, key=lambda number: (_best(histories[number]), -number))
        refitted = _refit(pool, winner, histories[winner], settings.search.epochs, slice_end, clock, work)
    clock.keep()
    if refitted is None:
        return None
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "stood_in_for": stood_in,
        "commit": json.loads((pack / "1" / "pack.json").read_text())["commit"],
        "trials": len(hypers),
        "epochs": sum(len(history) for history in histories.values()),
        "search_minutes": round(clock.spent / 60, 2),
        "refitted": refitted,
        "winner": {**shared["hypers"][winner], "weights": "auto"},
        "val_top1": _best(histories[winner]),
        "histories": {str(number): [e["val_top1"] for e in history] for number, history in histories.items()},
        **_measure(shared, winner, refitted=refitted),
    }
    _replace(work / "result.json", json.dumps(result))
    return result


def rungs(search: Any) -> list[int]:
    """Give the epochs after which trials are compared: grace, times the factor each, and all epochs."""
    found = [search.grace_epochs]
    while found[-1] * search.reduction_factor < search.epochs:
        found.append(round(found[-1] * search.reduction_factor))
    return [*found, search.epochs]


def survivors(best: dict[int, float], factor: float) -> list[int]:
    """Choose who goes on: the best one in `factor`, at least one, never one without a finite result."""
    ranked = sorted((number for number in best if best[number] >= 0), key=lambda number: (-best[number], number))
    return ranked[: max(1, math.ceil(len(best) / factor))]


def _halve(pool: Any, search: Any, trials: int, until: float, work: Path) -> list[int] | None:
    """Run rung after rung; gives the last survivors, or None where time was up before."""
    alive = list(range(trials))
    for rung in rungs(search):
        tasks = [(number, rung, until, False) for number in alive]
        for number in pool.imap_unordered(_train, tasks, chunksize=1):
            history = _history(work, str(number))
            best = f"best {_best(history):.1%} on validation" if _best(history) >= 0 else "nothing finite yet"
            print(f"trial {number}: epoch {len(history)} of {rung}, {best}", flush=True)
        histories = {number: _history(work, str(number)) for number in alive}
        if any(not history or (len(history) < rung and _best(history) >= 0) for history in histories.values()):
            return None
        # Of these epochs only: what had gone on before this command began is judged as it was then.
        reached = {number: _best(history[:rung]) for number, history in histories.items()}
        alive = survivors(reached, search.reduction_factor)
    return alive


def _refit(
    pool: Any, winner: int, history: list[dict[str, Any]], epochs: int, slice_end: float, clock: _Clock, work: Path
) -> bool | None:
    """Train the winner on training and validation images where time is left for it; None: its slice was too short."""
    done = len(_history(work, "refit"))
    needed = sorted(epoch["seconds"] for epoch in history)[len(history) // 2] * (epochs - done)
    if not done and clock.spent + needed > clock.budget:
        print(
            f"no final fit: it would take {needed:.0f} s, and {clock.budget - clock.spent:.0f} s are left", flush=True
        )
        return False
    pool.apply(_train, [(winner, epochs, slice_end, True)])
    return True if len(_history(work, "refit")) == epochs else None


class _Clock:
    """Counts the seconds that all commands of a search took together."""

    def __init__(self, place: Path, *, budget: float) -> None:
        self._place, self.budget, self._started = place, budget, time.time()
        self._earlier = float(json.loads(place.read_text())) if place.exists() else 0.0

    @property
    def spent(self) -> float:
        return self._earlier + time.time() - self._started

    def end(self, share: float) -> float:
        """Give the time of day at which so much of the budget is used up."""
        return time.time() + max(0.0, self.budget * share - self.spent)

    def keep(self) -> None:
        self._place.write_text(json.dumps(self.spent))


_SHARED: dict[str, Any] = {}


def _start_worker(shared: dict[str, Any]) -> None:
    prepare_imports()
    _SHARED.update(shared)
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 4))


def _train(task: tuple[int, int, float, bool]) -> int:
    """Train one trial to an epoch, or until the time is up; `refit` takes the validation images, too."""
    number, target, until, refit = task
    work = Path(_SHARED["work"])
    name = "refit" if refit else str(number)
    if len(_history(work, name)) >= target:
        return number
    fit = _build(number, splits=("train", "val") if refit else ("train",))
    place = work / f"{name}.last"
    if place.exists():
        fit.restore(place.read_bytes())
    while fit.epoch < target and time.time() < until:
        result = fit.run_epoch()
        if not math.isfinite(result.train_loss):
            _replace(work / f"{name}.json", json.dumps([*_history(work, name), {**asdict(result), "val_top1": -1.0}]))
            break
        if refit or result.val_top1 >= max(epoch.val_top1 for epoch in fit.history):
            _save_weights(fit, work / f"{name}.safetensors")
        _replace(place, fit.checkpoint())
        _replace(work / f"{name}.json", json.dumps([asdict(epoch) for epoch in fit.history]))
    return number


def _build(number: int, *, splits: Sequence[str]) -> Any:
    from carray.trials.fit import Fit
    from carray.trials.hyper import read_hyper
    from carray.trials.space import TuneSettings

    settings = TuneSettings.model_validate(_SHARED["settings"])
    hyper = read_hyper(_SHARED["hypers"][number])
    (block,) = open_blocks(Path(_SHARED["work"]), "search")
    return Fit(
        hyper,
        block,
        settings.trial_pixels(hyper),
        class_count=_SHARED["class_count"],
        epochs=settings.search.epochs,
        seed=settings.search.seed + number,
        device=_SHARED["device"],
        splits=splits,
    )


def _measure(shared: dict[str, Any], winner: int, *, refitted: bool) -> dict[str, Any]:
    """Fit the temperature on validation with the winner, and measure what is handed over on cars_test, once."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional

    from carray.trials.nets import predict_logits

    _SHARED.update(shared)
    fit, work = _build(winner, splits=("train",)), Path(shared["work"])
    search, test = open_blocks(work, "search", "test")

    def logits(name: str, block: Any, split: str) -> tuple[Any, Any]:
        fit.net.load_state_dict(load_file(work / f"{name}.safetensors"))
        rows_N = block.of_split(split)
        logits_NK = torch.from_numpy(predict_logits(fit.net, block, rows_N, fit.pixels))
        return logits_NK, torch.from_numpy(block.labels_N[rows_N])

    val_NK, val_N = logits(str(winner), search, "val")
    temperatures = torch.logspace(-1, 1, 401).tolist()
    temperature = min(temperatures, key=lambda t: float(functional.cross_entropy(val_NK / t, val_N)))
    test_NK, test_N = logits("refit" if refitted else str(winner), test, "test")
    hits_N5 = test_NK.topk(5).indices == test_N[:, None]
    return {
        "temperature": round(temperature, 4),
        "test_images": len(test_N),
        "test_top1": float(hits_N5[:, 0].double().mean()),
        "test_top5": float(hits_N5.any(dim=1).double().mean()),
        "test_loss": float(functional.cross_entropy(test_NK / temperature, test_N)),
    }


def _save_weights(fit: Any, place: Path) -> None:
    from safetensors.torch import save

    _replace(place, save({name: value.contiguous() for name, value in fit.weights().items()}))


def _replace(place: Path, data: bytes | str) -> None:
    unfinished = place.with_name(f"{place.name}.part")
    unfinished.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(unfinished, place)


def _history(work: Path, name: str) -> list[dict[str, Any]]:
    place = work / f"{name}.json"
    return list(json.loads(place.read_text())) if place.exists() else []


def _histories(work: Path, trials: int) -> dict[int, list[dict[str, Any]]]:
    return {number: history for number in range(trials) if (history := _history(work, str(number)))}


def _best(history: Sequence[dict[str, Any]]) -> float:
    """Give a trial's best accuracy; -1 of one that went non-finite, or has none."""
    values = [epoch["val_top1"] for epoch in history]
    return -1.0 if not values or min(values) < 0 else max(values)
