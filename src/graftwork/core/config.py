"""Load, merge, validate and save configurations. The only module that reads YAML.

Every configuration is a frozen dataclass; the attribute docstrings of its fields are the texts of `--help`, of the
method cards and of `graftwork show`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml

from graftwork.core.readers import read_text, text_problem
from graftwork.errors import ConfigError

C = TypeVar("C")


def build(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build a configuration from plain values, validating every key and type.

    Args:
        cls: A frozen dataclass.
        values: Field name → plain value, as parsed from YAML.
        where: Origin of the values, for error messages ("method in recipe.yaml").

    Raises:
        ConfigError: If a key does not exist (with a suggestion) or a value has the wrong type.
    """
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not _is_mapping(values):
        raise ConfigError(f"{where} is {_short(values)}. Expected keys and values: {', '.join(fields)}.")
    for key in values:
        if key not in fields:
            close = get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown key {key!r} in {where}.{hint} Available: {', '.join(fields)}.")
    hints = _hints(cls)
    checked = {key: _check(cls, key, hints[key], value, where) for key, value in values.items()}
    if missing := [name for name in required(cls) if name not in checked]:
        raise ConfigError(f"Missing {', '.join(missing)} in {where}. These have no default; give them a value.")
    try:
        return cls(**checked)
    except ConfigError as error:
        # checks between several settings do not know the file
        known = where in str(error) or not where.endswith((".yaml", ".yml", ".json"))
        raise error if known else ConfigError(f"{where}: {error}") from None


def _check(cls: type, key: str, hint: Any, value: Any, where: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    parts = [part for part in get_args(hint) or (hint,) if part not in (type(None), Ellipsis)]
    config = next((part for part in parts if dataclasses.is_dataclass(part)), None)
    if isinstance(config, type) and value is not None:
        items = value if _is_sequence(value) else [value]
        if not all(_is_mapping(item) for item in items):
            raise ConfigError(
                f"{key} in {where} is {_short(value)}. Expected keys and values: {', '.join(_hints(config))}."
            )
        built = tuple(build(config, item, f"{key} of {where}") for item in items)
        return built if get_origin(hint) is tuple else built[0]
    try:
        # strict: the string "12" is not a number, and true is not 1
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(_frozen(value))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{key} in {where} is {_short(value)}. Expected {field_types(cls)[key].replace('None', 'null')}: "
            f"{first['msg'][0].lower()}{first['msg'][1:]}."
        ) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def required(cls: type) -> list[str]:
    """Names of the fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ConfigError: If the file does not exist, is not YAML (the message names the line) or holds no mapping.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Give the path of a YAML file.")
    try:
        content = _parse(read_text(path, error=ConfigError))
    except _YamlError as problem:
        line = "" if problem.line is None else f", line {problem.line}"
        raise ConfigError(f"{path}{line}: not readable as YAML: {problem}. Fix the file.") from None
    if content is None:
        return {}
    if not _is_mapping(content):
        raise ConfigError(f"{path} holds a {type(content).__name__}. Expected keys and values.")
    return dict(content)


class _YamlError(ValueError):
    """YAML that cannot be used, with the line of the fault if it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class _Loader(yaml.SafeLoader):
    """Loader that keeps dates as text: no setting is a date, and a name such as 2024-05-01 is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_MOST_VALUES = 100_000
"""Values of a YAML file, aliases expanded; more than this is an expansion attack or a wrong file."""


def _parse(text: str) -> Any:
    """Parse YAML.

    Raises:
        _YamlError: If the text is not YAML, or contains aliases of their own parents, dates, or unusable text.
    """
    try:
        # a subclass of SafeLoader; constructs plain values only
        value = yaml.load(text, Loader=_Loader)
        _check_values(value)
    except _YamlError:
        raise
    except RecursionError:
        raise _YamlError("values are nested too deeply") from None
    except Exception as error:
        # besides YAMLError, tags such as !!int and !!bool raise whatever the conversion of their text raises
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        reason = "a number has too many digits" if "integer string conversion" in reason else reason
        raise _YamlError(ascii(str(reason))[1:-1], None if mark is None else mark.line + 1) from None
    return value


def _check_values(value: Any) -> None:
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", value, ())]
    count = 0
    while waiting:
        name, item, parents = waiting.pop()
        count += 1
        if id(item) in parents:
            raise _YamlError(f"{name or 'the document'} is an alias of a value that contains it")
        if count > _MOST_VALUES:
            raise _YamlError(f"more than {_MOST_VALUES} values")
        inside = (*parents, id(item))
        if _is_mapping(item):
            # YAML allows keys of any type
            for key, inner in cast("Mapping[Any, Any]", item).items():
                if not isinstance(key, (str, int, float, bool, type(None))):
                    raise _YamlError(f"{name or 'the document'} has the key {_short(key)}, which is no name")
                label = f"{name}.{key}" if name else str(key)
                waiting.append((label, inner, inside))
        elif _is_sequence(item):
            waiting += [(f"{name}[{index}]", inner, inside) for index, inner in enumerate(item)]
        elif not isinstance(item, (str, int, float, bool, type(None))):
            raise _YamlError(f"{name or 'the document'} is a {type(item).__name__}; expected text, number or list")
        elif isinstance(item, str) and (problem := text_problem(item, name)):
            raise _YamlError(problem)


def write_yaml(path: Path, values: Any, header: str = "") -> None:
    """Write plain values or a configuration as YAML, atomically; `header` becomes a comment."""
    from graftwork.core.files import write_text

    write_text(path, "".join(f"# {line}\n" for line in header.splitlines()) + yaml_text(values))


def yaml_text(values: Any) -> str:
    """Convert plain values or a configuration to YAML."""
    return yaml.safe_dump(to_plain(values), sort_keys=False, allow_unicode=True, width=100)


def to_plain(value: Any) -> Any:
    """Convert a configuration to dictionaries, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if _is_mapping(value):
        return {str(key): to_plain(item) for key, item in value.items()}
    if _is_sequence(value):
        return [to_plain(item) for item in value]
    if _is_set(value):
        return sorted(to_plain(item) for item in value)
    return str(value) if isinstance(value, Path) else value


def merge(base: Mapping[str, Any], *updates: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later over earlier: mappings are merged recursively, other values replaced."""
    merged = dict(base)
    for update in updates:
        for key, value in update.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if _is_mapping(old) and _is_mapping(value) else value
    return merged


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse `section.key=value` pairs into nested mappings; values are YAML.

    Raises:
        ConfigError: If a pair has no equals sign.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"Found {assignment!r}. Expected section.key=value, such as train.learning_rate=1e-4.")
        values = merge(values, nest(key.strip(), parse_value(text, assignment)))
    return values


def parse_sweep(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Parse `section.key=v1,v2` pairs into the list of values to sweep for each key.

    Raises:
        ConfigError: If a pair has no equals sign or no value.
    """
    over: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        if not equals or not listed.strip():
            raise ConfigError(f"Found {text!r}. Expected section.key=v1,v2, such as method.feed_forward_k=null,256,64.")
        over[key.strip()] = [parse_value(part, text) for part in listed.split(",")]
    return over


def parse_value(text: str, where: str) -> Any:
    """Parse one YAML value; 1e-4 is a number here, although YAML 1.1 reads it as a string.

    Raises:
        ConfigError: If the text is not YAML.
    """
    try:
        value = _parse(text)
    except _YamlError as problem:
        raise ConfigError(f"The value in {where!r} is not readable as YAML ({problem}). Put it in quotes.") from None
    return _number(value)


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """Expand a dotted key: `a.b`, 1 → {"a": {"b": 1}}."""
    head, _, tail = dotted.partition(".")
    return {head: nest(tail, value) if tail else value}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Attribute docstrings of the fields of a dataclass and of its base, by field name."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if "__annotations__" not in vars(owner) or not dataclasses.is_dataclass(owner):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def field_types(cls: type) -> dict[str, str]:
    """Annotations of the fields of a dataclass, as written in the source."""
    return {field.name: str(field.type) for field in dataclasses.fields(cls)}


def _frozen(value: Any) -> Any:
    if isinstance(value, list) and _is_sequence(value):
        return tuple(_frozen(item) for item in value)
    if _is_mapping(value):
        return {key: _frozen(item) for key, item in value.items()}
    return _number(value)


def _is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_sequence(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))


def _is_set(value: Any) -> TypeGuard[set[Any] | frozenset[Any]]:
    return isinstance(value, (set, frozenset))


def _number(value: Any) -> Any:
    """Convert the strings `1e-4` and `inf`, which YAML 1.1 does not parse as numbers."""
    if value == "inf":
        return math.inf
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
