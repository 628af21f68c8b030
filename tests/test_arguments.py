"""Every path, number and variable of every command: a value that cannot be meant is one sentence at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from carray.__main__ import app, main
from carray.commands.before import estimate

ROOT = Path(__file__).resolve().parents[1]
BAD_PATHS = [
    "",
    "  ",
    "s3:/b/x",
    "s3//b",
    "S3://b/x",
    "s3:///x",
    "s3://my bucket/x",
    "file:///x",
    "gs://b",
    "http://h/x",
]
BAD_NUMBERS = ["nan", "inf", "-1", "1e999", "9" * 30, ""]
NO_PATHS = {
    *("layout", "split", "runtime", "row", "trial", "question", "format"),
    *("settings", "version", "help"),
}
"""Texts that name no place."""


def commands() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Give each command's name, its parameters as they are parsed, and their types."""
    parsed = typer.main.get_command(app).commands
    for info in app.registered_commands:
        name = info.name or info.callback.__name__
        yield name, parsed[name], get_type_hints(info.callback)
    for info in estimate.registered_commands:
        yield f"estimate {info.name}", parsed["estimate"].commands[info.name], get_type_hints(info.callback)


def is_number(kind: Any) -> bool:
    return bool({int, float} & {kind, *get_args(kind)})


def line(command: Any, chosen: Any, value: str) -> list[str]:
    """Write a command line with all that is required, and `value` for one parameter."""
    words = []
    for param in command.params:
        if param is not chosen and not param.required:
            continue
        # Each command takes one of the two suffixes, or any.
        suffix = "" if param.name != "out" else ".html" if command.name == "report" else ".parquet"
        text = value if param is chosen else f"absent-{param.name}{suffix}"
        words += [text] if param.param_type_name == "argument" else [f"{param.opts[0]}={text}"]
    return words


def parameters(numbers: bool) -> list[Any]:
    found = []
    for name, command, types in commands():
        for param in command.params:
            is_flag = types.get(param.name, bool) is bool or param.name in NO_PATHS
            if not is_flag and is_number(types[param.name]) == numbers:
                found.append(pytest.param(name, command, param, id=f"{name} {param.name}"))
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, captured.err
        return int(end.value.code or 0), captured.out, captured.err

    return run_command


@pytest.mark.parametrize(("name", "command", "param"), parameters(numbers=False))
def test_a_path_that_cannot_be_meant_is_refused_where_it_is_read(run, tmp_path: Path, name, command, param) -> None:
    for value in BAD_PATHS:
        code, out, err = run(*name.split(), *line(command, param, value))
        (sentence,) = (text for text in err.splitlines() if text.startswith("carray: "))
        assert code == 2 and out == "", (value, err)
        where = param.opts[0] if param.param_type_name == "option" else param.metavar or param.name.upper()
        assert sentence.startswith(f"carray: {where.strip('[].')}: "), (value, sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "command", "param"), parameters(numbers=True))
def test_a_number_that_cannot_be_meant_is_refused(run, tmp_path: Path, name, command, param) -> None:
    for value in BAD_NUMBERS:
        code, out, err = run(*name.split(), *line(command, param, value))
        assert code == 2 and out == "", (value, err)
        assert param.opts[-1] in err or param.name in err, (value, err)
    assert list(tmp_path.iterdir()) == []
