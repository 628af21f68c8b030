"""The `carray` command: lists the subcommands of `carray.commands`, and turns errors into sentences and exit codes.

Invariants: a user's mistake is one sentence and an exit code (core.errors), never a traceback; results go to standard
output, progress to standard error. Exit codes: 0 done, 2 settings or tables, 3 bundle, 4 storage, 5 budget, 6 search,
143 stopped.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from carray import __version__
from carray.commands.before import doctor, estimate
from carray.commands.data import demo, prepare
from carray.commands.pages import report
from carray.commands.questions import compare, query
from carray.commands.score import calibrate, classify, compact, evaluate, predict, quantize
from carray.commands.search import export, leaderboard, train, tune
from carray.commands.stress import stress
from carray.core.errors import CarrayError, SettingsError

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
    app.command()(command)
app.add_typer(estimate, name="estimate")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with an exit code."""
    try:
        app(args=arguments, prog_name="carray")
    except CarrayError as err:
        sys.stdout.flush()
        problems = err.problems if isinstance(err, SettingsError) else [str(err)]
        for problem in problems:
            print(f"carray: {problem}", file=sys.stderr)
        raise SystemExit(err.exit_code) from None


if __name__ == "__main__":
    main()
