"""Reads settings: a YAML file, then `--set key=value`, checked by pydantic; all problems are reported at once."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from carray.core.errors import SettingsError, StorageError
from carray.core.limits import MOST_SEED
from carray.core.text import did_you_mean, one_line

__all__ = [
    "PathOrUri",
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
    """Make a setting's path absolute, as workers run in other folders.

    Raises:
        ValueError: it is no path; pydantic collects this with its other problems.
    """
    from carray.core.store.files import absolute

    try:
        return absolute(text)
    except SettingsError as err:
        raise ValueError(str(err).rstrip(".")) from None


PathOrUri = Annotated[str, AfterValidator(absolute_value)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class Settings(BaseModel):
    """Base of every settings model: frozen, without unknown keys, infinite or NaN numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    model: type[AnySettings],
    *,
    config: str | None = None,
    overrides: Iterable[str] = (),
    start: Mapping[str, Any] | None = None,
) -> AnySettings:
    """Build `model` from a YAML file, or from `start`, and `key.sub=value` overrides, which take precedence.

    Raises:
        SettingsError: the file is not a YAML mapping, an override has no `=` or repeats a key, or the model refuses a
            value.
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
        _assign(values, key.split("."), _load(text, f"--set {_short(override)}"), defaults=_defaults(model))
    return parse_settings(model, values)


def parse_settings(model: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Check a mapping against a settings model.

    Raises:
        SettingsError: one sentence for each unknown key and each refused value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as err:
        # A default that depends on a refused value is no second problem.
        problems = [problem for problem in err.errors() if problem["type"] != "default_factory_not_called"]
        raise SettingsError([_sentence(model, problem) for problem in problems]) from None


def read_record(model: type[AnySettings], uri: str, *, found: Any = None) -> AnySettings:
    """Read a JSON document that a command wrote; `found` is its content, if it was read before.

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

    values = _load(read_bytes(config), config)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{config} holds a {type(values).__name__}; settings must be a mapping of key: value.")
    return values


_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""PyYAML raises its own error on bad syntax only: a date of month 13, or a wrong tag, raises others."""
_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 10_000
"""The most values of a file with its aliases expanded, since a few lines of aliases can make a billion."""


def _load(text: bytes | str, where: str) -> Any:
    """Parse YAML text from `where`; refuse repeated keys, of which PyYAML would keep the last."""
    repeated: list[str] = []
    try:
        loader = yaml.SafeLoader(text)
        try:
            tree = loader.get_single_node()
            if tree is None:
                return None
            if _node_count(tree, {}) > _MOST_NODES:
                raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
            repeated += dict.fromkeys(_repeated_keys(loader, tree, ""))
            value = loader.construct_document(tree)
        finally:
            loader.dispose()
    except _NOT_YAML as err:
        raise SettingsError(f"{where} is not valid YAML ({one_line(err)}); correct it.") from None
    if repeated:
        raise SettingsError([f"{where}: {problem}" for problem in repeated])
    return value


def _repeated_keys(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Iterator[str]:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _repeated_keys(loader, item, f"{where}{i}.")
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, yaml.Node] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            # By value: yes and true are one key.
            name = key.value if key.tag == _MERGE else loader.construct_object(key)
            before = first.setdefault(name, key)
            if before is not key:
                lines = f"lines {before.start_mark.line + 1} and {key.start_mark.line + 1}"
                yield f"{where}{key.value} is given twice ({lines}), and only one of the two would count; merge them."
            yield from _repeated_keys(loader, value, f"{where}{key.value}.")


def _node_count(node: yaml.Node, known: dict[int, float]) -> float:
    """Count a tree's nodes with aliases expanded; infinite where a node contains itself."""
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
    """Set one dotted key; parents that the file does not mention keep their other defaults."""
    for name in path[:-1]:
        defaults = defaults.get(name, {}) if isinstance(defaults, dict) else {}
        values = values.setdefault(name, defaults)
        if not isinstance(values, dict):
            raise SettingsError(f"--set {'.'.join(path)}: {name} is a single value, so it has no keys below it.")
    values[path[-1]] = value


def _sentence(model: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        known = known_keys(model)
        hint = did_you_mean(where, known, f"allowed are {', '.join(known)}.", cutoff=0.5)
        return f"{where} is not a setting; {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default, so give it a value."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where} is {_short(problem['input'])}: {message[:1].lower()}{message[1:]}."


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List every dotted key of a settings model."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _short(value: Any) -> str:
    """Format a value as Python does, shortened where it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value)
