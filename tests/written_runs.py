"""Writes a search's run folder without running a search: what ASHA would have done to trials with known curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from carray.core.settings import parse_settings
from carray.core.store.files import join, write_json
from carray.manifest.manifest_file import read_manifest
from carray.search import run_folder
from carray.search.space import TuneSettings, draw_trials

MARKUP = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & $x_1$"
"""What a hostile name or reason may hold; a page must show it as it stands."""
FAMILIES: dict[str, Any] = {
    "transfer": {
        "space": {
            "backbone": ["tf_efficientnet_lite0", "mobilenetv3_small_050"],
            "train": ["head", "last_stages"],
            "learning_rate": {"log_uniform": [3e-4, 3e-3]},
            "input_size": [128, 160],
        }
    },
    "cnn": {"space": {"width": [16, 32, 64], "learning_rate": {"log_uniform": [5e-4, 5e-3]}}},
}


def write_run(
    run: str | Path,
    *,
    trials: int = 40,
    epochs: int = 9,
    seed: int = 0,
    manifest: str = "/none/manifest.parquet",
    families: dict[str, Any] = FAMILIES,
    pixels: dict[str, Any] | None = None,
) -> str:
    """Write log, ends and tables; learning rate, and for transfer `train`, decide how good a trial becomes.

    Of a run of more than six trials, number 3 goes non-finite, 4 fails, 5 is dropped, and the last is not started.
    """
    run = str(run)
    search = {"trials": trials, "epochs": epochs, "seed": seed}
    settings = parse_settings(TuneSettings, {"search": search, "families": families, "pixels": pixels or {}})
    hypers = [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]
    document = {
        "version": run_folder.VERSION,
        "manifest": manifest,
        "manifest_fingerprint": read_manifest(manifest).fingerprint if Path(manifest).exists() else "0" * 16,
        "settings": settings.model_dump(mode="json"),
        "configurations": hypers,
        "created_at": "2026-11-02T10:00:00+00:00",
    }
    write_json(join(run, run_folder.SEARCH), document)
    eventful = trials > 6
    log = _Log(run, settings.search.reduction_factor, epochs, eventful=eventful)
    rng = np.random.default_rng(seed)
    for number, hyper in enumerate(hypers[:-1] if eventful else hypers):
        if eventful and number == 4:
            run_folder.write_trial_end(run, number, status="failed", reason=f"SettingsError: {MARKUP}")
        elif eventful and number == 5:
            run_folder.write_trial_end(
                run, number, status="dropped", reason="rung 0: over 20.0% below the best candidate"
            )
        else:
            log.run_trial(number, hyper, rng)
    ended_by = "search.time_budget_minutes of 60 is used up (60.02 spent)" if eventful else None
    table = run_folder.write_tables(run, ended_by=ended_by)
    done = {
        "run": run,
        "trials": trials,
        "best_trial": table["trial_id"].iloc[0],
        "best_val_top1": table["val_top1"].iloc[0],
        "by_status": table["status"].value_counts().to_dict(),
        "ended_by": ended_by,
        "spent": {"minutes": 60.02, "device_hours": 1.9},
    }
    write_json(join(run, run_folder.DONE), done)
    return run


def write_probes(run: str) -> None:
    """Write what rung 0 said of the four candidates of FAMILIES."""
    probes = [
        {"backbone": name, "weights": "auto", "input_size": size, "val_top1": top1, "seconds": 20.0}
        for name, size, top1 in (
            ("tf_efficientnet_lite0", 160, 0.61),
            ("tf_efficientnet_lite0", 128, 0.55),
            ("mobilenetv3_small_050", 160, 0.42),
            ("mobilenetv3_small_050", 128, 0.31),
        )
    ]
    write_json(join(run, run_folder.PROBES), probes)


class _Log:
    """Writes trials one after another, judged at ASHA's rungs among those of their family that came before."""

    def __init__(self, run: str, factor: float, epochs: int, *, eventful: bool) -> None:
        self.run, self.factor, self.epochs, self.eventful = run, factor, epochs, eventful
        self.sequence, self.clock = 0, 0.0
        self.rungs: dict[tuple[str, int], list[float]] = {}

    def run_trial(self, number: int, hyper: dict[str, Any], rng: np.random.Generator) -> None:
        top = {"transfer": 0.62, "cnn": 0.33}[hyper["family"]] + 0.06 * np.log10(hyper["learning_rate"] * 1e3)
        top += 0.15 * (hyper.get("train") == "last_stages") + 0.05 * (hyper.get("backbone", "")[:2] == "tf")
        rungs = {round(self.factor**i) for i in range(6)}
        best = 0.0
        for epoch in range(1, self.epochs + 1):
            top1 = float(np.clip(top * (1 - np.exp(-0.55 * epoch)) + rng.normal(0, 0.008), 0, 1))
            best = max(best, top1)
            broken = self.eventful and number == 3 and epoch == 2
            decision = "non_finite" if broken else "finish" if epoch == self.epochs else "continue"
            if decision == "continue" and epoch in rungs:
                seen = self.rungs.setdefault((hyper["family"], epoch), [])
                seen.append(best)
                if best < np.quantile(seen, 1 - 1 / self.factor):
                    decision = "stop"
            self._log(number, hyper, epoch, None if broken else top1, decision)
            if decision != "continue":
                status = {"stop": "stopped", "finish": "finished"}.get(decision, decision)
                reason = None if decision == "finish" else f"{decision} at epoch {epoch}"
                run_folder.write_trial_end(self.run, number, status=status, reason=reason)
                return

    def _log(self, number: int, hyper: dict[str, Any], epoch: int, top1: float | None, decision: str) -> None:
        seconds = 12.0 if hyper["family"] == "transfer" else 5.0
        self.sequence += 1
        self.clock += seconds / 2
        entry = {
            "sequence": self.sequence,
            "trial_id": run_folder.trial_id(number),
            "number": number,
            "family": hyper["family"],
            "epoch": epoch,
            "train_loss": None if top1 is None else 3 - 2 * top1,
            "val_loss": None if top1 is None else 3.2 - 2 * top1,
            "val_top1": 0.0 if top1 is None else top1,
            "val_top5": 0.0 if top1 is None else min(1.0, top1 * 1.2),
            "learning_rate": hyper["learning_rate"],
            "seconds": seconds,
            "images_per_second": 400 / seconds,
            "note": "out of memory: micro-batch halved to 16" if number == 7 and epoch == 1 else None,
            "decision": decision,
            "clock_seconds": round(self.clock, 3),
            "devices": 1.0,
            "logged_at": "2026-11-02T10:00:00+00:00",
        }
        run_folder.write_log_entry(self.run, json.loads(json.dumps(entry)))
