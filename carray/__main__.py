"""The `carray` command: lists the subcommands of `carray.cli`, and turns errors into sentences and exit codes.

A user's mistake is one sentence, never a traceback; results go to standard output, progress to standard error.
Exit codes: 0 done, 1 a bug, or machines lost, 2 settings or tables, 3 bundle, 4 storage, 5 budget, 6 search, 129, 130
and 143 stopped by a signal.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import typer

from carray import __version__
from carray.cli.data import demo, prepare
from carray.cli.options import Command
from carray.cli.preflight import doctor, estimate
from carray.cli.questions import compare, query, report
from carray.cli.score import calibrate, classify, compact, evaluate, predict, quantize, stress
from carray.cli.search import export, leaderboard, train, tune
from carray.core.exit_lines import run_command, run_watched

__all__ = ["app", "main"]

app = typer.Typer(
    help="Find the best car-image classifier by a search, then classify whole image buckets with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find the best car-image classifier by a search, then classify whole image buckets with it."""


# In the order of a user's work, which is the order of `carray --help`.
for command in (
    *(prepare, tune, train, leaderboard, export, quantize, calibrate),
    *(evaluate, stress, classify, compact, predict, query, report, compare, doctor, demo),
):
    app.command(cls=Command)(command)
app.add_typer(estimate, name="estimate")


def main(arguments: list[str] | None = None) -> None:
    """Run this process's command line in a child process (core.exit_lines says why), or `arguments` in this one."""
    command = partial(app, args=arguments, prog_name="carray")
    in_child = arguments is None and hasattr(os, "fork")
    raise SystemExit(run_watched(command) if in_child else run_command(command))


if __name__ == "__main__":
    main()
