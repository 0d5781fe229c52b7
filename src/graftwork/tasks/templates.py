"""Templates of users: column names in braces, filled without interpreting the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter

from graftwork.errors import ConfigError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(frozen=True, slots=True)
class Template:
    """Parsed template: literal texts and column names in turn."""

    parts: tuple[tuple[str, str | None], ...]
    """Pairs of a literal text and the column that follows it; None after the last text."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names in their order, each once."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def fill(self, value: Callable[[str], str]) -> str:
        """Return the text with each column replaced by `value(column)`; values are inserted literally."""
        return "".join(text + ("" if column is None else value(column)) for text, column in self.parts)


def parse_template(text: str, setting: str) -> Template:
    r"""Parse a template: `{column}`, `{{` and `}}` for braces, `\n`, `\t` and `\\` for control characters.

    Args:
        text: The template.
        setting: Name of the setting, for errors.

    Raises:
        ConfigError: If a brace is not paired, a column is empty or has a format, or no column is named.
    """
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"{setting} is {text!r} ({error}). Expected column names in braces; write {{{{ and }}}} for braces."
        ) from None
    parts: list[tuple[str, str | None]] = []
    for literal, column, specification, conversion in parsed:
        if column is not None and (not column.strip() or specification or conversion):
            raise ConfigError(
                f"{setting} is {text!r}, with {_shown(column, specification, conversion)}. Expected a column name in "
                "the braces, without format or conversion; write {{ and }} for braces."
            )
        parts.append((_unescaped(literal), column))
    template = Template(tuple(parts))
    if not template.columns:
        raise ConfigError(f"{setting} is {text!r}. Expected at least one column name in braces, such as {{question}}.")
    return template


def _shown(column: str, specification: str | None, conversion: str | None) -> str:
    return (
        "{" + column + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "") + "}"
    )


def _unescaped(text: str) -> str:
    pieces: Sequence[str] = text.split("\\")
    result, index = pieces[0], 1
    while index < len(pieces):
        piece = pieces[index]
        if not piece and index + 1 < len(pieces):
            # two backslashes in a row are one literal backslash
            result += "\\" + pieces[index + 1]
            index += 2
            continue
        known = _ESCAPES.get(piece[:1]) if piece else None
        result += "\\" + piece if known is None else known + piece[1:]
        index += 1
    return result
