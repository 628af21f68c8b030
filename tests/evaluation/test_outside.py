"""What counts as an outside image, of which kind and source; the AUROC on cases whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import write_bytes
from carray.evaluation.outside import auroc_interval, list_outside, outside_fingerprint, pairwise_wins


def test_a_folder_is_one_kind_and_every_image_its_own_source(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("no image")
    rows = list_outside(str(image_folder))
    assert len(rows) == 12
    assert set(rows["kind"]) == {"outside"}
    assert rows["source"].tolist() == rows["uri"].tolist() == sorted(rows["uri"])


def test_a_table_says_kinds_and_sources_and_lies_beside_its_images(tmp_path: Path) -> None:
    table = tmp_path / "outside.parquet"
    rows = {"uri": ["tiles/a.png", "/elsewhere/b.png", "s3://bucket/c.png"], "kind": ["photo", None, "drawn"]}
    pd.DataFrame(rows | {"source": ["cat", None, "page"]}).to_parquet(table)
    found = list_outside(str(table))
    assert found["uri"].tolist() == [f"{tmp_path}/tiles/a.png", "/elsewhere/b.png", "s3://bucket/c.png"]
    assert found["kind"].tolist() == ["photo", "outside", "drawn"]
    assert found["source"].tolist() == ["cat", "/elsewhere/b.png", "page"]
    pd.DataFrame({"uri": ["a.png"]}).to_parquet(table)
    assert list_outside(str(table)).iloc[0].tolist() == [f"{tmp_path}/a.png", False, "outside", f"{tmp_path}/a.png"]


def test_a_prefix_in_s3_is_a_folder(s3: str, make_image) -> None:
    for i in range(3):
        write_bytes(f"{s3}/out/{i}.png", make_image(i, format="PNG"))
    assert list_outside(f"{s3}/out")["uri"].tolist() == [f"{s3}/out/{i}.png" for i in range(3)]


def test_the_fingerprint_knows_order_from_content(image_folder: Path) -> None:
    rows = list_outside(str(image_folder))
    assert outside_fingerprint(rows) == outside_fingerprint(rows.iloc[::-1])
    assert outside_fingerprint(rows) != outside_fingerprint(rows.assign(kind="other"))
    assert outside_fingerprint(rows) != outside_fingerprint(rows.head(11))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"picture": ["a.png"]}, "lacks the column uri; it has picture; give one column the name uri"),
        ({"uri": ["a.png", None]}, "row 2, has no uri"),
        ({"uri": list("abcdefg"), "kind": list("abcdefg")}, "has 7 kinds"),
        ({"uri": pd.Series([], dtype=str)}, "holds no image"),
    ],
)
def test_an_unusable_table_is_a_sentence(tmp_path: Path, columns: dict, words: str) -> None:
    pd.DataFrame(columns).to_parquet(tmp_path / "outside.parquet")
    with pytest.raises(SchemaError, match=words):
        list_outside(str(tmp_path / "outside.parquet"))


def test_other_places_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="holds no image"):
        list_outside(str(tmp_path))
    with pytest.raises(StorageError, match="absent"):
        list_outside(str(tmp_path / "absent"))
    with pytest.raises(SettingsError, match="in Parquet"):
        list_outside(str(tmp_path / "outside.csv"))


def test_auroc_of_pairs_is_scikit_learns_ties_included() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    inside_N, outside_M = random.integers(0, 8, 40).astype(float), random.integers(2, 10, 30).astype(float)
    truth = np.r_[np.zeros(40), np.ones(30)]
    expected = roc_auc_score(truth, np.r_[inside_N, outside_M])
    assert pairwise_wins(inside_N, outside_M).mean() == pytest.approx(expected)


def test_tiles_of_one_photograph_widen_the_interval_as_one_draw() -> None:
    random = np.random.default_rng(0)
    inside_N = random.normal(0, 1, 200)
    per_photograph = random.normal(1, 1, 10)
    outside_M = np.repeat(per_photograph, 30) + random.normal(0, 0.05, 300)
    wins_NM = pairwise_wins(inside_N, outside_M)
    low, high = auroc_interval(wins_NM, [f"photo {i // 30}" for i in range(300)], seed=0)
    apart_low, apart_high = auroc_interval(wins_NM, [f"photo {i}" for i in range(300)], seed=0)
    assert low is not None and high is not None and apart_low is not None and apart_high is not None
    assert low < wins_NM.mean() < high
    assert high - low > 2 * (apart_high - apart_low)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    from scipy.stats import norm

    random, held = np.random.default_rng(1), 0
    truth = norm.cdf(1 / np.sqrt(2))
    for _ in range(100):
        wins_NM = pairwise_wins(random.normal(0, 1, 80), random.normal(1, 1, 60))
        low, high = auroc_interval(wins_NM, [str(i) for i in range(60)], seed=0, resamples=300)
        assert low is not None and high is not None
        held += low <= truth <= high
    assert held >= 88


def test_few_sources_give_no_interval_and_one_seed_one_interval() -> None:
    wins_NM = pairwise_wins(np.arange(10.0), np.arange(5.0, 13.0))
    assert auroc_interval(wins_NM, ["a", "a", "b", "b", "c", "c", "d", "d"], seed=0) == (None, None)
    sources = list("abcdefgh")
    assert auroc_interval(wins_NM, sources, seed=3) == auroc_interval(wins_NM, sources, seed=3)
    assert auroc_interval(wins_NM, sources, seed=3) != auroc_interval(wins_NM, sources, seed=4)
