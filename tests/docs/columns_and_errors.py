"""Writes docs/columns-and-errors.md from the schemas, the settings and the error classes.

`python tests/docs/columns_and_errors.py` writes the file anew; a test compares it with what the code says. What a
column means is the comment beside it in its schema, what a setting means is the docstring below it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "columns-and-errors.md"
sys.path.insert(0, str(ROOT))

import pyarrow as pa
from pydantic import BaseModel

from carray.classify import predictions_folder
from carray.core import errors
from carray.evaluation import evaluation_folder
from carray.images.pixels import PixelSettings
from carray.manifest import manifest_file, splits
from carray.search import run_folder
from carray.search.space import FamilySettings, SearchSettings
from carray.search.train.hyperparameters import CnnHyper, TrainHyper, TransferHyper
from carray.search.train_one import TrainSettings

USUAL = {
    "uri": "the image",
    "truth": "the class that the manifest says",
    "label": "the class that the bundle says",
    "error_code": "see [error codes](#error-codes-of-images); `changed`: the bytes are not those of the manifest",
    "error": "the reason as a sentence",
    "score": "calibrated probability of label",
    "margin": "score less the runner-up's",
    "top5_labels": "the likeliest classes, at most 5",
    "top5_scores": "their calibrated probabilities",
    "images": "how many",
    "fraction": "of the images of truth",
    "fraction_of_mistakes": "share of all mistakes",
    "precision": "share of the images with this label that are of the class",
    "recall": "share of the class's images with this label",
    "f1": "harmonic mean of precision and recall",
    "accuracy": "share of these images with the right label",
    "coverage": "share of all images that is accepted",
    "mean_score": "of these images",
    "score_high": "upper end",
    "height": "likewise",
    "reason": "why there is no small picture",
    "low": "end of the interval of accuracy",
    "high": "likewise",
    "precision_low": "end of the interval",
    "precision_high": "likewise",
    "recall_low": "end of the interval",
    "recall_high": "likewise",
}
"""What columns of an evaluation's tables mean that have no comment of their own."""

HEAD = """# Columns, settings, errors

<!-- Written by `python tests/docs/columns_and_errors.py`; edit the code that it names, not this page. -->

- Tables: [manifest](#manifest), [trials.parquet](#trialsparquet), [epochs.parquet](#epochsparquet),
  [predictions](#predictions), [evaluation](#evaluation)
- Settings: [of `carray tune`](#settings-of-carray-tune), [of a configuration](#a-configuration),
  [of `carray train`](#settings-of-carray-train), [of `carray classify`](#settings-of-carray-classify)
- [Error codes of images](#error-codes-of-images), [exit codes](#exit-codes)
"""


def described_columns(module: ModuleType) -> list[tuple[str, str]]:
    """Give (column, comment) of each `("name", pa.type())` and `"name": pa.type()` of a module, in source order."""
    source = inspect.getsource(module)
    comments = dict(_comments(source))
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        pairs: Iterable[tuple[Any, Any]] = ()
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            pairs = [(node.elts[0], node.elts[1])]
        elif isinstance(node, ast.Dict):
            pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]
        for name, kind in pairs:
            called = ast.unparse(kind.func) if isinstance(kind, ast.Call) else ""
            if isinstance(name, ast.Constant) and called.startswith("pa.") and called != "pa.schema":
                said = comments.get(name.lineno) or _comment_above(lines, comments, name.lineno)
                found.append((name.lineno, name.col_offset, str(name.value), said))
    return [(name, said) for _, _, name, said in sorted(found)]


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def _comment_above(lines: list[str], comments: dict[int, str], line: int) -> str:
    """Give the comment lines that stand directly above a line, joined."""
    above = []
    while lines[line - 2].lstrip().startswith("#"):
        line -= 1
        above.insert(0, comments[line])
    return " ".join(above)


def schemas() -> Iterator[tuple[str, str, pa.Schema, list[tuple[str, str]]]]:
    """Give (heading, sentence, schema, its columns with their meanings) of each table."""
    yield (
        "### manifest",
        "One row an image, or a box of one; written by `carray prepare`. `error_code` may also be "
        f"`{splits.SET_ASIDE}`, of `--balance`.",
        manifest_file.MANIFEST_SCHEMA,
        described_columns(manifest_file),
    )
    said = described_columns(run_folder)
    trials = len(run_folder.TRIALS_SCHEMA)
    yield "### trials.parquet", "One row a trial, best first.", run_folder.TRIALS_SCHEMA, said[:trials]
    yield "### epochs.parquet", "One row a trial and epoch.", run_folder.EPOCHS_SCHEMA, said[trials:]
    optional = tuple(predictions_folder.OPTIONAL_COLUMNS)
    yield (
        "### predictions",
        "One row an image; written by `carray classify`. "
        f"The last {len(optional)} are there only where `outputs` names them.",
        predictions_folder.prediction_schema(optional),
        described_columns(predictions_folder),
    )
    said, start = [(name, text or USUAL[name]) for name, text in described_columns(evaluation_folder)], 0
    for name, schema in evaluation_folder.TABLES.items():
        yield f"#### {name}.parquet", "", schema, said[start : start + len(schema)]
        start += len(schema)


def table_of_columns(schema: pa.Schema, said: list[tuple[str, str]]) -> list[str]:
    """Write a schema as a Markdown table.

    Raises:
        ValueError: a column lacks its comment, or the source has other columns than the schema.
    """
    if [name for name, _ in said] != schema.names:
        raise ValueError(f"the source names {[name for name, _ in said]}, the schema {schema.names}")
    silent = [name for name, text in said if not text]
    if silent:
        raise ValueError(f"no comment says what {', '.join(silent)} means")
    rows = [
        f"| `{field.name}` | {_type(field.type)} | {_cell(text)} |"
        for field, (_, text) in zip(schema, said, strict=True)
    ]
    return ["| column | type | meaning |", "|---|---|---|", *rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(kind: pa.DataType) -> str:
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def table_of_settings(model: type[BaseModel], *, without: Iterable[str] = ()) -> list[str]:
    """Write a settings model as a Markdown table.

    Raises:
        ValueError: a setting lacks its docstring.
    """
    document = model.model_json_schema()
    rows = []
    defaults: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        defaults[name] = field.get_default(call_default_factory=True, validated_data=defaults)
        if name not in without:
            if not field.description:
                raise ValueError(f"no docstring says what {model.__name__}.{name} means")
            allowed = _allowed(document["properties"][name], document.get("$defs", {}))
            default = _value(defaults[name])
            meaning = re.sub(r"\bNone\b", "null", field.description)
            rows.append(f"| `{name}` | {allowed} | {default} | {_cell(meaning)} |")
    return ["| setting | allowed | default | meaning |", "|---|---|---|---|", *rows]


def _allowed(document: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Say in words what a field's JSON schema allows."""
    if "anyOf" in document:
        return " or ".join(_allowed(one, definitions) for one in document["anyOf"])
    if "enum" in document:
        return ", ".join(_value(value) for value in document["enum"])
    if "const" in document:
        return _value(document["const"])
    kind = document.get("type", "object")
    if kind == "array":
        return f"list of {_allowed(document['items'], definitions)}"
    words = {"null": "null", "boolean": "true, false", "string": "text", "object": "mapping"}
    return words.get(kind) or f"{kind}{_bounds(document)}"


def _bounds(document: dict[str, Any]) -> str:
    low, high = document.get("minimum"), document.get("maximum")
    above, below = document.get("exclusiveMinimum"), document.get("exclusiveMaximum")
    words = [
        f"{sign} {value:,g}" if isinstance(value, float) else f"{sign} {value:,}"
        for sign, value in ((">", above), ("≥", low), ("<", below), ("≤", high))
        if value is not None
    ]
    return f" {', '.join(words)}" if words else ""


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see its table"
    return f"`{json.dumps(value) if value is None or isinstance(value, bool) else value}`"


def table_of_codes() -> list[str]:
    """Write the codes of a row's `error_code`, with what to do."""
    rows = [f"| `{code}` | {entry.meaning} | {entry.remedy} |" for code, entry in errors.ERROR_CODES.items()]
    return ["| error_code | meaning | what to do |", "|---|---|---|", *rows]


def table_of_exit_codes() -> list[str]:
    """Write the exit codes of the error classes and of what no class stands for."""
    known = {
        0: ["done"],
        1: ["a bug; its traceback is printed"],
        129: ["its terminal was closed"],
        130: ["stopped by Ctrl-C"],
        137: ["the process was killed"],
        143: ["stopped by SIGTERM"],
    }
    for name in errors.__all__:
        kind = getattr(errors, name)
        if name not in ("CarrayError", "FetchError", "DecodeError", "StoppedError", "ErrorCode", "ERROR_CODES"):
            meaning = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
            known.setdefault(kind.exit_code, []).append(f"`{name}`: {meaning[0].lower()}{meaning[1:]}")
    rows = [f"| {code} | {'<br>'.join(meanings)} |" for code, meanings in sorted(known.items())]
    return ["| exit code | meaning |", "|---|---|", *rows]


def page() -> str:
    """Write the whole page."""
    lines = [HEAD, "## Tables", ""]
    for heading, sentence, schema, said in schemas():
        if heading.startswith("####") and "### evaluation" not in lines:
            lines += ["### evaluation", "", "The tables that `carray evaluate` writes. " + EVALUATION, ""]
        lines += [heading, "", *([sentence, ""] if sentence else []), *table_of_columns(schema, said), ""]
    common = tuple(TrainHyper.model_fields)
    lines += ["## Settings of carray tune", "", "`search`:", "", *table_of_settings(SearchSettings), ""]
    lines += ["`pixels`:", "", *table_of_settings(PixelSettings), ""]
    lines += ["`families.cnn` and `families.transfer`:", "", *table_of_settings(FamilySettings), ""]
    lines += ["## A configuration", "", "Of both families:", "", *table_of_settings(TrainHyper), ""]
    for model in (CnnHyper, TransferHyper):
        family = model.model_fields["family"].default
        lines += [f"Of `{family}` alone:", "", *table_of_settings(model, without=(*common, "family")), ""]
    lines += ["## Settings of carray train", "", *table_of_settings(TrainSettings), ""]
    lines += ["## Settings of carray classify", "", *table_of_settings(predictions_folder.ClassifySettings), ""]
    lines += ["## Error codes of images", "", *table_of_codes(), ""]
    lines += ["## Exit codes", "", *table_of_exit_codes(), "", EXITS, ""]
    return "\n".join(lines)


EVALUATION = (
    "Fractions lie in 0..1; `low` and `high` are\nthe ends of a 95 % interval; what could not be measured is null."
)
EXITS = (
    "`carray doctor` ends with 2 where something failed and with 4 where only storage did; `carray predict` with 2\n"
    "where no image could be scored."
)


if __name__ == "__main__":
    PAGE.write_text(page())
