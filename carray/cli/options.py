"""Declares how arguments are read: one reader for every path, one for every fraction and price, no option twice.

Invariants: a path is absolute from here on; one that is empty or misspelled is refused before anything starts, and so
is a number that is NaN, infinite or out of range.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from carray.core.errors import SettingsError
from carray.core.limits import MOST_COUNT, MOST_SEED

__all__ = [
    "Bundle",
    "Column",
    "Command",
    "Config",
    "ManifestOption",
    "Predictions",
    "Run",
    "SeedOption",
    "Settings",
    "Source",
    "new_file",
    "number",
    "path",
    "short_for",
]


def path(name: str) -> Callable[[str], str]:
    """Make the reader of an option or argument that is a path or an s3:// URI: it gives the path absolute."""

    def read(text: str) -> str:
        from carray.core.store.files import absolute

        try:
            return absolute(text)
        except SettingsError as err:
            raise SettingsError(f"{name}: {err}") from None

    return read


def new_file(name: str, *, suffix: str | None = None) -> Callable[[str], str]:
    """Make the reader of an option that names a file to write, which ends in `suffix` where that is given."""
    read_path = path(name)

    def read(text: str) -> str:
        place = read_path(text)
        if text.endswith("/"):
            raise SettingsError(f"{name}: {text!r} is a folder; give the file's own name, such as {text}out{suffix}.")
        if suffix and not place.lower().endswith(suffix):
            raise SettingsError(f"{name}: {text!r} does not end in {suffix}, which is what is written; name it so.")
        return place

    return read


def number(name: str, *, least: float = 0.0) -> Callable[[str | float], float]:
    """Make the reader of an option that is a number from `least` to MOST_COUNT."""

    def read(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= MOST_COUNT:  # nor is NaN
            raise SettingsError(f"{name} is {str(text)!r}; allowed is a number from {least:g} to {MOST_COUNT:,}.")
        return value

    return read


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the first would be lost, and a bad variable."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            SettingsError: an option that takes one value is given twice, an argument is refused by its reader, or a
                variable of carray's own cannot be used.
        """
        from carray.core.environment import check_variables

        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(param for param in order if param.param_type_name == "option").items():
            if times > 1 and not getattr(param, "multiple", False):
                raise SettingsError(f"{param.opts[0]} is given {times} times; give it once.")

        left = super().parse_args(ctx, args)
        check_variables()  # not before --help, which ends in the line above
        return left


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, parser=path(metavar))


Bundle = Annotated[str, _argument("BUNDLE", "Bundle folder, such as RUN/bundle; local or s3://.")]
Run = Annotated[str, _argument("RUN", "Folder that carray tune wrote; local or s3://.")]
Source = Annotated[
    str,
    _argument("SOURCE", "Folder, s3://bucket/prefix, table of URIs, or an S3 Inventory's manifest.json."),
]
Predictions = Annotated[str, _argument("PREDICTIONS", "Folder that carray classify wrote; local or s3://.")]
ManifestOption = Annotated[
    str,
    typer.Option("--manifest", help="Table written by carray prepare; local or s3://.", parser=path("--manifest")),
]
Config = Annotated[
    str | None, typer.Option("--config", help="YAML file of settings; see jobs/configs.", parser=path("--config"))
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="Of a table: which column is which, uri=path; repeatable."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as search.seed=1; repeatable.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Decides what is drawn at random.")]


def short_for(settings: list[str] | None, **named: object) -> list[str]:
    """Join `--set` texts with options that are short for one; `search__seed=1` is search.seed=1, None is not said."""
    return [
        *(settings or []),
        *(f"{key.replace('__', '.')}={value}" for key, value in named.items() if value is not None),
    ]
