"""Reads settings: a YAML file, then `--set key=value`, checked by pydantic with every problem said at once.

From: a YAML file (local or S3) and dotted overrides. To: a frozen pydantic model.
Invariants: an unknown key is an error with a did-you-mean; no problem hides another.
"""

from __future__ import annotations

import copy
import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from carray.core.errors import SettingsError, StorageError
from carray.core.limits import MOST_SEED

__all__ = [
    "Place",
    "Seed",
    "Settings",
    "absolute_value",
    "dump_yaml",
    "load_settings",
    "parse_settings",
    "read_record",
    "read_yaml",
]


def absolute_value(text: str) -> str:
    """Make a setting's path absolute: where the work is done, the current folder is another.

    Raises:
        ValueError: it is no path, which pydantic collects with its other problems.
    """
    from carray.core.store.files import absolute

    try:
        return absolute(text)
    except SettingsError as err:
        raise ValueError(str(err).rstrip(".")) from None


Place = Annotated[str, AfterValidator(absolute_value)]
"""A setting that is a path or an s3:// URI."""
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class Settings(BaseModel):
    """The base of every settings model: frozen, strict about unknown keys, and without infinite or NaN numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    model: type[AnySettings],
    *,
    config: str | None = None,
    overrides: Iterable[str] = (),
    start: Mapping[str, Any] | None = None,
) -> AnySettings:
    """Build `model` from a YAML file, or the values of `start`, and `key.sub=value` overrides, which win.

    Raises:
        SettingsError: the file is not a YAML mapping, an override has no `=` or repeats another's key, or any value is
            refused by the model.
        StorageError: the file cannot be read.
    """
    values = read_yaml(config) if config else copy.deepcopy(dict(start or {}))
    seen: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise SettingsError(f"--set {override!r} is not key=value; write for example --set search.trials=8.")
        if key in seen:
            raise SettingsError(
                f"{key} is set twice, by {_short(seen[key])} and {_short(override)} (an option may be short for it); "
                "keep one of them."
            )
        seen[key] = override
        _assign(values, key.split("."), _parse_scalar(override, text), defaults=_defaults(model))
    return parse_settings(model, values)


def parse_settings(model: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Check a mapping against a settings model.

    Raises:
        SettingsError: one sentence for each unknown key and each refused value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as err:
        raise SettingsError([_sentence(model, problem) for problem in err.errors()]) from None


def read_record(model: type[AnySettings], uri: str, *, found: Any = None) -> AnySettings:
    """Read one of our own records: a JSON document that a command wrote, and nobody edits; `found` was read before.

    Raises:
        StorageError: it does not exist, cannot be read, or is not such a record.
    """
    from carray.core.store.files import read_json

    try:
        return model.model_validate(read_json(uri) if found is None else found)
    except ValidationError as err:
        problem = _sentence(model, err.errors()[0]).rstrip(".")
        raise StorageError(f"{uri} is damaged, or of another program ({problem}); move it away.") from None


def dump_yaml(settings: BaseModel) -> str:
    """Write settings as YAML text, in the order of their definition."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def read_yaml(config: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing.

    Raises:
        SettingsError: it is not YAML, repeats a key, or holds something else.
        StorageError: the file cannot be read.
    """
    from carray.core.store.files import read_bytes

    repeated: list[str] = []
    try:
        values = _load(read_bytes(config), repeated)
    except _NOT_YAML as err:
        raise SettingsError(f"{config} is not valid YAML ({_one_line(err)}); mend the file.") from None
    if repeated:
        raise SettingsError([f"{config}: {problem}" for problem in repeated])
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{config} holds a {type(values).__name__}; settings must be a mapping of key: value.")
    return values


def _parse_scalar(override: str, text: str) -> Any:
    repeated: list[str] = []
    try:
        value = _load(text, repeated)
    except _NOT_YAML as err:
        raise SettingsError(f"--set {_short(override)} has a value that is not YAML ({_one_line(err)}).") from None
    if repeated:
        raise SettingsError([f"--set {_short(override)}: {problem}" for problem in repeated])
    return value


_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""PyYAML has an error of its own for bad syntax only: a date of month 13, or a tag with nonsense, raises others."""
_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 10_000
"""What a file may come to with its aliases written out; a few lines of them can stand for a billion values."""


def _load(text: bytes | str, repeated: list[str]) -> Any:
    """Read YAML, and note in `repeated` each key that stands twice, of which YAML's reader would keep the last."""
    loader = yaml.SafeLoader(text)
    try:
        tree = loader.get_single_node()
        if tree is None:
            return None
        if _node_count(tree, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
        repeated += dict.fromkeys(_repeated_keys(loader, tree, ""))
        return loader.construct_document(tree)
    finally:
        loader.dispose()


def _repeated_keys(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _repeated_keys(loader, item, f"{where}{i}.")
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, yaml.Node] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            # Compared as they will be held: yes and true are one key.
            held = key.value if key.tag == _MERGE else loader.construct_object(key)
            before = first.setdefault(held, key)
            if before is not key:
                lines = f"lines {before.start_mark.line + 1} and {key.start_mark.line + 1}"
                yield f"{where}{key.value} stands twice ({lines}), and only one of the two would count; merge them."
            yield from _repeated_keys(loader, value, f"{where}{key.value}.")


def _node_count(node: yaml.Node, known: dict[int, float]) -> float:
    """Count a tree's nodes with each alias written out; what holds itself is endless."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inside: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_node_count(part, known) for part in parts)
    return known[id(node)]


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    fields = model.model_fields.values()
    return {} if any(field.is_required() for field in fields) else model().model_dump(mode="json")


def _assign(values: dict[str, Any], path: list[str], value: Any, *, defaults: Any) -> None:
    """Set one dotted key; where the file says nothing of its parents, their other defaults stay as they are."""
    for name in path[:-1]:
        defaults = defaults.get(name, {}) if isinstance(defaults, dict) else {}
        values = values.setdefault(name, defaults)
        if not isinstance(values, dict):
            raise SettingsError(f"--set {'.'.join(path)}: {name} is a single value, so nothing can stand below it.")
    values[path[-1]] = value


def _sentence(model: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where, known_keys(model), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(known_keys(model))}."
        return f"{where} is not a setting; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default, so give it a value."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where} is {_short(problem['input'])}: {message[:1].lower()}{message[1:]}."


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List every dotted key that a settings model takes."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())


def _short(value: Any) -> str:
    """Show a value as Python writes it, cut where it is long or deep: it may be anything at all."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 200
    return shown.repr(value)
