"""Infers from folder names which folders are splits, which are classes and which only wrap others.

It uses names and counts only, so local folders and prefixes on S3 are read alike.

    1. images/ beside masks/            the pictures are in images/; masks/ is left out
    2. data/data/...                    an only folder that holds folders is descended
    3. train/CLASS, CLASS/train         the level where most folders name a split
    4. cars_train/cars_train/...        a repeated split's name or wrapper counts once
    5. MAKE/MODEL                       the class is the path down to the folder that holds the pictures
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from carray.core.errors import SettingsError
from carray.core.text import readable
from carray.manifest.manifest_file import given_split

__all__ = [
    "COMPANION_FOLDERS",
    "Folder",
    "FolderLayout",
    "FolderRole",
    "name_warnings",
    "parse_label_from",
    "read_layout",
    "shown",
]

Folder = tuple[str, ...]
"""The names of the folders from the source down; () is the source itself."""

SHOWN = 5

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


@dataclass(frozen=True, slots=True)
class FolderRole:
    """The label and split of the pictures directly in a folder."""

    label: str | None = None
    split: str | None = None
    unlabelled_in: Folder | None = None
    """The folder to name where pictures have no label; else None."""
    left_out: bool = False
    """Whether the pictures are masks or the like."""


class _Tree:
    """The number of pictures in each folder, and below it."""

    def __init__(self, pictures: Mapping[Folder, int]) -> None:
        self.direct, self.total = Counter(pictures), Counter[Folder]()
        self.children: dict[Folder, set[str]] = defaultdict(set)
        for folder, count in pictures.items():
            for depth in range(len(folder) + 1):
                self.total[folder[:depth]] += count
                if depth:
                    self.children[folder[: depth - 1]].add(folder[depth - 1])

    def holds_most_directly(self, folder: Folder) -> bool:
        """Check whether at least half of a folder's pictures lie directly in it."""
        return 0 < self.total[folder] <= 2 * self.direct[folder]

    def wrappers(self, stop: Callable[[str], bool]) -> Folder:
        """Find the chain of folders from the source that are each the only one in its parent, and hold folders."""
        inside: Folder = ()
        while len(names := self.children.get(inside, set())) == 1:
            (name,) = names
            child = (*inside, name)
            if stop(name) or not self.children.get(child) or self.holds_most_directly(child):
                break
            inside = child
        return inside


@dataclass
class FolderLayout:
    """The labels and splits of folders, as `read_layout` infers them."""

    kind: str = "images"
    """images (no class or split folders), folder (class folders) or splits (split folders)."""
    inside: Folder = ()
    """The wrappers that were descended from the source."""
    label_from: int | str = "auto"
    level: int | None = None
    """The level below `inside` whose folders name splits, if any."""
    splits: dict[str, str] = field(default_factory=dict)
    """Folder names at that level, and the split of each."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong, a sentence each."""
    _dropped: set[Folder] = field(default_factory=set)
    _companions: set[Folder] = field(default_factory=set)
    _repeated: set[Folder] = field(default_factory=set)
    _beside_are_classes: bool = False
    _unlabelled_tops: set[str] = field(default_factory=set)
    _below: Folder = ()
    _classes: _Tree = field(default_factory=lambda: _Tree({}))
    _tail: int = 0

    def role(self, folder: Folder) -> FolderRole:
        """Determine a folder's label and split, whether or not it holds pictures."""
        reduced = self._reduce(folder)
        if reduced is None:
            return FolderRole(unlabelled_in=folder, left_out=True)
        if self.kind == "images":
            return FolderRole(unlabelled_in=folder)
        parts = self._without_prefix(reduced, self.inside)
        split, rest = self._separate_split(parts)
        if rest is None:
            return FolderRole(unlabelled_in=(*self.inside, *parts[: (self.level or 0) + 1]))
        if self._classified(parts) is None:
            return FolderRole(unlabelled_in=folder)
        label = self._label(rest)
        return FolderRole(label, split if label is not None else None, None if label is not None else folder)

    def _reduce(self, folder: Folder) -> Folder | None:
        """Remove folders like images/ from a path; None below folders like masks/."""
        kept: list[str] = []
        for depth, name in enumerate(folder, start=1):
            if folder[:depth] in self._companions:
                return None
            if folder[:depth] not in self._dropped:
                kept.append(name)
        return tuple(kept)

    @staticmethod
    def _without_prefix(folder: Folder, wrappers: Folder) -> Folder:
        if folder[: len(wrappers)] == wrappers:
            return folder[len(wrappers) :]
        return () if wrappers[: len(folder)] == folder else folder

    def _separate_split(self, parts: Folder) -> tuple[str | None, Folder | None]:
        """Separate a path's split from its other parts, which are None outside the split folders."""
        if self.level is None or len(parts) <= self.level:
            return None, parts
        name = parts[self.level]
        if name not in self.splits:
            return None, parts if self._beside_are_classes else None
        after = self.level + (2 if parts[: self.level + 2] in self._repeated else 1)
        return self.splits[name], parts[: self.level] + parts[after:]

    def _classified(self, parts: Folder) -> Folder | None:
        """Take the split out of a path; None where the path has no label."""
        rest = self._separate_split(parts)[1]
        return None if rest is None or set(rest[:1]) & self._unlabelled_tops else rest

    def class_folder(self, rest: Folder) -> Folder | None:
        """Cut a path down to its class: the first folder that directly holds most of its pictures."""
        rest = self._without_prefix(rest, self._below)
        for depth in range(1, len(rest) + 1):
            if self._classes.holds_most_directly(rest[:depth]):
                return rest[:depth]
        return None if self._classes.total[rest] or not rest else rest

    def class_folders(self) -> set[Folder]:
        """List the folders that are classes."""
        return {folder for rest in self._classes.direct if (folder := self.class_folder((*self._below, *rest)))}

    def class_names(self) -> tuple[set[str], set[str]]:
        """List the names of the class folders, and of the folders above them that are part of a class."""
        folders = self.class_folders()
        return {folder[-1] for folder in folders}, {name for folder in folders for name in folder[:-1]}

    def _label(self, rest: Folder) -> str | None:
        if self.label_from == "auto":
            folder = self.class_folder(rest)
            return " ".join(folder[: len(folder) - self._tail]) or None if folder else None
        below = self._without_prefix(rest, self._below)
        if not below:
            return None
        whole = (*self.inside, *rest)
        if self.label_from == "path":
            return " ".join(whole)
        count = int(self.label_from)
        return " ".join(below[:count] if count > 0 else whole[count:])


def parse_label_from(text: str) -> int | str:
    """Read `auto`, `path`, or a number of folder names: N from the first, -N from the last.

    Raises:
        SettingsError: it is something else.
    """
    if text in ("auto", "path"):
        return text
    if re.fullmatch(r"-?[1-9]\d?", text):
        return int(text)
    raise SettingsError(
        f"label_from is {text!r}; allowed are auto, path (every folder name from the source down), N (the first N "
        "folder names below the split) and -N (the last N), such as 1 or -1."
    )


def read_layout(pictures: Mapping[Folder, int], *, layout: str = "auto", label_from: str = "auto") -> FolderLayout:
    """Read which folders are splits and classes.

    Args:
        pictures: how many pictures lie directly in each folder.
        layout: auto, folder (no folder names a split or accompanies pictures), splits, or images (no labels).
        label_from: as `parse_label_from` takes it.

    Raises:
        SettingsError: no folder names a split though `layout` is splits; `label_from` is unknown, or there are no
            folders for it.
    """
    found = FolderLayout(label_from=parse_label_from(label_from))
    if layout == "images":
        return found
    if layout != "folder":
        _leave_out_companions(_Tree(pictures), found)
    reduced = _gathered(pictures, found._reduce)
    tree = _Tree(reduced)
    found.inside = tree.wrappers(lambda name: layout != "folder" and _split_words(name) is not None)
    tree = _Tree(_gathered(reduced, lambda folder: found._without_prefix(folder, found.inside)))
    if layout != "folder":
        _find_splits(tree, found, forced=layout == "splits")
    if tree.children:
        found.kind = "folder" if found.level is None else "splits"
    elif found.label_from != "auto":
        raise SettingsError(f"label_from is {label_from}, but no folder below the source could name a class.")
    rest = _gathered(tree.direct, found._classified)
    if found.level is not None:
        found._below = _Tree(rest).wrappers(lambda name: False)
    found._classes = _Tree(_gathered(rest, lambda folder: found._without_prefix(folder, found._below)))
    if found.label_from == "auto":
        _check_classes(found)
    return found


def _gathered(pictures: Mapping[Folder, int], change: Callable[[Folder], Folder | None]) -> Counter[Folder]:
    """Count pictures by their changed folders; a folder changed to None is left out."""
    gathered: Counter[Folder] = Counter()
    for folder, count in pictures.items():
        if (changed := change(folder)) is not None:
            gathered[changed] += count
    return gathered


def _leave_out_companions(tree: _Tree, found: FolderLayout) -> None:
    for folder, names in tree.children.items():
        holders = {name for name in names if name.casefold() in HOLDER_FOLDERS}
        others = names - holders
        if len(holders) == 1 and all(name.casefold() in COMPANION_FOLDERS for name in others):
            found._dropped.add((*folder, *holders))
            found._companions |= {(*folder, name) for name in others}


def _find_splits(tree: _Tree, found: FolderLayout, *, forced: bool) -> None:
    depth = max((len(folder) for folder in tree.direct), default=0)
    levels = []
    for level in range(depth):
        names = Counter[str]()
        for folder, count in tree.direct.items():
            if len(folder) > level:
                names[folder[level]] += count
        splits = _split_names(names, lenient=forced)
        levels.append((sum(names[name] for name in splits), -level, splits))
        if not forced and splits and _is_split_level(tree, level, names, splits):
            return _take_level(tree, found, level, splits)
    if forced:
        count, level, splits = max(levels, default=(0, 0, {}), key=lambda one: one[:2])
        if not count:
            raise SettingsError("layout is splits, but no folder is called train, val, test or the like; name one so.")
        return _take_level(tree, found, -level, splits)
    # A flat test/ beside class folders holds unlabelled images; a flat train/ may be a class of vehicles.
    tops = _split_names(tree.children.get((), set()))
    found._unlabelled_tops = {name for name, split in tops.items() if split != "train"}


def _is_split_level(tree: _Tree, level: int, names: Counter[str], splits: dict[str, str]) -> bool:
    kinds, count = set(splits.values()), sum(names[name] for name in splits)
    others = names.total() - count
    if level:
        return 2 * count > tree.total[()] and (len(kinds) > 1 or not others)
    # One split among other folders may be a class of that name, unless it holds class folders itself.
    return len(kinds) > 1 or not others or any(len(folder) > 1 and folder[0] in splits for folder in tree.direct)


def _take_level(tree: _Tree, found: FolderLayout, level: int, splits: dict[str, str]) -> None:
    found.level, found.splits = level, splits
    for folder, names in tree.children.items():
        if len(folder) == level + 1 and folder[level] in splits and len(names) == 1:
            (name,) = names
            words = _split_words(name)
            if words and words[0] == splits[folder[level]]:
                found._repeated.add((*folder, name))
    if level == 0 and len(set(splits.values())) == 1:
        # test/CLASS beside CLASS: the images outside test/ have no given split.
        tops = tree.children[()] - set(splits)
        inner = {name for top in splits for name in tree.children.get((top,), set())}
        found._beside_are_classes = bool(tops) and 2 * len(tops & inner) >= len(tops)


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


def _check_classes(found: FolderLayout) -> None:
    """Warn of what looks wrong in the class folders, and drop the last name where all share it."""
    tree, folders = found._classes, found.class_folders()
    while len(folders) > 1 and all(len(folder) > 1 for folder in folders) and len({f[-1] for f in folders}) == 1:
        if _YEAR.fullmatch(next(iter(folders))[-1]):
            break
        found._tail += 1
        folders = {folder[:-1] for folder in folders}
    if nested := sorted(" ".join(folder) for folder in folders if not found._tail and tree.children.get(folder)):
        found.warnings.append(
            f"images of deeper folders count to the class above them ({shown(nested)}; --label-from path parts them)"
        )
    if len({len(folder) for folder in folders}) > 1:
        ends = [min(folders, key=lambda folder: (len(folder), folder)), max(folders, key=len)]
        names = " and ".join(repr(readable("/".join(folder))) for folder in ends)
        found.warnings.append(f"class folders lie at different depths ({names})")
    deep = [folder for folder in folders if len(folder) > 1 and not _YEAR.fullmatch(folder[-1])]
    parents: dict[str, set[Folder]] = defaultdict(set)
    for folder in deep:
        parents[folder[-1]].add(folder[:-1])
    shared = sorted(name for name, above in parents.items() if len(above) > 1)
    if 2 * sum(folder[-1] in shared for folder in deep) > len(folders):
        found.warnings.append(
            f"the same folder names lie below several others ({shown(shared)}); --label-from 1 takes the first name "
            "alone, -1 the last"
        )


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


def shown(names: Iterable[str]) -> str:
    """Format the first SHOWN names, for a sentence."""
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(readable(name) if name == name.strip() else repr(name) for name in names[:SHOWN]) + more
