"""Reads labels and splits from folder names: which folders are splits, which are classes and which only wrap others.

It uses names and counts only, so local folders and prefixes on S3 are read alike.

    1. images/ beside masks/            the pictures are in images/; masks/ is left out
    2. data/data/...                    an only folder that holds folders is descended
    3. train/CLASS, CLASS/train         the level where most folders name a split
    4. cars_train/cars_train/...        a repeated split's name or wrapper counts once
    5. MAKE/MODEL                       the class is the path down to the folder that holds the pictures

Each step takes names out of every folder's path; what remains in the end is its class.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from carray.core.errors import SettingsError
from carray.core.text import readable
from carray.manifest.candidates import Candidates, Source, is_picture, shown
from carray.manifest.manifest_file import given_split

__all__ = ["check_label_from", "name_warnings", "read_folders", "wrapping_folders"]

Folder = tuple[str, ...]
"""The names of the folders from the source down; () is the source itself."""

HOLDER_FOLDERS = set("images image imgs img jpegimages photos pictures pics".split())
"""Folders that only hold pictures, whatever they show."""
COMPANION_FOLDERS = set(
    "masks mask labels label annotations annotation annos segmentation segmentations segmentationclass gt groundtruth "
    "ground_truth trimaps depth bboxes boxes metadata meta devkit docs doc scripts code".split()
)
"""Folders that accompany pictures."""
_PICTURE_WORDS = HOLDER_FOLDERS | set("mask masks annotation annotations label labels sample samples".split())
_PICTURE_WORDS |= set("photo picture pic example examples thumbnail thumbnails thumbs preview previews".split())
_NEUTRAL_WORDS = _PICTURE_WORDS | set("set sets data dataset split folder dir files".split())
"""Words allowed beside a split's name: training_set, test-images."""
_ENDINGS = re.compile("(set|data|images|imgs?)$")
"""Endings of a split's name: trainset, testdata."""
_YEAR = re.compile(r"(19|20)\d\d")


class _Role(NamedTuple):
    """What the pictures directly in a folder are."""

    shown_as: Folder
    """The folder to name where they have no label."""
    label: str | None = None
    split: str | None = None
    is_mask: bool = False
    """Whether they are masks or the like."""


@dataclass(frozen=True)
class _Reading:
    """How a source's folders were understood."""

    roles: dict[Folder, _Role]
    kind: str = "images"
    """images (no class or split folders), folder (class folders) or splits (split folders)."""
    inside: Folder = ()
    """The folders that only wrap the data."""
    warnings: list[str] = field(default_factory=list)


class _Tree:
    """The number of pictures in each folder, and below it."""

    def __init__(self, paths: Mapping[Folder, Folder], pictures: Mapping[Folder, int]) -> None:
        """Count the pictures of each folder of `paths` at the path that it is mapped to."""
        self.direct, self.total = Counter[Folder](), Counter[Folder]()
        self.children: dict[Folder, set[str]] = defaultdict(set)
        for folder, path in paths.items():
            if not pictures[folder]:
                continue
            self.direct[path] += pictures[folder]
            for depth in range(len(path) + 1):
                self.total[path[:depth]] += pictures[folder]
                if depth:
                    self.children[path[: depth - 1]].add(path[depth - 1])

    def is_holder(self, path: Folder) -> bool:
        """Check whether at least half of a folder's pictures lie directly in it."""
        return 0 < self.total[path] <= 2 * self.direct[path]

    def holder(self, path: Folder) -> Folder | None:
        """Cut a path down to the first folder that directly holds most of its pictures."""
        found = next((path[:depth] for depth in range(1, len(path) + 1) if self.is_holder(path[:depth])), None)
        return found or (path if path and not self.total[path] else None)

    def wrappers(self, *, above_splits: bool = False) -> Folder:
        """Find the chain of folders from the source that are each the only one in its parent, and hold folders."""
        inside: Folder = ()
        while len(names := self.children.get(inside, set())) == 1:
            child = (*inside, *names)
            if (above_splits and _split_words(child[-1])) or not self.children.get(child) or self.is_holder(child):
                break
            inside = child
        return inside


def read_folders(source: Source) -> Candidates | None:
    """Read labels and splits from the names of folders; None where there are none for the layout that was asked for.

    Raises:
        StorageError: the source does not exist or cannot be read.
    """
    files = source.files
    found = _read(_count_pictures(files), source.layout, source.label_from)
    if found is None:
        return None
    index = ["/".join(folder) for folder in found.roles]
    files = files.join(pd.DataFrame(list(found.roles.values()), index=index, columns=_Role._fields), on="folder")
    shown_as = files["shown_as"].map(lambda folder: "/".join(folder) + "/" if folder else "the top folder")
    is_mask = (files["kind"] == "image") & files["is_mask"].astype(bool)
    files["kind"], files["what"] = files["kind"].mask(is_mask, "left out"), files["what"].mask(is_mask, shown_as)
    is_image = files["kind"] == "image"
    # A folder of annotations that holds no image is no class that lost its images.
    is_companion = files["folder"].map(lambda folder: not COMPANION_FOLDERS.isdisjoint(folder.casefold().split("/")))
    return Candidates(
        source.uri,
        found.kind,
        files[is_image].assign(folder=shown_as[is_image]),
        others=files[~is_image].assign(label=files["label"].mask(is_companion)),
        inside="/".join(found.inside),
        warnings=found.warnings,
    )


def wrapping_folders(files: pd.DataFrame) -> Folder:
    """Find the folders that only wrap a source's data, down to those that name a split."""
    pictures = _count_pictures(files)
    return _Tree({folder: folder for folder in pictures}, pictures).wrappers(above_splits=True)


def _count_pictures(files: pd.DataFrame) -> dict[Folder, int]:
    """Count the files that are, or may be, pictures in each folder of `Source.files`."""
    is_one = (files["kind"] == "image") | ((files["kind"] == "skipped") & files["what"].map(is_picture).astype(bool))
    pictures = is_one.groupby(files["folder"]).sum()
    return {tuple(str(folder).split("/")) if folder else (): int(count) for folder, count in pictures.items()}


def check_label_from(text: str) -> None:
    """Check that a text is `auto`, `path`, or a number of folder names: N from the first, -N from the last.

    Raises:
        SettingsError: it is something else.
    """
    if not re.fullmatch(r"auto|path|-?[1-9]\d?", text):
        raise SettingsError(
            f"label_from is {text!r}; allowed are auto, path (every folder name from the source down), N (the first N "
            "folder names below the split) and -N (the last N), such as 1 or -1."
        )


def _read(pictures: Mapping[Folder, int], layout: str, label_from: str) -> _Reading | None:
    """Infer the role of each folder, whether or not it holds pictures."""
    roles = {folder: _Role(folder) for folder in pictures}
    if layout == "images":
        return _Reading(roles)
    paths, by_name = {folder: folder for folder in pictures}, layout != "folder"
    if by_name:
        paths = _without_companions(paths, pictures)
        roles |= {folder: _Role(folder, is_mask=True) for folder in pictures if folder not in paths}
    inside = _Tree(paths, pictures).wrappers(above_splits=by_name)
    paths = {folder: _below(path, inside) for folder, path in paths.items()}
    tree = _Tree(paths, pictures)
    found = _find_splits(tree, forced=layout == "splits") if by_name else None
    if (layout == "splits" and not found) or (layout == "folder" and tree.direct and not tree.children):
        return None
    if not tree.children:
        return _Reading(roles, inside=inside)
    splits: dict[Folder, str | None] = {}
    if found:
        roles |= {folder: _Role((*inside, *path[: found[0] + 1])) for folder, path in paths.items()}
        paths, splits = _without_splits(tree, paths, *found)
    elif by_name:
        # A flat test/ beside class folders holds unlabelled images; a flat train/ may be a class of vehicles.
        tests = {name for name, split in _split_names(tree.children[()]).items() if split != "train"}
        paths = {folder: path for folder, path in paths.items() if tests.isdisjoint(path[:1])}
    below = _Tree(paths, pictures).wrappers() if found else ()
    tree = _Tree({folder: _below(path, below) for folder, path in paths.items()}, pictures)
    classes = {holder for path in tree.direct if (holder := tree.holder(path))}
    warnings, tail = _check_classes(tree, classes) if label_from == "auto" else ([], 0)
    for folder, path in paths.items():
        label = _label(tree, (*inside, *path), _below(path, below), label_from, tail)
        roles[folder] = _Role(folder, label, splits.get(folder) if label else None)
    if by_name:
        warnings += name_warnings((path[-1] for path in classes), (name for path in classes for name in path[:-1]))
    has_label = any(role.label for folder, role in roles.items() if pictures[folder])
    if not has_label and found and {"cars_train", "cars_test"} & set(found[1]):
        warnings.append(
            "the labels of Stanford Cars stand in its devkit/, which must lie beside cars_train/ and cars_test/"
        )
    return _Reading(roles, "splits" if found else "folder", inside, warnings)


def _label(tree: _Tree, whole: Folder, below: Folder, label_from: str, tail: int) -> str | None:
    """Make a folder's label of its whole path, or of the path below its split's wrappers."""
    if label_from == "auto":
        path = tree.holder(below) or ()
        return " ".join(path[: len(path) - tail]) or None
    if not below or label_from == "path":
        return " ".join(whole) if below else None
    count = int(label_from)
    return " ".join(below[:count] if count > 0 else whole[count:])


def _below(path: Folder, wrappers: Folder) -> Folder:
    if path[: len(wrappers)] == wrappers:
        return path[len(wrappers) :]
    return () if wrappers[: len(path)] == path else path


def _without_companions(paths: Mapping[Folder, Folder], pictures: Mapping[Folder, int]) -> dict[Folder, Folder]:
    """Take folders like images/ out of the paths, and leave out those below the folders like masks/ beside them."""
    dropped, companions = set[Folder](), set[Folder]()
    for folder, names in _Tree(paths, pictures).children.items():
        holders = {name for name in names if name.casefold() in HOLDER_FOLDERS}
        if len(holders) == 1 and all(name.casefold() in COMPANION_FOLDERS for name in names - holders):
            dropped.add((*folder, *holders))
            companions |= {(*folder, name) for name in names - holders}
    above = {path: [path[: depth + 1] for depth in range(len(path))] for path in paths}
    return {
        path: tuple(folder[-1] for folder in folders if folder not in dropped)
        for path, folders in above.items()
        if companions.isdisjoint(folders)
    }


def _find_splits(tree: _Tree, *, forced: bool) -> tuple[int, dict[str, str]] | None:
    """Find the level whose folders name splits, and the split of each name; if `forced`, that of most pictures."""
    best, most = None, 0
    for level in range(max(map(len, tree.direct), default=0)):
        names = Counter[str]()
        for path, count in tree.direct.items():
            if len(path) > level:
                names[path[level]] += count
        splits = _split_names(names, lenient=forced)
        count = sum(names[name] for name in splits)
        if forced and count > most:
            best, most = (level, splits), count
        elif not forced and splits and _is_split_level(tree, level, names, splits):
            return level, splits
    return best


def _is_split_level(tree: _Tree, level: int, names: Counter[str], splits: dict[str, str]) -> bool:
    kinds, count = set(splits.values()), sum(names[name] for name in splits)
    others = names.total() - count
    if level:
        return 2 * count > tree.total[()] and (len(kinds) > 1 or not others)
    # One split among other folders may be a class of that name, unless it holds class folders itself.
    return len(kinds) > 1 or not others or any(len(folder) > 1 and folder[0] in splits for folder in tree.direct)


def _without_splits(
    tree: _Tree, paths: Mapping[Folder, Folder], level: int, splits: Mapping[str, str]
) -> tuple[dict[Folder, Folder], dict[Folder, str | None]]:
    """Take the names of splits out of the paths, and leave out folders beside those of splits that are no classes."""
    beside_are_classes = False
    if level == 0 and len(set(splits.values())) == 1:
        # test/CLASS beside CLASS: the images outside test/ have no given split.
        tops = tree.children[()] - set(splits)
        inner = {name for top in splits for name in tree.children.get((top,), set())}
        beside_are_classes = bool(tops) and 2 * len(tops & inner) >= len(tops)
    rests, split_of = dict[Folder, Folder](), dict[Folder, str | None]()
    for folder, path in paths.items():
        upto = path[: level + 1]
        split = splits.get(upto[level]) if len(upto) > level else None
        if split:
            below = path[level + 1 : level + 2]
            is_only = bool(below) and tree.children[upto] == set(below)
            is_repeated = is_only and (_split_words(below[0]) or ("",))[0] == split
            rests[folder], split_of[folder] = path[:level] + path[level + 1 + is_repeated :], split
        elif len(path) <= level or beside_are_classes:
            rests[folder] = path
    return rests, split_of


def _split_words(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Separate the split in a name from its other words, without _NEUTRAL_WORDS; None where it names no split."""
    if (exact := given_split(name)) is not None:
        return exact, ()
    words = [word.casefold() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name) if word]
    if any(word in COMPANION_FOLDERS for word in words):  # train_masks holds no pictures to train on
        return None
    words = [_ENDINGS.sub("", word) if given_split(_ENDINGS.sub("", word)) else word for word in words]
    words = ["train" if word in ("trainval", "trainvalid") else word for word in words]
    splits = {split for word in words if (split := given_split(word))}
    if splits == {"train", "val"}:
        splits = {"train"}
    if len(splits) != 1:
        return None
    return splits.pop(), tuple(word for word in words if not given_split(word) and word not in _NEUTRAL_WORDS)


def _split_names(names: Iterable[str], *, lenient: bool = False) -> dict[str, str]:
    """Map names to splits; unless `lenient`, one like cars_train only beside cars_test, or alone."""
    by_rest: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    count = 0
    for name in names:
        count += 1
        if words := _split_words(name):
            by_rest[words[1]][name] = words[0]
    if lenient:
        return {name: split for found in by_rest.values() for name, split in found.items()}
    plain = by_rest.pop((), {})
    if len(set(plain.values())) > 1:
        return plain
    pairs = [{**plain, **found} for found in by_rest.values()]
    pairs = [found for found in pairs if len(set(found.values())) > 1 or count == 1]
    return pairs[0] if len(pairs) == 1 else plain


def _check_classes(tree: _Tree, folders: set[Folder]) -> tuple[list[str], int]:
    """Warn of what looks wrong in the class folders, and count the last names that all of them share."""
    warnings, tail = list[str](), 0
    while len(folders) > 1 and all(len(folder) > 1 for folder in folders) and len({f[-1] for f in folders}) == 1:
        if _YEAR.fullmatch(next(iter(folders))[-1]):
            break
        tail += 1
        folders = {folder[:-1] for folder in folders}
    if nested := sorted(" ".join(folder) for folder in folders if not tail and tree.children.get(folder)):
        warnings.append(
            f"images of deeper folders count to the class above them ({shown(nested)}; --label-from path parts them)"
        )
    if len({len(folder) for folder in folders}) > 1:
        ends = [
            min(folders, key=lambda folder: (len(folder), folder)),
            max(folders, key=lambda folder: (len(folder), folder)),
        ]
        names = " and ".join(repr(readable("/".join(folder))) for folder in ends)
        warnings.append(f"class folders lie at different depths ({names})")
    deep = [folder for folder in folders if len(folder) > 1 and not _YEAR.fullmatch(folder[-1])]
    times = Counter(folder[-1] for folder in deep)
    shared = sorted(name for name in times if times[name] > 1)
    if 2 * sum(times[name] for name in shared) > len(folders):
        warnings.append(
            f"the same folder names lie below several others ({shown(shared)}); --label-from 1 takes the first name "
            "alone, -1 the last"
        )
    return warnings, tail


def name_warnings(classes: Iterable[str], above: Iterable[str] = ()) -> list[str]:
    """Warn of class names that look like a split's or like those of images and masks, a sentence each.

    `above` are the names of folders above class folders, which are part of the class.
    """
    split_like: dict[str, tuple[str, ...]] = {}
    splits, like_images, above, found = set(), [], set(above), []
    for name in sorted({*classes, *above}):
        if split_and_rest := _split_words(name):
            splits.add(split_and_rest[0])
            split_like[name] = split_and_rest[1]
        elif (
            _PICTURE_WORDS.intersection(re.split(r"[\W\d_]+", name.casefold())) or name.casefold() in COMPANION_FOLDERS
        ):
            like_images.append(name)
    # One class with a word like test may be a car; with the names of two splits it is a split.
    like_splits = [name for name, rest in split_like.items() if len(splits) > 1 or not rest or name in above]
    if like_splits:
        found.append(
            f"part of a class is called like a split ({shown(like_splits)}); if it is one, say --layout splits and let "
            "class folders lie below it"
        )
    if like_images:
        found.append(f"part of a class is called like what shows no class of cars ({shown(like_images)})")
    return found
