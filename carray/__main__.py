"""The `carray` command: lists the subcommands of `carray.cli`, and turns errors into sentences and exit codes.

Invariants: a user's mistake is one sentence and an exit code (core.errors), never a traceback; the last lines say what
happened and what to do, whatever ended the command (core.exit_lines); results go to standard output, progress to
standard error. Exit codes: 0 done, 1 a bug, or machines lost, 2 settings or tables, 3 bundle, 4 storage, 5 budget,
6 search, 129, 130 and 143 stopped.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import typer

from carray import __version__
from carray.cli.before import doctor, estimate
from carray.cli.data import demo, prepare
from carray.cli.options import Command
from carray.cli.pages import report
from carray.cli.questions import compare, query
from carray.cli.score import calibrate, classify, compact, evaluate, predict, quantize
from carray.cli.search import export, leaderboard, train, tune
from carray.cli.stress import stress
from carray.core.exit_lines import end_in_words, run_watched

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


# In the order in which a user meets them, which is the order of `carray --help`.
for command in (
    *(prepare, tune, train, leaderboard, export, quantize, calibrate),
    *(evaluate, stress, classify, compact, predict, query, report, compare, doctor, demo),
):
    app.command(cls=Command)(command)
app.add_typer(estimate, name="estimate")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, this process's own or the one given; ends the process with an exit code.

    The process's own runs in a child, so that a signal to the shell's process group does not end its Ray first, and
    even a lost Ray has a last word.
    """
    command = partial(app, args=arguments, prog_name="carray")
    watched = arguments is None and hasattr(os, "fork")
    raise SystemExit(run_watched(command) if watched else end_in_words(command))


if __name__ == "__main__":
    main()
