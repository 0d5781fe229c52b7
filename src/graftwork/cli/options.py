"""Command-line options and Markdown tables from configuration dataclasses; help texts are the field docstrings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

import typer

from graftwork.core.config import field_docs, field_types, parse_value


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Settings of a verb whose method is not known yet."""


def with_options(
    function: Callable[..., None],
    cls: type,
    *,
    skip: Sequence[str] = (),
    panel: str = "Settings",
    receiver: str = "settings",
) -> Callable[..., None]:
    """Add one option for every field of a configuration to a command.

    Args:
        function: The command. It receives the given options as `receiver`, field name to plain value; omitted options
            are absent.
        cls: The configuration.
        skip: Fields that have no option.
        panel: Heading of the options in the help.
        receiver: Parameter of the command that receives the options.

    Returns:
        A function with the signature that Typer reads.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != receiver]
    names = [field.name for field in dataclasses.fields(cls) if field.name not in skip]
    types = field_types(cls)
    boolean = {field.name for field in dataclasses.fields(cls) if types[field.name] in ("bool", "bool | None")}
    docs = field_docs(cls)
    added: list[inspect.Parameter] = []
    for name in names:
        flag = "--" + name.replace("_", "-")
        if name in boolean:
            option = typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=docs.get(name), rich_help_panel=panel)
            annotation: Any = Annotated[bool | None, option]
        elif types[name].startswith("tuple[str, ...]"):
            # repeated or separated by commas
            option = typer.Option(flag, help=docs.get(name), metavar="TEXT", rich_help_panel=panel)
            annotation = Annotated[list[str] | None, option]
        else:
            metavar = field_types(cls)[name].replace(" | None", "")
            option = typer.Option(flag, help=docs.get(name), metavar=_metavar(metavar), rich_help_panel=panel)
            annotation = Annotated[str | None, option]
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def command(**given: Any) -> None:
        settings = {name: _value(cls, name, given.pop(name)) for name in names if given.get(name) is not None}
        for name in names:
            given.pop(name, None)
        function(**given, **{receiver: settings})

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([*keyword, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*keyword, *added]}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def with_columns(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that map the columns of own data to a command.

    Args:
        function: The command. It receives the given options as `fields`.
    """
    from graftwork.settings.fields import DataFields

    skip = ("as_chat", "chat_template")
    return with_options(function, DataFields, skip=skip, panel="Columns of own data", receiver="fields")


def _metavar(type_text: str) -> str:
    return "VALUE" if "Mapping" in type_text or "Literal" in type_text or "Selection" in type_text else type_text


def _value(cls: type, name: str, given: Any) -> Any:
    if isinstance(given, bool):
        return given
    text = field_types(cls)[name]
    if isinstance(given, list):
        words = [word for word in cast("list[str]", given) if word.startswith("[") or word]
        return [part for word in words for part in (parse_value(word, word) if word[:1] == "[" else word.split(","))]
    if text.startswith("tuple") and not given.startswith("["):
        return [parse_value(part, given) for part in given.split(",")]
    if text in ("str", "str | None"):
        return None if given == "null" else given
    return parse_value(given, f"--{name.replace('_', '-')} {given}")


def settings_table(cls: type) -> list[Mapping[str, str]]:
    """Return every field of a configuration with its type, default and docstring."""
    docs, types = field_docs(cls), field_types(cls)
    rows: list[Mapping[str, str]] = []
    for entry in dataclasses.fields(cls):
        if entry.default is not dataclasses.MISSING:
            default = "null" if entry.default is None else str(entry.default)
        elif entry.default_factory is not dataclasses.MISSING:
            default = str(entry.default_factory())
        else:
            default = "required"
        rows.append(
            {"name": entry.name, "type": types[entry.name], "default": default, "help": docs.get(entry.name, "")}
        )
    return rows


def settings_markdown(cls: type) -> str:
    """Return `settings_table` in Markdown, for method cards."""
    lines = ["| setting | type | default | what it does |", "|---|---|---|---|"]
    for row in settings_table(cls):
        cells = (f"`{row['name']}`", f"`{row['type']}`", f"`{row['default']}`", row["help"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def families_markdown(names: Sequence[str]) -> str:
    """Return the supported families of a method and their layouts in Markdown, for method cards."""
    from graftwork.surgery.families import FAMILIES

    lines = ["| family | attention | feed-forward |", "|---|---|---|"]
    for name in sorted(names):
        lines.append(f"| `{name}` | yes | {_feed_forward(FAMILIES[name])} |")
    return "\n".join(lines) + "\n"


def _feed_forward(family: Any) -> str:
    kinds = ["gated" if layout.up is not None else "plain" for layout in family.feed_forward]
    return ", ".join(dict.fromkeys(kinds)) or "no"


def methods_markdown() -> str:
    """Return the README table of methods in Markdown."""
    from graftwork.methods import NAMES, about

    lines = ["| name | effect | paper | card |", "|---|---|---|---|"]
    for name in NAMES:
        found = about(name)
        paper = found.paper.identifier
        arxiv = paper.removeprefix("arXiv:")
        link = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv != paper else paper
        card = f"src/graftwork/methods/{name}/README.md"
        lines.append(f"| `{name}` | {found.summary or found.title} | {link} | [card]({card}) |")
    return "\n".join(lines) + "\n"
