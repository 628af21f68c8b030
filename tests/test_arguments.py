"""Paths, numbers and variables of every command: an invalid value is one sentence, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from carray.__main__ import app, main
from carray.cli.preflight import estimate
from carray.core.environment import check_variables
from carray.testing.predictions import row, write_predictions

ROOT = Path(__file__).resolve().parents[1]
PARSED: Any = typer.main.get_command(app)
"""The command line, built once: typer builds it anew at each call, which takes nine tenths of the time of a mistake."""
BAD_PATHS = [
    *("", "  ", "s3:/b/x", "s3//b", "S3://b/x", "s3:///x", "s3://my bucket/x", "file:///x", "gs://b", "http://h/x"),
    *("\udcff", "s3://b/\udcff"),
]
BAD_NUMBERS = ["nan", "inf", "-1", "1e999", "9" * 30, ""]
NO_PATHS = {
    *("layout", "split", "runtime", "engine", "row", "trial", "question", "format", "column", "label_from"),
    *("settings", "version", "help"),
}
"""Texts that name no place."""


def commands() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Give each command's name, its parameters as they are parsed, and their types."""
    for info in app.registered_commands:
        name = info.name or info.callback.__name__
        yield name, PARSED.commands[name], get_type_hints(info.callback)
    for info in estimate.registered_commands:
        yield f"estimate {info.name}", PARSED.commands["estimate"].commands[info.name], get_type_hints(info.callback)


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
    monkeypatch.setattr("typer.main.get_command", lambda _app: PARSED)

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


def test_an_option_given_twice_is_refused(run) -> None:
    code, _, err = run("query", "p", "--limit", "1", "--limit", "2")
    assert code == 2 and "carray: --limit is given 2 times; give it once." in err
    code, _, err = run("tune", "--manifest=m", "--out=r", "--seed=1", "--set", "search.seed=2")
    assert code == 2 and "search.seed is set twice, by 'search.seed=2' and 'search.seed=1'" in err


def test_a_home_is_expanded_and_a_relative_place_is_said_absolute(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(tmp_path / "home" / "x") in run("leaderboard", "~/x")[2]
    assert str(tmp_path / "x") in run("leaderboard", "x")[2]
    code, _, err = run("leaderboard", "~nobody-of-that-name/x")
    assert code == 2 and "names a home that is not known here" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *(("CARRAY_FEATURES_GB", value, f"CARRAY_FEATURES_GB is {value!r}") for value in ("20GB", "nan", "-1", "inf")),
        ("CARRAY_CACHE", "  ", "CARRAY_CACHE: '  ' is an empty path"),
        ("CARRAY_CACHE", "s3://b/x", "CARRAY_CACHE is 's3://b/x', but the cache is read by mapping files"),
        ("CARRAY_CACHE", "s3:/b", "CARRAY_CACHE: 's3:/b' is a misspelled address"),
        ("CARRAY_CACHE", "file", "file is a file; name a folder."),
        ("CARRAY_CACHE", "file/below", "file is a file; name a folder."),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused_before_anything_starts(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, value)
    code, _, err = run("tune", "--manifest=absent.parquet", "--out=run")
    assert code == 2 and words in err
    assert run("tune", "--help")[0] == 0


def test_a_relative_cache_is_one_place_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARRAY_CACHE", "cache")
    monkeypatch.setenv("CARRAY_CASHE", "x")
    check_variables()
    assert os.environ["CARRAY_CACHE"] == str(tmp_path / "cache")
    assert "carray reads no variable CARRAY_CASHE; did you mean CARRAY_CACHE?" in capsys.readouterr().err


def carray(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("environment", {})}
    command = [sys.executable, "-m", "carray", *arguments]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=120, check=False, **options)


def test_output_that_cannot_be_written_is_a_sentence(run, tmp_path: Path) -> None:
    folder = write_predictions(str(tmp_path / "p"), [[row("s3://b/1", label="Škoda 🚗 2012")]])
    with open("/dev/full", "wb") as full:
        done = carray("query", folder, "by-label", "--format=json", stdout=full)
    assert done.returncode == 4 and b"Traceback" not in done.stderr
    assert b"carray: standard output" in done.stderr and b"No space left on device" in done.stderr
    for encoding in ("latin-1", "ascii"):
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "environment": {"PYTHONIOENCODING": encoding}}
        done = carray("query", folder, "by-label", "--format=json", **options)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["label"] == "Škoda 🚗 2012"
    for place in ("/dev/full", "/dev/null"):
        code, _, err = run("query", folder, "by-label", "--out", place)
        assert code == 4 and "is a device or a pipe" in err
    (tmp_path / "file").write_text("")
    code, _, err = run("query", folder, "by-label", "--out", tmp_path / "file" / "a.csv")
    assert code == 4 and "after 1 try" in err


def test_nothing_but_unreadable_images_is_no_success(
    run, small_bundle: str, tmp_path: Path, image_folder: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    code, out, err = run("predict", small_bundle, "text.jpg", "absent.jpg")
    assert code == 2 and "text.jpg" in out and "none of 2 images could be scored" in err
    good = next(path for path in image_folder.rglob("*") if path.is_file())
    assert run("predict", small_bundle, "text.jpg", good)[0] == 0
