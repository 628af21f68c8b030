"""Arguments and options that several commands share.

Paths are made absolute here; wrong paths, and numbers that are NaN, infinite or out of range, are refused before a
command starts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from carray.core.errors import SettingsError
from carray.core.limits import MOST_COUNT, MOST_SEED

__all__ = [
    "AllFiles",
    "Bundle",
    "Column",
    "Command",
    "Config",
    "ManifestOption",
    "ManifestSplit",
    "Predictions",
    "Run",
    "Runtime",
    "SearchEpochs",
    "SearchSeed",
    "SearchTrials",
    "SeedOption",
    "Settings",
    "Source",
    "new_file_option",
    "number_option",
    "path",
    "path_argument",
    "path_option",
    "refuse",
    "short_for",
]


def path(name: str) -> Callable[[str], str]:
    """Make a parser of an option or argument that is a path or URI; it makes the path absolute."""

    def read(text: str) -> str:
        from carray.core.store.files import absolute

        try:
            return absolute(text)
        except SettingsError as err:
            raise SettingsError(f"{name}: {err}") from None

    return read


def new_file_option(help: str, *, suffix: str = "") -> Any:
    """Declare the option --out that names a file to write, which must end in `suffix`, if given."""
    read_path = path("--out")

    def read(text: str) -> str:
        uri = read_path(text)
        if text.endswith("/"):
            raise SettingsError(f"--out: {text!r} is a folder; give the file's own name, such as {text}out{suffix}.")
        if not uri.lower().endswith(suffix):
            raise SettingsError(f"--out: {text!r} does not end in {suffix}, which is what is written; name it so.")
        return uri

    return typer.Option("--out", help=help, parser=read)


def path_argument(metavar: str, help: str, **more: Any) -> Any:
    """Declare an argument that is a path or URI."""
    return typer.Argument(metavar=metavar, help=help, parser=path(metavar.strip("[].")), **more)


def path_option(flag: str, help: str, **more: Any) -> Any:
    """Declare an option that is a path or URI."""
    return typer.Option(flag, help=help, parser=path(flag), **more)


def number_option(flag: str, help: str, *, least: float = 0.0) -> Any:
    """Declare an option that is a number from `least` to MOST_COUNT."""

    def read(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= MOST_COUNT:  # also false for NaN
            raise SettingsError(f"{flag} is {str(text)!r}; allowed is a number from {least:g} to {MOST_COUNT:,}.")
        return value

    return typer.Option(flag, help=help, parser=read)


class Command(TyperCommand):
    """A command that refuses repeated options (Typer drops the first) and checks carray's environment variables."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            SettingsError: an option with one value is given twice, an argument is refused by its parser, or an
                environment variable of carray has an unusable value.
        """
        from carray.core.environment import check_variables

        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(param for param in order if param.param_type_name == "option").items():
            if times > 1 and not getattr(param, "multiple", False):
                raise SettingsError(f"{param.opts[0]} is given {times} times; give it once.")

        remaining = super().parse_args(ctx, args)
        check_variables()  # after --help, which ends in the line above
        return remaining


Bundle = Annotated[str, path_argument("BUNDLE", "Bundle folder, such as RUN/bundle; local or s3://.")]
Run = Annotated[str, path_argument("RUN", "Run folder, the --out of carray tune or train; local or s3://.")]
Source = Annotated[
    str, path_argument("SOURCE", "Folder, s3://bucket/prefix, table of URIs, or the manifest.json of an S3 Inventory.")
]
Predictions = Annotated[
    str, path_argument("PREDICTIONS", "Predictions folder, the --out of carray classify; local or s3://.")
]
ManifestOption = Annotated[str, path_option("--manifest", "Manifest that carray prepare wrote; local or s3://.")]
Config = Annotated[str | None, path_option("--config", "YAML file of settings; see jobs/configs.")]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=COLUMN", help="Which column of the table holds what, such as uri=path; repeatable."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as search.seed=1; repeatable.")
]
AllFiles = Annotated[bool, typer.Option("--all-files", help="Take every file, whatever its suffix.")]
ManifestSplit = Annotated[str | None, typer.Option("--split", help="Where SOURCE is a manifest: this split only.")]
Runtime = Annotated[str | None, typer.Option("--runtime", help="auto, or one of the bundle's runtimes.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of what is drawn at random.")]
SearchTrials = Annotated[int | None, typer.Option("--trials", help="Short for --set search.trials=N.")]
SearchEpochs = Annotated[int | None, typer.Option("--epochs", help="Short for --set search.epochs=N.")]
SearchSeed = Annotated[int | None, typer.Option("--seed", help="Short for --set search.seed=N.")]


def refuse(sentence: str) -> NoReturn:
    """Refuse a command's options, which do not fit together.

    Raises:
        SettingsError: always.
    """
    raise SettingsError(sentence)


def short_for(settings: list[str] | None, **named: object) -> list[str]:
    """Append options to `--set` texts: `search__seed=1` becomes search.seed=1; None is left out."""
    return [
        *(settings or []),
        *(f"{key.replace('__', '.')}={value}" for key, value in named.items() if value is not None),
    ]
