"""A run planned and scored in this process, without Ray: what a worker does, minus what carries it there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from carray.bundle.bundle_folder import open_bundle, write_info
from carray.bundle.certificates import Views, add_int8
from carray.classify.plan import describe_run, plan_run
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.score_shard import ShardScorer


@pytest.fixture
def begin_run(small_bundle, tmp_path):
    """Give a function that plans a run: source -> (what was listed, a scorer of its shards, its folder)."""

    def begin(source, *, out=None, bundle=small_bundle, **settings):
        out = out or str(tmp_path / "out")
        chosen = ClassifySettings(**settings)
        info = open_bundle(bundle)
        wanted = describe_run(info, bundle, str(source), chosen)
        run, totals = plan_run(out, wanted, chosen, uses_boxes=info.uses_boxes)
        return totals, ShardScorer(bundle, out=out, run=run, settings=chosen), out

    return begin


@pytest.fixture
def score_all(begin_run):
    """Give a function that scores a whole source: source -> its rows, one dict an image."""
    from carray.queries import read_predictions

    def score(source, **settings):
        totals, scorer, out = begin_run(source, **settings)
        for shard in range(totals.shards):
            scorer.score_shard(shard)
        return read_predictions(out)

    return score


@pytest.fixture(scope="session")
def certified_bundle(small_bundle, tmp_path_factory) -> str:
    """Give the small bundle with int8 certified as nine times as fast as fp32, whatever it is."""
    bundle = str(shutil.copytree(small_bundle, tmp_path_factory.mktemp("certified") / "bundle"))
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (120, 40, 40, 3), dtype=np.uint8)
    info = add_int8(bundle, Views(pixels_NHWC[:20], pixels_NHWC, np.zeros(120, dtype=np.int64)), keep=True)
    changes = {"holds": True, "reason": "", "images_per_second": {"fp32": {8: 1.0}, "int8": {8: 9.0}}}
    certified = {"int8": info.certificates["int8"].model_copy(update=changes)}
    write_info(bundle, info.model_copy(update={"certificates": certified}))
    return bundle


@pytest.fixture
def broken_folder(tmp_path, make_image) -> Path:
    """Give a folder of five sound images with odd names and ten files that are none."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for i, name in enumerate(["a b.jpg", "ü#1.png", "100%41.jpg", "what?.webp", "new\nline.gif"]):
        form = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}[name.rsplit(".")[-1]]
        (folder / name).write_bytes(make_image(i, format=form))
    whole = make_image(9, width=200, height=160)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.jpg").write_bytes(whole[: len(whole) * 2 // 3] + b"\xff\xd9")
    (folder / "truncated.png").write_bytes(make_image(9, format="PNG")[:200])
    (folder / "text.jpg").write_bytes(b"<html>404</html>")
    (folder / "html.PNG").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "header.jpg").write_bytes(whole[:20])
    (folder / "zeros.bmp").write_bytes(bytes(4096))
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    with open(bytes(folder) + b"/caf\xe9.jpg", "wb") as file:
        file.write(make_image(7))
    return folder
