"""Names the arguments that several commands take, so that each reads the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Bundle", "Column", "Config", "ManifestOption", "Run", "Settings", "short_for"]

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle folder, such as RUN/bundle; local or s3://.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder that carray tune wrote; local or s3://.")]
ManifestOption = Annotated[str, typer.Option("--manifest", help="Table written by carray prepare; local or s3://.")]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="Of a table: which column is which, uri=path; repeatable."),
]
Config = Annotated[str | None, typer.Option("--config", help="YAML file of settings; see jobs/configs.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as search.seed=1; repeatable.")
]


def short_for(settings: list[str] | None, **named: object) -> list[str]:
    """Join `--set` texts with options that are short for one; `search__seed=1` is search.seed=1, None is not said."""
    return [
        *(settings or []),
        *(f"{key.replace('__', '.')}={value}" for key, value in named.items() if value is not None),
    ]
