"""How folder names are read: splits, classes, wrappers, masks, junk; what is lost on the way; and how to settle it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray.core.errors import SchemaError, SettingsError
from carray.core.store.files import write_bytes
from carray.images.vehicles import parse_vehicle
from carray.manifest.manifest_file import read_manifest
from carray.manifest.prepare import prepare
from carray.manifest.sources import Candidates, list_candidates

A, B, C = "Audi A4 2012", "BMW X5 2012", "Volvo C30 2012"
Read = dict[str, tuple[str | None, str | None]]


def touch(folder: Path | str, *names: str) -> str:
    for name in names:
        write_bytes(f"{folder}/{name}", b"x")
    return str(folder)


def read(found: Candidates) -> Read:
    """Give label and given split by path below the source."""
    below = found.rows["uri"].str.removeprefix(found.source + "/")
    values = found.rows[["label", "split"]].astype(object).where(found.rows[["label", "split"]].notna(), None)
    return dict(zip(below, values.itertuples(index=False, name=None), strict=True))


def split_tree(*folders: str, classes: tuple[str, ...] = (A, B, C)) -> list[str]:
    return [f"{folder}/{name}/{i}.jpg" for folder in folders for name in classes for i in range(2)]


TRAIN_NAMES = [
    "train",
    "training",
    "Train",
    "TRAIN",
    "training_set",
    "train-images",
    "TrainSet",
    "train2017",
    "traindata",
]
VAL_NAMES = ["val", "valid", "validation", "validate", "dev", "Valid", "VAL", "validation_set", "val_images"]
TEST_NAMES = ["test", "testing", "eval", "evaluation", "Test", "TEST", "test_set", "Testing Data", "testset"]


@pytest.mark.parametrize("train", TRAIN_NAMES)
def test_names_of_train(tmp_path, train):
    found = list_candidates(touch(tmp_path, *split_tree(train, "test")))
    assert (found.layout, found.classes) == ("splits", [A, B, C])
    assert found.rows["split"].value_counts().to_dict() == {"train": 6, "test": 6}


@pytest.mark.parametrize(("name", "split"), [*((n, "val") for n in VAL_NAMES), *((n, "test") for n in TEST_NAMES)])
def test_names_of_val_and_test(tmp_path, name, split):
    found = list_candidates(touch(tmp_path, *split_tree("train", name)))
    assert (found.layout, found.classes, found.warnings) == ("splits", [A, B, C], [])
    assert found.rows["split"].value_counts().to_dict() == {"train": 6, split: 6}


SPLITS = [
    pytest.param([*split_tree("train", "test"), "sample_images/1.jpg"], "", {"sample_images/": 1}, id="extra-folder"),
    pytest.param([*split_tree("train", "test"), f"extra/{A}/1.jpg"], "", {"extra/": 1}, id="extra-class-folders"),
    pytest.param([*split_tree("train"), "sample_images/1.jpg"], "", {"sample_images/": 1}, id="only-train-and-extra"),
    pytest.param([*split_tree("train", "test"), "1.jpg"], "", {"the top folder": 1}, id="image-at-the-top"),
    pytest.param([*split_tree("d/d/train", "d/d/test"), "d/n.csv"], "d/d", {}, id="wrapper"),
    pytest.param(
        [*split_tree("d/train", "d/test"), "cover.jpg"], "d", {"the top folder": 1}, id="wrapper-beside-image"
    ),
    pytest.param(split_tree("cars_train/cars_train", "cars_test/cars_test"), "", {}, id="kaggle-twice"),
    pytest.param(split_tree("training_set/training_set", "test_set/test_set"), "", {}, id="sets-twice"),
    pytest.param(split_tree("car_train", "car_test", "demo"), "", {"demo/": 6}, id="a-word-before"),
    pytest.param(split_tree("train/data", "test/data"), "", {}, id="wrapper-below-split"),
    pytest.param(split_tree("train/images", "test/images"), "", {}, id="images-below-split"),
    pytest.param(split_tree("images/train", "images/test", "masks/train"), "", {}, id="images-and-masks-above"),
    pytest.param([f"{c}/{s}/{i}.jpg" for c in (A, B) for s in ("train", "Test") for i in "12"], "", {}, id="below"),
    pytest.param(
        [f"{c}/{s}/1.jpg" for c in (A, B) for s in ("train", "test")] + [f"{A}/odd/9.jpg"],
        "",
        {f"{A}/odd/": 1},
        id="odd",
    ),
    pytest.param([f"Audi/A4/{s}/1.jpg" for s in ("train", "test")] + ["BMW/X5/train/1.jpg"], "", {}, id="third"),
    pytest.param(split_tree("train_images", "train_masks", "test_images"), "", {"train_masks/": 6}, id="train-masks"),
    pytest.param([*split_tree("d/train", "d/test"), "e/x/1.jpg"], "", {"e/x/": 1}, id="splits-of-one-of-two"),
    pytest.param(split_tree("val", "test"), "", {}, id="no-train"),
    pytest.param(split_tree("test"), "", {}, id="test-alone"),
    pytest.param(split_tree("my_test_images"), "", {}, id="test-alone-with-words"),
    pytest.param([*split_tree("train"), "test/1.jpg", "test/2.jpg"], "", {"test/": 2}, id="flat-test"),
    pytest.param([f"train/{m}/1.jpg" for m in ("Audi/A4", "BMW/X5")] + ["test/Audi/A4/2.jpg"], "", {}, id="make-model"),
]


@pytest.mark.parametrize(("names", "inside", "unlabelled"), SPLITS)
def test_split_folders_keep_their_splits(tmp_path, names, inside, unlabelled):
    found = list_candidates(touch(tmp_path, *names))
    assert (found.layout, found.inside, found.unlabelled_in) == ("splits", inside, unlabelled)
    for path, (label, split) in read(found).items():
        low = path.lower()
        wanted = "test" if "test" in low else "val" if "val/" in low else "train" if "train" in low else None
        assert split == (wanted if label else None)
        if label is not None:
            assert wanted is not None
            assert set(label.split()) <= set(path.replace("/", " ").split())
            assert not set(label.lower().split()) & {"train", "test", "val", "data", "images", "odd"}
    assert sum(label is None for label, _ in read(found).values()) == sum(unlabelled.values())


def test_make_and_model_folders_are_one_class_name(tmp_path):
    names = ["Audi/A4 2012/1.jpg", "Audi/A5 2012/2.jpg", "BMW/X5 SUV 2012/3.jpg", "BMW/X5 SUV 2012/more/4.jpg"]
    found = list_candidates(touch(tmp_path, *names))
    assert found.layout == "folder"
    assert found.classes == ["Audi A4 2012", "Audi A5 2012", "BMW X5 SUV 2012"]
    assert parse_vehicle(found.classes[2]).make == "BMW"
    assert parse_vehicle(found.classes[2]).body == "SUV"
    years = list_candidates(touch(tmp_path / "years", "Audi/A4/2012/1.jpg", "BMW/X5/2012/2.jpg"))
    assert (years.classes, years.warnings) == (["Audi A4 2012", "BMW X5 2012"], [])


@pytest.mark.parametrize(
    ("label_from", "classes"),
    [
        ("auto", ["Audi A4", "BMW X5"]),
        ("path", ["Audi A4 front", "Audi A4 rear", "BMW X5 front"]),
        ("1", ["Audi", "BMW"]),
        ("2", ["Audi A4", "BMW X5"]),
        ("9", ["Audi A4 front", "Audi A4 rear", "BMW X5 front"]),
        ("-1", ["front", "rear"]),
        ("-2", ["A4 front", "A4 rear", "X5 front"]),
    ],
)
@pytest.mark.parametrize("above", ["", "train/", "wrapper/"])
def test_label_from(tmp_path, label_from, classes, above):
    names = ["Audi/A4/front/1.jpg", "Audi/A4/rear/2.jpg", "BMW/X5/front/3.jpg"]
    if label_from == "auto":
        names = ["Audi/A4/1.jpg", "Audi/A4/2.jpg", "Audi/A4/rear/2.jpg", "BMW/X5/3.jpg"]
    found = list_candidates(touch(tmp_path, *(above + name for name in names)), label_from=label_from)
    whole = label_from == "path" and above == "wrapper/"
    assert found.classes == [f"wrapper {name}" if whole else name for name in classes]
    assert (found.rows["split"] == "train").fillna(False).all() == (above == "train/")


def test_wrong_values_are_one_sentence(tmp_path):
    flat, deep = touch(tmp_path / "flat", "1.jpg"), touch(tmp_path / "deep", f"{A}/1.jpg")
    (tmp_path / "t.csv").write_text("uri,label\na.jpg,x\n")
    for source, layout, label_from, sentence in [
        (deep, "auto", "0", "label_from is '0'; allowed are auto, path"),
        (deep, "auto", "make", "label_from is 'make'"),
        (flat, "auto", "1", "label_from is 1, but layout images takes no label from folder names"),
        (deep, "images", "1", "label_from is 1, but layout images takes no label from folder names"),
        (str(tmp_path / "t.csv"), "auto", "-1", "label_from is -1, but layout table takes no label"),
        (deep, "splits", "auto", "layout is splits, but .* has no folder called train"),
        (flat, "splits", "auto", "layout is splits, but .* has no folder called train"),
    ]:
        with pytest.raises(SettingsError, match=sentence):
            list_candidates(source, layout=layout, label_from=label_from)


def test_layout_settles_what_a_name_means(tmp_path):
    trains = touch(tmp_path / "vehicles", "train/1.jpg", "bus/2.jpg", "bus/3.jpg")
    found = list_candidates(trains)
    assert found.classes == ["bus", "train"]
    assert found.warnings[0].startswith(
        "part of a class is called like a split (train); if it is one, say --layout splits"
    )
    pairs = touch(tmp_path / "pairs", "Audi_train/1.jpg", "Audi_test/2.jpg", "BMW_train/3.jpg", "BMW_test/4.jpg")
    assert "(Audi_test, Audi_train, BMW_test, BMW_train)" in list_candidates(pairs).warnings[0]
    assert list_candidates(pairs, layout="splits").rows["label"].isna().all()
    assert list_candidates(trains, layout="folder").warnings == []
    assert read(list_candidates(trains, layout="splits"))["train/1.jpg"] == (None, None)
    given = touch(tmp_path / "given", *split_tree("train", "test"))
    assert list_candidates(given, layout="splits").layout == "splits"
    assert list_candidates(given, layout="folder").classes == [f"{s} {c}" for s in ("test", "train") for c in (A, B, C)]
    assert list_candidates(given, layout="images").rows["label"].isna().all()
    lone = touch(tmp_path / "lone", *split_tree("old_test"), *split_tree("2012"))
    assert any("called like a split (old_test)" in warning for warning in list_candidates(lone).warnings)
    forced = list_candidates(lone, layout="splits")
    assert (forced.rows["split"] == "test").sum() == 6


def test_flat_test_beside_class_folders_is_no_class(tmp_path):
    found = list_candidates(touch(tmp_path, f"{A}/1.jpg", f"{B}/2.jpg", "test/3.jpg", "test/4.jpg"))
    assert (found.classes, found.unlabelled_in) == ([A, B], {"test/": 2})


def test_class_folders_beside_a_test_folder_that_holds_them_too(tmp_path):
    found = list_candidates(touch(tmp_path, *split_tree(".", classes=(A, B)), *split_tree("test", classes=(A, B))))
    assert (found.layout, found.classes, found.unlabelled_in) == ("splits", [A, B], {})
    assert read(found)[f"{A}/0.jpg"] == (A, None)
    assert read(found)[f"test/{A}/0.jpg"] == (A, "test")


def test_masks_beside_images_are_left_out_and_counted(tmp_path):
    flat = list_candidates(touch(tmp_path / "flat", "images/1.jpg", "images/2.jpg", "masks/1.png", "masks/2.png"))
    assert (flat.classes, len(flat.rows), flat.left_out) == ([], 2, {"masks/": 2})
    deep = list_candidates(touch(tmp_path / "deep", f"images/{A}/1.jpg", f"images/{B}/2.jpg", f"masks/{A}/1.png"))
    assert (deep.classes, deep.left_out) == ([A, B], {f"masks/{A}/": 1})
    below = list_candidates(touch(tmp_path / "below", *(f"{c}/{k}/1.png" for c in (A, B) for k in ("images", "masks"))))
    assert (below.classes, len(below.rows)) == ([A, B], 2)
    other = list_candidates(touch(tmp_path / "other", "images/1.jpg", "masks/1.png", f"{A}/2.jpg"))
    assert any("no class of cars (images, masks)" in warning for warning in other.warnings)
    sample = list_candidates(touch(tmp_path / "sample", f"{A}/1.jpg", f"{B}/1.jpg", "sample_images/1.jpg"))
    assert any("no class of cars (sample_images)" in warning for warning in sample.warnings)


JUNK = [
    ".ipynb_checkpoints/0-checkpoint.jpg",
    f"{A}/.ipynb_checkpoints/0-checkpoint.jpg",
    f"__MACOSX/{A}/._1.jpg",
    f"{A}/._1.jpg",
    ".Trash-1000/files/gone.jpg",
    f"{A}/Thumbs.db",
    ".DS_Store",
    f"{A}/@eaDir/1.jpg/thumb.jpg",
    "$RECYCLE.BIN/1.jpg",
    f"{B}/desktop.ini",
]


def test_hidden_names_and_junk_are_skipped_and_counted(tmp_path, s3):
    for place in (str(tmp_path), f"{s3}/photos"):
        found = list_candidates(touch(place, f"{A}/1.jpg", f"{B}/2.jpg", *JUNK))
        assert (found.classes, len(found.rows), found.warnings) == ([A, B], 2, [])
        assert sum(found.left_out.values()) == len(JUNK)
        assert found.left_out[".ipynb_checkpoints"] == 2
        assert found.left_out["__MACOSX"] == found.left_out["._*"] == 1


def test_nothing_but_junk_is_a_sentence(tmp_path):
    with pytest.raises(SchemaError, match=r"holds no image \(it has only 1 of __MACOSX\)"):
        list_candidates(touch(tmp_path, "__MACOSX/1.jpg"))


@pytest.mark.parametrize("layout", ["class", "splits", "nested", "masks"])
def test_s3_is_read_as_a_folder_is(tmp_path, s3, layout):
    names = {
        "class": [f"{A}/1.jpg", f"{B}/2.jpg", "1.jpg", f"{A}/x.jxl"],
        "splits": [*split_tree("d/d/Train", "d/d/Test"), "sample/1.jpg"],
        "nested": ["Audi/A4/1.jpg", "BMW/X5/2.jpg"],
        "masks": [f"images/{A}/1.jpg", f"images/{B}/2.jpg", "masks/1.jpg"],
    }[layout]
    local, remote = list_candidates(touch(tmp_path, *names)), list_candidates(touch(f"{s3}/deep/place", *names))
    assert read(local) == read(remote)
    for name in ("layout", "classes", "skipped", "left_out", "inside", "unlabelled_in", "warnings"):
        assert getattr(local, name) == getattr(remote, name)


def test_links_are_followed_once(tmp_path):
    store = tmp_path / "store"
    touch(store, "1.jpg", "2.jpg")
    touch(tmp_path / "in" / B, "3.jpg")
    (tmp_path / "in" / A).symlink_to(store)
    (tmp_path / "in" / B / "up").symlink_to("..")
    (tmp_path / "in" / B / "4.jpg").symlink_to(store / "1.jpg")
    assert list_candidates(str(tmp_path / "in")).classes == [A, B]
    assert len(list_candidates(str(tmp_path / "in")).rows) == 4


def test_classes_of_one_split_and_splits_that_hold_others_are_named(tmp_path):
    found = list_candidates(touch(tmp_path / "one", *split_tree("train", "test"), "test/Dodge Ram 2012/1.jpg"))
    assert found.warnings == ["1 of 4 classes lie in one given split only (Dodge Ram 2012 in test)"]
    apart = list_candidates(touch(tmp_path / "apart", *split_tree("train"), *split_tree("test", classes=("D", "E"))))
    assert apart.warnings[0] == "train and test share only 0 of 2 classes"


def test_doubtful_class_folders_are_named(tmp_path):
    views = [f"{make}/{view}/1.jpg" for make in (A, B) for view in ("front", "rear")]
    assert any(
        "the same folder names lie below several others (front, rear)" in warning
        for warning in list_candidates(touch(tmp_path / "views", *views)).warnings
    )
    depths = list_candidates(touch(tmp_path / "depths", f"{A}/1.jpg", "BMW/X5 2012/2.jpg"))
    assert any("lie at different depths" in warning for warning in depths.warnings)
    stray = list_candidates(touch(tmp_path / "stray", "Audi/1.jpg", "Audi/A4/2.jpg", "Audi/A4/3.jpg", "BMW/X5/4.jpg"))
    assert (stray.classes, stray.unlabelled_in) == (["Audi A4", "BMW X5"], {"Audi/": 1})
    deeper = list_candidates(touch(tmp_path / "deeper", "Cat/1.jpg", "Cat/kitten/2.jpg", "Dog/3.jpg"))
    assert deeper.classes == ["Cat", "Dog"]
    assert any("images of deeper folders count to the class above them (Cat" in warning for warning in deeper.warnings)


def test_one_name_below_every_class_is_no_part_of_it(tmp_path):
    found = list_candidates(touch(tmp_path, f"{A}/original/1.jpg", f"{B}/original/2.jpg"))
    assert (found.classes, found.warnings) == ([A, B], [])


def test_skipped_files_are_a_concern_when_they_are_many_or_empty_a_class(tmp_path):
    kept = [f"{c}/{i}.jpg" for c in (A, B) for i in range(5)]
    lost = [f"{c}/IMG_{i}.JXL" for c in (A, B, C) for i in range(20)]
    found = list_candidates(touch(tmp_path, *kept, *lost, f"{A}/notes.txt", "README"))
    assert found.skipped == {".jxl": 60, ".txt": 1, "readme": 1}
    emptied, skipped = found.warnings
    assert emptied == f"1 class folder without any image file ({C}: .jxl 20)"
    assert skipped.startswith("60 of 70 files (85.7%) were skipped since their names are no image's: .jxl 60")
    assert f"20 of 25 in {A}" in skipped
    assert skipped.endswith("; convert .jxl to JPEG")


@pytest.mark.parametrize(
    ("suffix", "remedy"),
    [
        ("jp2", "convert .jp2 to JPEG"),
        ("jpe", "rename .jpe to what the format is called"),
        ("jpg_large", "rename .jpg_large"),
        ("jpg?w=640", "rename .jpg?w=640"),
        ("jpg ", "rename '.jpg '"),
        ("zip", "unpack .zip"),
        ("mov", "if .mov are images, rename them or list them in a table"),
    ],
)
def test_what_to_do_about_skipped_files(tmp_path, suffix, remedy):
    (warning,) = list_candidates(touch(tmp_path, f"{A}/1.jpg", f"{B}/2.jpg", f"{B}/3.{suffix}")).warnings
    assert warning.startswith("1 of 3 files (33.3%) were skipped")
    assert remedy in warning


def test_few_skipped_files_and_texts_are_no_concern(tmp_path):
    names = [f"{c}/{i}.jpg" for c in (A, B) for i in range(200)]
    found = list_candidates(touch(tmp_path, *names, f"{A}/1.jxl", *(f"{A}/{i}.txt" for i in range(50)), "data.csv"))
    assert found.warnings == []
    assert found.skipped == {".jxl": 1, ".txt": 50, ".csv": 1}


def test_hidden_images_are_missed(tmp_path):
    found = list_candidates(touch(tmp_path, f"{A}/1.jpg", f"{B}/2.jpg", f"{B}/.3.jpg"))
    assert found.skipped == {"hidden .jpg": 1}
    assert "1 of 3 files" in found.warnings[0]


def test_empty_folder_whose_name_is_not_utf8_is_named(tmp_path):
    touch(tmp_path, f"{A}/1.jpg", f"{B}/2.jpg")
    os.mkdir(os.fsencode(tmp_path) + b"/Citro\xebn")
    found = list_candidates(str(tmp_path))
    assert found.warnings == [r"1 class folder without any image file (Citro\udcebn: empty)"]
    found.text().encode()


def test_empty_class_folders_are_named(tmp_path, s3):
    local = touch(tmp_path / "in", f"{A}/1.jpg", f"{B}/2.jpg", f"{C}/.DS_Store")
    os.makedirs(tmp_path / "in" / "Dodge 2012")
    assert list_candidates(local).warnings == [
        f"2 class folders without any image file (Dodge 2012: empty, {C}: empty)"
    ]
    remote = touch(f"{s3}/in", f"{A}/1.jpg", f"{B}/2.jpg", f"{C}/.DS_Store")
    assert list_candidates(remote).warnings == [f"1 class folder without any image file ({C}: empty)"]
    given = touch(tmp_path / "given", *split_tree("train", "test", classes=(A, B)))
    os.makedirs(tmp_path / "given" / "train" / C)
    assert f"({C}: empty)" in list_candidates(given).warnings[0]


def write_first_release(place: str, make_image, *, below: str = "") -> str:
    """Write 24 images of three classes, every fourth of them of the test split, as the first release had them."""
    from io import BytesIO

    from scipy.io import savemat

    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    rows = np.empty((1, 24), dtype=[(name, object) for name in fields])
    for i in range(24):
        name = f"car_ims/{i + 1:06d}.jpg"
        write_bytes(f"{place}/{below}{name}", make_image(i))
        rows[0, i] = (name, 3, 4, 60, 50, i % 3 + 1, int(i % 4 == 0))
    buffer = BytesIO()
    savemat(buffer, {"annotations": rows, "class_names": np.array([[A, B, "Ram C/V Van 2012"]], dtype=object)})
    write_bytes(f"{place}/{below}cars_annos.mat", buffer.getvalue())
    return place


@pytest.mark.parametrize("below", ["", "stanford/cars/"])
def test_first_release_is_read(tmp_path, make_image, below):
    found = list_candidates(write_first_release(str(tmp_path), make_image, below=below))
    assert (found.layout, found.classes) == ("stanford-cars", [A, B, "Ram C/V Van 2012"])
    assert found.rows["split"].value_counts().to_dict() == {"train": 18, "test": 6}
    assert read(found)[f"{below}car_ims/000003.jpg"] == ("Ram C/V Van 2012", "train")
    assert read(found)[f"{below}car_ims/000001.jpg"] == (A, "test")
    assert found.rows[["x1", "y1", "x2", "y2"]].drop_duplicates().to_numpy().tolist() == [[2, 3, 60, 50]]
    assert (found.skipped, found.warnings, found.unlabelled_in) == ({}, [], {})
    assert list_candidates(str(tmp_path), layout="stanford-cars").classes == found.classes


def test_cars_without_their_annotations_say_so(tmp_path):
    names = [f"{s}/{s}/{i}.jpg" for s in ("cars_train", "cars_test") for i in range(3)]
    found = list_candidates(touch(tmp_path, *names, "cars_annos.mat"))
    assert (found.layout, found.classes) == ("splits", [])
    assert "labels of Stanford Cars stand in its devkit/" in found.warnings[0]


def test_prepare_shows_what_it_understood_and_is_not_healthy_about_a_doubt(tmp_path, make_image):
    number = iter(range(1_000))
    names = [f"Training/{c}/{i}.jpg" for c in (A, B) for i in range(6)]
    names += [*split_tree("Testing", classes=(A, B, C)), "sample/1.jpg"]
    for name in names:
        write_bytes(f"{tmp_path}/in/{name}", make_image(next(number)))
    touch(tmp_path / "in", "Training/._1.jpg", *(f"Training/{A}/{i}.jxl" for i in range(3)))
    said: list[str] = []
    out = str(tmp_path / "m.parquet")
    report = prepare(str(tmp_path / "in"), out=out, show=said.append)
    (text,) = said
    assert "19 images, read as layout splits" in text
    assert "splits       train 12, test 6" in text
    assert f"classes      3: {A} 8, {B} 8, {C} 2" in text
    assert "no label     sample/ 1" in text
    assert "skipped      .jxl 3" in text
    assert "left out     ._* 1" in text
    assert "--layout and --label-from" in text
    assert report.splits["test"] == 6
    assert report.verdict.startswith("Usable, with")
    for words in (f"({C} in test)", "3 of 22 files", "1 readable image without a label", "(sample/ 1)"):
        assert words in report.verdict
    rows = read_manifest(out).rows
    assert set(rows.loc[rows["uri"].str.contains("/Testing/"), "split"]) == {"test"}
    assert pd.isna(rows.loc[rows["uri"].str.contains("/sample/"), "split"]).all()


def test_class_of_broken_images_alone_is_named(tmp_path, make_image):
    for i in range(12):
        write_bytes(f"{tmp_path}/in/{A if i % 2 else B}/{i}.jpg", make_image(i))
    touch(tmp_path / "in", f"{C}/1.jpg")
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert f"1 class without a readable image ({C})" in report.verdict


def test_given_splits_without_train_are_kept_and_not_usable(tmp_path, make_image):
    for i, name in enumerate(split_tree("val", "test")):
        write_bytes(f"{tmp_path}/in/{name}", make_image(i))
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert report.splits == {"train": 0, "val": 6, "test": 6}
    assert report.verdict.startswith("Not usable for tune: split train has no image; give a source that holds training")


def test_extending_keeps_splits_of_folders(tmp_path, make_image):
    for i, name in enumerate(split_tree("train", "test")):
        write_bytes(f"{tmp_path}/in/{name}", make_image(i))
    first = prepare(str(tmp_path / "in"), out=str(tmp_path / "a.parquet"))
    write_bytes(f"{tmp_path}/in/test/{A}/new.jpg", make_image(99))
    second = prepare(str(tmp_path / "in"), out=str(tmp_path / "b.parquet"), extend=str(tmp_path / "a.parquet"))
    assert second.splits == {**first.splits, "test": first.splits["test"] + 1}
