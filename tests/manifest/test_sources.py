"""What each layout of a source offers, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import write_bytes
from carray.core.store.listing import ListedImage
from carray.manifest.candidates import _relative_path
from carray.manifest.sources import list_candidates


def touch(folder: Path | str, *names: str) -> str:
    for name in names:
        write_bytes(f"{folder}/{name}", b"x")
    return str(folder)


def labels(source: str, layout: str = "auto") -> dict[str, tuple[str | None, str | None]]:
    """Give label and given split by path below the source."""
    rows = list_candidates(source, layout=layout).rows
    below = rows["uri"].str.removeprefix(source + "/")
    return {
        uri: (None if pd.isna(label) else label, None if pd.isna(split) else split)
        for uri, label, split in zip(below, rows["label"], rows["split"], strict=True)
    }


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """Give a new folder, local and on S3."""
    return str(tmp_path / "source") if request.param == "local" else request.getfixturevalue("s3") + "/some/source"


def test_class_folders_give_labels_at_any_depth(place):
    touch(
        place, "Cat/1.jpg", "Cat/deep/er/2.PNG", "Dog 2012/3.jpeg", "Dog 2012/notes.txt", "Dog 2012/README", "lone.jpg"
    )
    found = list_candidates(place)
    assert (found.layout, found.classes) == ("folder", ["Cat", "Dog 2012"])
    assert found.skipped == {".txt": 1, "readme": 1}
    assert labels(place) == {
        "Cat/1.jpg": ("Cat", None),
        "Cat/deep/er/2.PNG": ("Cat", None),
        "Dog 2012/3.jpeg": ("Dog 2012", None),
        "lone.jpg": (None, None),
    }


def test_split_folders_above_class_folders_are_given_splits(tmp_path):
    source = touch(tmp_path, "train/Cat/1.jpg", "validation/Cat/2.jpg", "Test/Dog/3.jpg", "train/lone.jpg")
    assert labels(source) == {
        "train/Cat/1.jpg": ("Cat", "train"),
        "validation/Cat/2.jpg": ("Cat", "val"),
        "Test/Dog/3.jpg": ("Dog", "test"),
        "train/lone.jpg": (None, None),
    }


def test_class_called_train_among_others_is_a_class(tmp_path):
    source = touch(tmp_path, "train/1.jpg", "bus/2.jpg")
    assert labels(source) == {"bus/2.jpg": ("bus", None), "train/1.jpg": ("train", None)}


def test_bare_folder_has_no_labels(place):
    found = list_candidates(touch(place, "1.jpg", "2.webp", "3.mp4"))
    assert (found.layout, found.classes, len(found.rows), found.skipped) == ("images", [], 2, {".mp4": 1})
    assert found.rows["label"].isna().all()


def test_images_layout_ignores_class_folders(tmp_path):
    assert labels(touch(tmp_path, "Cat/1.jpg"), layout="images") == {"Cat/1.jpg": (None, None)}


def test_empty_folders_in_a_key_name_no_class():
    """SeaweedFS merges `//` in keys, S3 does not, so the step is tested by itself."""
    listed = ListedImage("s3://bucket/source//Cat//2.jpg", 1, None)
    assert _relative_path(listed, "s3://bucket/source/") == ["Cat", "2.jpg"]


def test_name_that_is_not_utf8_keeps_its_class(tmp_path):
    folder = os.fsencode(tmp_path) + b"/50% off"
    os.mkdir(folder)
    for name in (b"plain.jpg", b"caf\xe9.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(b"x")
    rows = list_candidates(str(tmp_path)).rows
    assert rows["label"].tolist() == ["50% off", "50% off"]
    assert sorted(rows["escaped"]) == [False, True]
    assert rows.loc[rows["escaped"], "uri"].iloc[0].endswith("/50%25 off/caf%E9.jpg")


def test_wrong_sources_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    flat = touch(tmp_path / "flat", "1.jpg")
    text = touch(tmp_path / "text", "1.txt", "2.txt")
    cases = [
        (SchemaError, "holds no image .it is empty.", str(tmp_path / "empty"), "auto"),
        (SchemaError, "holds no image .it has only 2 of .txt.", text, "auto"),
        (SettingsError, "layout is 'tree'; allowed are auto, table", flat, "tree"),
        (SettingsError, "layout is folder, but .* holds all its images directly", flat, "folder"),
        (
            SettingsError,
            "layout is stanford-cars, but .* holds neither devkit/cars_meta.mat nor",
            flat,
            "stanford-cars",
        ),
        (SettingsError, "layout is table, but .* is no file that ends in one of .parquet, .csv, .tsv", flat, "table"),
        (SettingsError, "is a file, but layout auto needs a folder", f"{flat}/1.jpg", "auto"),
        (StorageError, "is not a folder", str(tmp_path / "absent"), "auto"),
        (StorageError, "does not exist", str(tmp_path / "absent.csv"), "auto"),
        (SettingsError, "has the scheme 'gs'", "gs://bucket/x", "auto"),
    ]
    for error, sentence, source, layout in cases:
        with pytest.raises(error, match=sentence):
            list_candidates(source, layout=layout)


def write_table(place: str, text: str, name: str = "images.csv") -> str:
    write_bytes(f"{place}/{name}", text.encode())
    return f"{place}/{name}"


def test_csv_is_taken_whole_and_relative_to_its_folder(place):
    table = write_table(
        place, "uri,label,x1,y1,x2,y2,split\na.jpg,NA,0,1,20,30,valid\n/b/c.bin,,,,,,test\ns3://x/y z.jpg,1,,,,,\n"
    )
    found = list_candidates(table)
    assert (found.layout, found.classes) == ("table", ["1", "NA"])
    assert found.rows["uri"].tolist() == [f"{place}/a.jpg", "/b/c.bin", "s3://x/y z.jpg"]
    assert found.rows[["x1", "y1", "x2", "y2"]].iloc[0].tolist() == [0, 1, 20, 30]
    assert found.rows["x1"].isna().tolist() == [False, True, True]
    assert [None if pd.isna(split) else split for split in found.rows["split"]] == ["val", None, None]


def test_parquet_and_tsv_say_the_same_as_csv(tmp_path):
    frame = pd.DataFrame({"uri": ["a.jpg", "b.jpg"], "label": ["Cat", "Dog"], "x1": [0, 1], "y1": 2, "x2": 9, "y2": 9})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.astype({"label": "category"}).assign(split=None).to_parquet(tmp_path / "t.parquet")
    rows = [list_candidates(str(tmp_path / f"t.{kind}")).rows for kind in ("csv", "tsv", "parquet")]
    pd.testing.assert_frame_equal(rows[0], rows[1])
    pd.testing.assert_frame_equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,label\na.jpg,Cat\n", "lacks the column uri; its first line has name, label; .*--column uri=NAME"),
        ("uri\na.jpg\n", "lacks the column label"),
        ("uri,label\na.jpg,Cat\n,Dog\n", "line 3, has no uri"),
        ("uri,label,split\na.jpg,Cat,third\n", "line 2, has the split 'third'; allowed are train, val, test"),
        ("uri,label\na.jpg,Cat\na.jpg,Dog\n", "the same uri and box more than once"),
        ("uri,label\na.jpg,Cat\nb/../a.jpg,Dog\n", "the same uri and box more than once"),
        ("uri,label\nftp://x/a.jpg,Cat\n", "has the scheme 'ftp'"),
        ("uri,label\n", "holds no image"),
        ("uri,label\ns3://bucket,Cat\n", "is a bucket and not an image"),
        ("", "is empty; the first line of a table names its columns"),
        ('uri,label\n"a.jpg,Cat\n', "line 2, has quotation marks that do not pair"),
    ],
)
def test_wrong_tables_are_one_sentence(tmp_path, text, sentence):
    table = write_table(str(tmp_path), text)
    with pytest.raises((SchemaError, SettingsError), match=sentence):
        list_candidates(table)


def test_same_uri_with_two_boxes_is_two_images(tmp_path):
    table = write_table(str(tmp_path), "uri,label,x1,y1,x2,y2\na.jpg,Cat,0,0,5,5\na.jpg,Dog,5,5,9,9\n")
    assert len(list_candidates(table).rows) == 2


def test_tables_that_are_not_what_they_say(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    (tmp_path / "latin.csv").write_bytes("uri,label\ncafé.jpg,x\n".encode("latin-1"))
    pd.DataFrame({"uri": [["a"]], "label": ["x"]}).to_parquet(tmp_path / "list.parquet")
    for name, sentence in (
        ("t.parquet", "not a readable Parquet"),
        ("latin.csv", "UTF-8"),
        ("list.parquet", "not text"),
    ):
        with pytest.raises(SchemaError, match=sentence):
            list_candidates(str(tmp_path / name))


def write_devkit(place: str, *, test_labels: bool = True) -> str:
    """Write a devkit of three classes, two train and two test annotations, and one image without any."""
    from io import BytesIO

    from scipy.io import savemat

    def save(name: str, **values: object) -> None:
        buffer = BytesIO()
        savemat(buffer, values)
        write_bytes(f"{place}/devkit/{name}", buffer.getvalue())

    def annotations(*rows: tuple[object, ...]) -> np.ndarray:
        names = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
        kinds = [(name, "O") for name in names if name != "class" or len(rows[0]) == 6]
        return np.array([list(rows)], dtype=kinds)

    save(
        "cars_meta.mat",
        class_names=np.array([["Ram C/V Cargo Van Minivan 2012", "Audi S4 Sedan 2012", "B C 2000"]], dtype=object),
    )
    save("cars_train_annos.mat", annotations=annotations((1, 1, 30, 20, 1, "1.jpg"), (3, 4, 30, 20, 2, "2.jpg")))
    save("cars_test_annos.mat", annotations=annotations((1, 1, 9, 9, "1.jpg"), (2, 2, 9, 9, "gone.jpg")))
    if test_labels:
        labelled = annotations((1, 1, 9, 9, 2, "1.jpg"), (2, 2, 9, 9, 1, "gone.jpg"))
        save("cars_test_annos_withlabels.mat", annotations=labelled)
    touch(place, "cars_train/1.jpg", "cars_train/2.jpg", "cars_train/extra.jpg", "cars_test/1.jpg", "cars_test/x.db")
    return place


def test_devkit_gives_labels_boxes_and_splits(place):
    found = list_candidates(write_devkit(place))
    assert found.layout == "stanford-cars"
    assert found.classes == ["Ram C/V Cargo Van Minivan 2012", "Audi S4 Sedan 2012", "B C 2000"]
    assert found.skipped == {".db": 1}
    assert labels(place) == {
        "cars_train/1.jpg": ("Ram C/V Cargo Van Minivan 2012", "train"),
        "cars_train/2.jpg": ("Audi S4 Sedan 2012", "train"),
        "cars_train/extra.jpg": (None, None),
        "cars_test/1.jpg": ("Audi S4 Sedan 2012", "test"),
        "cars_test/gone.jpg": ("Ram C/V Cargo Van Minivan 2012", "test"),
    }
    assert found.rows[["x1", "y1", "x2", "y2"]].iloc[1].tolist() == [2, 3, 30, 20]
    assert found.rows["x1"].isna().tolist() == [False, False, True, False, False]


def test_devkit_without_test_labels_has_unlabelled_test_images(tmp_path):
    source = write_devkit(str(tmp_path), test_labels=False)
    assert labels(source)["cars_test/1.jpg"] == (None, None)
    assert labels(source)["cars_train/1.jpg"][1] == "train"


def test_damaged_devkit_is_one_sentence(tmp_path):
    source = write_devkit(str(tmp_path))
    (tmp_path / "devkit" / "cars_train_annos.mat").write_bytes(b"not matlab" * 40)
    with pytest.raises(SchemaError, match=r"cars_train_annos\.mat is not a MATLAB file"):
        list_candidates(source)
    (tmp_path / "devkit" / "cars_meta.mat").write_bytes((tmp_path / "devkit" / "cars_test_annos.mat").read_bytes())
    with pytest.raises(SchemaError, match="has no variable class_names"):
        list_candidates(source)


def test_real_devkit(cars):
    found = list_candidates(str(cars))
    assert (found.layout, len(found.classes), len(found.rows)) == ("stanford-cars", 196, 6_516)
    assert found.rows["label"].notna().all()
    assert found.rows["split"].value_counts().to_dict() == {"train": 5_701, "test": 815}
    assert "Ram C/V Cargo Van Minivan 2012" in set(found.rows["label"])
    assert (found.rows[["x1", "y1"]] == 0).all(axis=None)


def test_a_tables_splits_are_named_in_any_case_and_by_synonyms(tmp_path: Path) -> None:
    names = ["Train", "TRAINING", "Valid", "dev", "Testing", "evaluation", ""]
    rows = "".join(f"{number}.jpg,Cat,{name}\n" for number, name in enumerate(names))
    (tmp_path / "images.csv").write_text(f"uri,label,split\n{rows}")
    found = list_candidates(str(tmp_path / "images.csv")).rows["split"]
    assert found.fillna("").tolist() == ["train", "train", "val", "val", "test", "test", ""]
