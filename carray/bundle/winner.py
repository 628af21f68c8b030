"""Decides what RUN/bundle holds: the search's winner, its refit, one training, or the trial that the user chose.

From: a run that a search or a training left. To: a bundle folder.
Invariants: when a resumed search finds a better trial, that one is packed; a trial that the user exported stays until
another is exported; bundle.json says under `search` what the bundle is of. A refit keeps the temperature and the
threshold of the model before it, since no image is left to choose them on, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from carray.bundle.bundle_folder import BUNDLE_JSON, BundleInfo
from carray.bundle.pack import pack_winner
from carray.core.errors import BundleError, SearchError, SettingsError
from carray.core.progress import say
from carray.core.settings import parse_settings
from carray.core.store.files import absolute, exists, join, read_json
from carray.manifest.manifest_file import read_manifest
from carray.search import run_folder
from carray.search.space import TuneSettings
from carray.search.train_one import TRAINING, find_row, refit_run, settings_of_row, train

__all__ = ["export_trial", "keep_trained", "keep_winner", "refit"]


def keep_winner(run: str, *, finish_refit: Callable[[str], object] | None = None) -> str:
    """Pack a search's winner into RUN/bundle, refitted where search.refit says so, unless it is there; gives its URI.

    Where the winner cannot be packed, the next best is, and a line says so. `finish_refit` is called as in `refit`.

    Raises:
        SearchError: no trial came to a result, or the refit was interrupted.
        BundleError: no trial's exported model is the same model.
    """
    run = absolute(run)
    bundle = join(run, "bundle")
    trials, document = run_folder.read_trials(run), run_folder.read_search(run)
    there, best = _packed(bundle), run_folder.best_trial(trials)["trial_id"]
    if there.get("chosen"):
        if there["trial_id"] != best:
            say(
                f"{bundle} keeps {there['trial_id']}, which was exported on purpose; "
                f"carray export {run} --trial {best} packs the winner"
            )
        return bundle
    problems = []
    for row in trials[trials["val_top1"].notna()].to_dict("records"):  # best first
        try:
            _pack_unless_there(run, row, document, there, finish_refit)
            return bundle
        except BundleError as err:
            problems.append(f"{row['trial_id']}: {err}")
            say(f"bundle: {row['trial_id']} cannot be packed, so the next best is tried instead: {err}")
    raise BundleError(f"none of the {len(problems)} trials with a result can be packed; the best, {problems[0]}")


def _pack_unless_there(
    run: str,
    row: Mapping[Any, Any],
    document: Mapping[str, Any],
    there: Mapping[str, Any],
    finish_refit: Callable[[str], object] | None,
) -> None:
    """Pack a trial into RUN/bundle, refitted where the search says so, unless `there` says it is packed."""
    search = parse_settings(TuneSettings, document["settings"]).search
    trial, epochs = str(row["trial_id"]), search.refit_epochs or search.epochs
    wanted = {"trial_id": trial, "epoch": int(row["best_epoch"])}
    wanted |= {"refit": True, "refit_epochs": epochs} if search.refit else {}
    if {name: there[name] for name in ("trial_id", "epoch", "refit", "refit_epochs") if name in there} == wanted:
        return
    if search.refit:
        out, bundle = refit_run(run, trial, epochs), join(run, "bundle")
        refit(run, trial, manifest=document["manifest"], out=out, to=bundle, epochs=epochs, finish=finish_refit)
    else:
        pack_winner(run, trial=trial)


def keep_trained(run: str) -> str:
    """Pack what `train` left in a run, unless it is there; gives the bundle's URI.

    Raises:
        SearchError: the training came to no result.
        BundleError: the exported model is not the same model.
    """
    bundle = join(absolute(run), "bundle")
    if not _packed(bundle):
        pack_winner(run)
    return bundle


def export_trial(run: str, trial: str, *, out: str | None = None) -> BundleInfo:
    """Pack the trial of that id, or that row of the leaderboard, into RUN/bundle or `out`.

    In RUN/bundle it stays when the search is resumed; only where it is the winner, a better one may replace it. For the
    folder of a refit, the refit is packed again.

    Raises:
        SettingsError: there is no run, or it has no such trial.
        SearchError: that trial came to no result.
        BundleError: the exported model is not the same model.
    """
    run = absolute(run)
    training = read_json(join(run, TRAINING)) if exists(join(run, TRAINING)) else {}
    if before := training.get("refit_of"):
        refitted = str(find_row(run, trial)["trial_id"])
        return _pack_refit(before["run"], before["trial_id"], refit_run=run, refitted=refitted, to=out)
    chosen = str(_row_with_result(run, trial)["trial_id"])
    is_winner = chosen == run_folder.best_trial(run_folder.read_trials(run))["trial_id"]
    return pack_winner(run, trial=chosen, to=out, note={} if is_winner else {"chosen": True})


def refit(
    run: str,
    row: str,
    *,
    manifest: str,
    out: str,
    to: str | None = None,
    epochs: int | None = None,
    finish: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Train a row's configuration once more, on train and val, and pack its last epoch into `to` or OUT/bundle.

    `finish` is called with `out` between the two.

    Raises:
        SettingsError: there is no run, it has no such row, or `manifest` is not the run's.
        SearchError: that row came to no result to keep the temperature of, or the training was interrupted.
        BundleError: the exported model is not the same model.
    """
    run, out = absolute(run), absolute(out)
    trial = str(_row_with_result(run, row)["trial_id"])
    settings, _ = settings_of_row(run, trial, overrides=[] if epochs is None else [f"epochs={epochs}"])
    source = read_manifest(absolute(manifest))
    if source.fingerprint != run_folder.read_search(run)["manifest_fingerprint"]:
        raise SettingsError(
            f"{source.uri} is not the manifest of {run} (its images, labels or splits differ), so the temperature that "
            "a refit keeps would be of other images; give that manifest."
        )
    outcome = train(manifest, run=out, settings=settings, refit_of={"run": run, "trial_id": trial})
    if finish is not None:
        finish(out)
    bundle = to or join(out, "bundle")
    if to is not None or not _packed(bundle):
        _pack_refit(run, trial, refit_run=out, refitted=outcome["trial"], to=bundle)
    return {**outcome, "bundle": bundle}


def _pack_refit(run: str, trial: str, *, refit_run: str, refitted: str, to: str | None) -> BundleInfo:
    """Pack the last epoch of a finished refit of a run's trial, with what is known of the network before it."""
    if not exists(join(refit_run, run_folder.DONE)):
        raise SearchError(f"the refit in {refit_run} is unfinished; repeat the command that began it.")
    before, search = _row_with_result(run, trial), run_folder.read_search(refit_run)
    source = read_manifest(search["manifest"])
    note = {
        "refit": True,
        "refit_splits": ["train", "val"],
        "refit_images": len(source.by_content("train", "val")),
        "refit_epochs": search["settings"]["search"]["epochs"],
        "temperature_from": f"{trial}, epoch {int(before['best_epoch'])}, before the refit",
    }
    weights = run_folder.best_weights(refit_run, refitted)
    return pack_winner(run, trial=trial, to=to or join(refit_run, "bundle"), weights=weights, note=note)


def _row_with_result(run: str, row: str) -> dict[str, Any]:
    found = find_row(run, row)
    if not found["val_top1"] >= 0:  # null, which pandas reads as nan
        raise SearchError(
            f"{found['trial_id']} of {run} came to no result ({found['status']}: {found['reason']}); choose a row of "
            "carray leaderboard that has one."
        )
    return found


def _packed(bundle: str) -> Mapping[str, Any]:
    """Give what a bundle says of how it was found; empty where there is no finished one."""
    place = join(bundle, BUNDLE_JSON)
    return dict(read_json(place).get("search", {})) if exists(place) else {}
