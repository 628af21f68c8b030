"""The command line as a user meets it: help that answers, mistakes that cost one sentence, and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from written_runs import write_run

from carray.__main__ import main
from carray.manifest.manifest_file import read_manifest, write_manifest
from carray.manifest.prepare import prepare as build_manifest
from carray.preflight.findings import Finding
from carray.testing.drawing import draw_dataset

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "prepare,tune,train,leaderboard,export,quantize,calibrate,evaluate,stress,classify,predict,query,report,compare,"
    "doctor,estimate classify,estimate tune,demo"
).split(",")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process: its exit code, standard output and standard error."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_reads_writes_and_costs_with_an_example(run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    text = re.sub(r"\s+", " ", out)
    assert "Reads" in text
    assert "rites" in text
    assert f"Example: carray {command}" in text
    assert "Cost:" in text


def test_version_is_the_packages(run) -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version")[1].strip() == f"carray {version}"


def test_doctor_ends_in_what_failed_and_says_it_as_json(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = run("doctor", tmp_path, "--out", tmp_path / "out")
    *lines, last = out.splitlines()
    assert code == 0
    assert json.loads(last) == {"ok": len(lines) - 1, "warn": 1, "fail": 0, "scoring": True, "search": True}
    assert [line for line in lines if line.startswith("warn")] == [
        f"warn  reads             {tmp_path}: no file in it; check its spelling"
    ]
    libraries = "carray.preflight.doctor.look_in_process"  # they were looked at once, which takes five seconds
    monkeypatch.setattr(libraries, lambda *_, title, **__: iter([Finding(title, "ok", "")]))
    code, out, _ = run("doctor", tmp_path / "absent", "--json")
    found = json.loads(out)
    assert code == 4
    assert found["fail"] == 1
    assert {"name": "python", "status": "ok"}.items() <= found["findings"][0].items()


def test_nothing_to_classify_is_a_sentence(run, small_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = run("classify", small_bundle, tmp_path / "empty", "--out", tmp_path / "out")
    assert code == 2
    assert out == ""
    assert "nothing" in err.splitlines()[-1]
    assert str(tmp_path / "empty") in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "expected_code", "words"),
    [
        (["prepare", "{tmp}/absent", "--out", "{tmp}/m.parquet"], 4, ["absent"]),
        (["prepare", "{images}", "--out", "{tmp}/m.parquet", "--split", "70/20"], 2, ["70/20"]),
        (["prepare", "{images}", "--out", "{tmp}/m.parquet", "--layout", "voc"], 2, ["'voc'", "stanford-cars"]),
        (["prepare", "{images}", "--out", "{tmp}/m.parquet", "--label-from", "make"], 2, ["'make'", "auto, path"]),
        (["prepare", "gs://bucket/x", "--out", "{tmp}/m.parquet"], 2, ["'gs'", "s3://"]),
        (["tune", "--manifest", "{tmp}/absent.parquet", "--out", "{tmp}/run"], 4, ["absent.parquet does not exist"]),
        (["tune", "--manifest", "{text}", "--out", "{tmp}/run"], 2, ["not a readable Parquet file"]),
        (
            ["tune", "--manifest", "{m}", "--out", "{tmp}/r", "--set", "search.trails=3"],
            2,
            ["did you mean search.trials?"],
        ),
        (["tune", "--manifest", "{m}", "--out", "{tmp}/r", "--set", "trials"], 2, ["is not key=value"]),
        (["tune", "--manifest", "{m}", "--out", "{tmp}/r", "--config", "{bad_yaml}"], 2, ["not valid YAML"]),
        (["tune", "--manifest", "{m}", "--out", "{tmp}/r", "--trials", "0"], 2, ["search.trials is 0"]),
        (
            ["tune", "--manifest", "{m}", "--out", "{tmp}/r", "--set", "families.transfer.default.backbone=resnet19"],
            2,
            ["'resnet19'", "did you mean"],
        ),
        (["prepare", "{images}", "--out", "{tmp}/m.parquet", "--balance", "0"], 2, ["0"]),
        (["leaderboard", "{tmp}"], 2, ["holds no search.json"]),
        (["export", "{tmp}", "--trial", "t00000"], 2, ["holds no search.json"]),
        (["train", "--manifest", "{tmp}/absent.parquet", "--out", "{tmp}/r"], 4, ["absent.parquet does not exist"]),
        (
            ["train", "--manifest", "{m}", "--out", "{tmp}/r", "--set", "hyper.learning_rat=1"],
            2,
            ["hyper.learning_rat", "did you mean learning_rate?"],
        ),
        (
            ["train", "--manifest", "{m}", "--out", "{tmp}/r", "--set", "hyper.backbone=resnet19"],
            2,
            ["'resnet19'", "did you mean"],
        ),
        (["train", "--manifest", "{m}", "--out", "{tmp}/r", "--epochs", "0"], 2, ["epochs is 0"]),
        (["train", "--manifest", "{m}", "--out", "{tmp}/r", "--config", "{bad_yaml}"], 2, ["not valid YAML"]),
        (["train", "--manifest", "{m}", "--out", "{tmp}/r", "--from", "{tmp}"], 2, ["{tmp} holds no search.json"]),
        (["train", "--manifest", "{m}", "--out", "{tmp}/r", "--refit"], 2, ["needs --from RUN"]),
        (
            ["train", "--manifest", "{m}", "--out", "{tmp}/r", "--from", "{tmp}", "--refit", "--seed", "1"],
            2,
            ["takes neither --set nor --seed"],
        ),
        (
            ["train", "--manifest", "{m}", "--out", "{tmp}/r", "--from", "{tmp}", "--config", "{bad_yaml}"],
            2,
            ["--from {tmp}", "--config {bad_yaml}", "give one of them"],
        ),
        (["evaluate", "{bundle}", "--manifest", "{m}", "--split", "dev", "--out", "{tmp}/e"], 2, ["'dev'"]),
        (["calibrate", "{bundle}", "--manifest", "{m}", "--target-precision", "98"], 2, ["target_precision is 98"]),
        (["calibrate", "{bundle}", "--manifest", "{m}", "--split", "dev"], 2, ["'dev'"]),
        (["calibrate", "{tmp}", "--manifest", "{m}"], 3, ["holds no bundle.json"]),
        (["stress", "{bundle}", "--manifest", "{m}", "--split", "dev", "--out", "{tmp}/e"], 2, ["'dev'"]),
        (
            ["stress", "{bundle}", "--manifest", "{m}", "--out", "{tmp}/e", "--outside", "{tmp}/absent"],
            4,
            ["{tmp}/absent"],
        ),
        (["predict", "{tmp}", "car.jpg"], 3, ["holds no bundle.json"]),
        (["report", "{tmp}/absent", "--out", "{tmp}/r.html"], 2, ["{tmp}/absent holds no Parquet file"]),
        (["report", "{tmp}/absent", "--out", "{tmp}/r.html", "--thumbnails", "9999"], 2, ["thumbnails is 9999", "400"]),
        (["classify", "{bundle}", "{images}", "--out", "{tmp}/o", "--split", "dev"], 2, ["'dev'"]),
        (["classify", "{bundle}", "{images}", "--out", "{tmp}/o", "--set", "runtime=int4"], 2, ["'int4'"]),
        (["query", "{tmp}"], 2, ["{tmp}"]),
        (["doctor", "--cluster"], 2, ["RAY_ADDRESS names no cluster"]),
        (["doctor", "gs://bucket/x"], 2, ["'gs'", "s3://"]),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    run,
    arguments: list[str],
    expected_code: int,
    words: list[str],
    small_bundle: str,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "text.parquet").write_text("not a table")
    (tmp_path / "bad.yaml").write_text("search: [")
    build_manifest(str(image_folder), out=str(tmp_path / "manifest.parquet"))
    places = {
        "tmp": tmp_path,
        "images": image_folder,
        "text": tmp_path / "text.parquet",
        "bad_yaml": tmp_path / "bad.yaml",
        "m": tmp_path / "manifest.parquet",
        "bundle": small_bundle,
    }
    code, _, err = run(*(argument.format(**places) for argument in arguments))
    sentences = [line for line in err.splitlines() if line.startswith("carray: ")]
    assert code == expected_code, err
    assert "Traceback" not in err
    assert len(sentences) == 1
    for word in words:
        assert word.format(**places) in sentences[0]


def test_a_bug_of_ours_is_not_dressed_up_as_the_users_mistake(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carray.search.run_folder.read_trials", lambda run: 1 / 0)
    code, out, err = run("leaderboard", "anything")
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("carray: unexpected ZeroDivisionError: division by zero; ")


def test_manifest_without_a_column_names_it(run, tmp_path: Path, image_folder: Path) -> None:
    place = str(tmp_path / "m.parquet")
    build_manifest(str(image_folder), out=place)
    pd.read_parquet(place).drop(columns=["sha256"]).to_parquet(place)
    code, _, err = run("tune", "--manifest", place, "--out", tmp_path / "run")
    assert code == 2
    assert "lacks the column sha256" in err


def test_manifest_with_the_same_uri_and_box_twice_is_refused(run, tmp_path: Path, image_folder: Path) -> None:
    place = str(tmp_path / "m.parquet")
    build_manifest(str(image_folder), out=place)
    manifest = read_manifest(place)
    twice = pd.concat([manifest.rows, manifest.rows.head(1)], ignore_index=True)
    write_manifest(twice, place, classes=manifest.classes, crop_boxes=False)
    code, _, err = run("tune", "--manifest", place, "--out", tmp_path / "run")
    assert code == 2
    assert "the same uri and box more than once (1 repetitions" in err


def test_a_class_with_a_slash_goes_through_prepare_and_table(run, tmp_path: Path, make_image) -> None:
    label = "Ram C/V Cargo Van Minivan 2012"
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(make_image(i))
    pd.DataFrame({"uri": [f"{i}.jpg" for i in range(4)], "label": [label] * 3 + ["one image only"]}).to_csv(
        tmp_path / "table.csv", index=False
    )
    code, out, _ = run("prepare", tmp_path / "table.csv", "--out", tmp_path / "m.parquet")
    manifest = read_manifest(str(tmp_path / "m.parquet"))
    assert code == 0
    assert label in manifest.classes
    assert list(manifest.rows[manifest.rows["label"] == "one image only"]["split"]) == ["train"]
    assert "4 rows" in out


def test_help_is_light() -> None:
    code = (
        "import sys, carray.__main__;"
        "heavy = ('torch', 'timm', 'ray', 'pandas', 'pyarrow', 'numpy', 'onnxruntime', 'cv2', 'scipy', 'matplotlib');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_an_interrupted_training_is_one_sentence_and_the_same_command_goes_on(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    draw_dataset(tmp_path / "images", images_per_class=6)
    build_manifest(str(tmp_path / "images"), out=str(tmp_path / "m.parquet"))
    small = ["hyper={family: cnn, input_size: 24, stages: 1, width: 4}", "pixels={decode_size: 24, input_size: 24}"]
    settings = [text for setting in small for text in ("--set", setting)]
    command = ["train", "--manifest", str(tmp_path / "m.parquet"), "--out", str(tmp_path / "run"), *settings]
    command += ["--epochs", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "carray", *command], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=dict(os.environ)
    )
    assert process.stderr is not None
    said = [next(line for line in process.stderr if "epoch 2/40" in line)]
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130, said
    assert said[-2].startswith("carray: stopped by Ctrl-C")
    assert said[-1].startswith("carray: to resume from the last whole epoch, run the same command again")
    assert "Traceback" not in "".join(said)
    logged = len(list((tmp_path / "run" / "log").iterdir()))
    assert logged < 40
    code, out, err = run(*command)
    assert code == 0, err
    assert f"epoch {logged + 1}/40" in err
    assert f"epoch {logged - 1}/40" not in err
    result = json.loads(out.splitlines()[-1])
    assert result["epochs"] == 40
    assert Path(result["bundle"], "bundle.json").exists()


def test_leaderboard_prints_every_trial_and_writes_the_page(run, tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", trials=8)
    code, out, err = run("leaderboard", place, "--no-page")
    assert code == 0
    assert all(f"t{number:05d}" in out for number in range(8))
    assert not Path(place, "leaderboard.html").exists()
    code, _, err = run("leaderboard", place)
    assert code == 0
    assert str(Path(place, "leaderboard.html")) in err
    assert "t00007" in Path(place, "leaderboard.html").read_text()


@pytest.mark.parametrize("job", ["tune", "classify"])
def test_jobs_take_the_commands_arguments(job: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert f"carray {job}" in done.stdout
    assert "--out" in done.stdout


def test_prepare_says_how_it_read_the_folders_before_the_report(run, tmp_path: Path, make_image) -> None:
    for number in range(12):
        path = tmp_path / "in" / ("Train" if number < 8 else "Test") / f"Audi/A{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number))
    code, out, _ = run("prepare", tmp_path / "in", "--out", tmp_path / "m.parquet", "--label-from", "-1")
    assert code == 0
    assert out.index("splits       train 8, test 4") < out.index("classes      2: A0 6, A1 6") < out.index("readable")
    code, out, _ = run("prepare", tmp_path / "in", "--out", tmp_path / "n.parquet", "--layout", "images")
    assert "no readable image has a label" in out
