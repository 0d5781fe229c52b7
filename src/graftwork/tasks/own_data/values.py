"""Values of a row: nested fields, texts, answers, options and chat messages, each checked for its type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

from graftwork.core.readers import shorten, text_problem
from graftwork.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Turn = tuple[str, str]
"""Role and text of one message."""
ROLES: Mapping[str, str] = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function"), "tool"),
}
"""Role in chat templates by the names of OpenAI messages and of ShareGPT."""


def field(row: Mapping[str, Any], name: str, where: str, setting: str | None = None) -> Any:
    """Return the value of a field; dots in the name lead into nested objects and through lists of objects.

    Args:
        row: The row.
        name: Name of the field, such as "question" or "data.question".
        where: File and place of the row.
        setting: Setting that names the field, for the error.

    Raises:
        DataError: If there is no such field; the message lists the fields that exist, with a suggestion.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in cast("list[Any]", value)):
            value = [item.get(part) for item in cast("list[Mapping[str, Any]]", value)]
        elif isinstance(value, Mapping) and part in value:
            value = cast("Mapping[str, Any]", value)[part]
        else:
            raise DataError(f"{where}: {missing(name, row, setting)}")
    return value


def as_object(value: Any) -> Mapping[str, Any]:
    """Return a JSON object itself, and an empty one for any other value."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def missing(name: str, columns: Sequence[str] | Mapping[str, Any], setting: str | None = None) -> str:
    """Return the message for a field that does not exist: found, expected, suggestion."""
    names = [str(column) for column in columns]
    close = get_close_matches(name, names, n=1)
    source = "" if setting is None else f", named by {setting}"
    hint = f" Did you mean {close[0]!r}?" if close else " Name one of these, or fix the row."
    return f"found the columns {listed(names)}; expected {name!r}{source}.{hint}"


def listed(names: Iterable[str], length: int = 200) -> str:
    """Return names as one printable text of limited length."""
    joined = ", ".join(name if name.isprintable() and name else ascii(name) for name in names) or "none"
    return joined if len(joined) <= length else f"{joined[: length - 3]}..."


def text(value: Any, name: str, where: str, *, numbers: bool = False) -> str:
    """Return a value that must be a text.

    Args:
        value: The value.
        name: Name of its field.
        where: File and place of the row.
        numbers: Accept numbers and truth values too, as they are written in JSON.

    Raises:
        DataError: If the value is of another type, or contains characters that no tokenizer can encode.
    """
    if isinstance(value, str):
        problem = text_problem(value, name)
        if problem:
            raise DataError(f"{where}: found {problem}; expected UTF-8 text. Fix or remove the row.")
        return value
    if numbers and isinstance(value, bool):
        return "true" if value else "false"
    if numbers and isinstance(value, int | float) and value == value:
        return str(value)
    raise DataError(f"{where}: found {shorten(value)} as field {name!r}; expected a text. Fix or remove the row.")


def texts(value: Any, name: str, where: str) -> list[str]:
    """Return accepted answers: a text, a list of texts, SQuAD's `{"text": […]}`, or a list of objects with `text`.

    Raises:
        DataError: If the value is anything else.
    """
    holder = as_object(value)
    value = holder["text"] if isinstance(holder.get("text"), list) else value
    if not isinstance(value, list):
        return [text(value, name, where, numbers=True)]
    found: list[str] = []
    for index, item in enumerate(cast("list[Any]", value)):
        inner: Any = as_object(item).get("text", item)
        found.append(text(inner, f"{name}[{index}]", where, numbers=True))
    return found


def options(value: Any, name: str, where: str) -> list[tuple[str, str]]:
    """Return the options of a question as pairs of key and text; without keys, they are letters.

    Raises:
        DataError: If the value is neither a list of texts, a list of objects with `label` and `text`, nor an object
            with the lists `label` and `text`; or if there are fewer than 2 options.
    """
    keys: Any = None
    holder = as_object(value)
    if isinstance(holder.get("text"), list):
        keys, value = holder.get("label"), holder["text"]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in cast("list[Any]", value)):
        items = cast("list[Mapping[str, Any]]", value)
        keys, value = [item.get("label") for item in items], [item.get("text") for item in items]
    if not isinstance(value, list) or not 2 <= len(cast("list[Any]", value)) <= len(LETTERS):
        raise DataError(
            f"{where}: found {shorten(value)} as field {name!r}; expected a list of 2 to {len(LETTERS)} options. Fix "
            "or remove the row."
        )
    found = texts(value, name, where)
    names = texts(keys, f"{name}.label", where) if isinstance(keys, list) else list(LETTERS[: len(found)])
    if len(names) != len(found) or len(set(names)) != len(names):
        raise DataError(f"{where}: found the labels {shorten(names)} in {name!r}; expected one for each option.")
    return list(zip(names, found, strict=True))


def chosen(value: Any, choices: Sequence[tuple[str, str]], name: str, where: str) -> str:
    """Return the text of the right option, given as text, as key ("A"), or as position from 0.

    Raises:
        DataError: If the value is none of the options.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(choices):
            return choices[value][1]
        raise DataError(
            f"{where}: found {value} as field {name!r}; expected a position from 0 to {len(choices) - 1}. Fix the row."
        )
    word = text(value, name, where)
    found = next((option for _, option in choices if option == word), None)
    found = found if found is not None else next((option for key, option in choices if key == word.strip()), None)
    if found is None:
        raise DataError(
            f"{where}: found {shorten(word)} as field {name!r}; expected one of the options "
            f"{shorten([option for _, option in choices], 120)}, or one of {', '.join(key for key, _ in choices)}."
        )
    return found


def conversation(value: Any, name: str, where: str) -> list[Turn]:
    """Return the turns of a conversation as (role, text): OpenAI's role and content, or ShareGPT's from and value.

    Raises:
        DataError: If the value is no list of messages, a role is unknown, or a message has no text.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: found {shorten(value)} as field {name!r}; expected a list of messages.")
    turns: list[Turn] = []
    for index, item in enumerate(cast("list[Any]", value)):
        place = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: found {shorten(item)} as {place}; expected an object with role and content.")
        message = cast("Mapping[str, Any]", item)
        speaker, content = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
        role = text(field(message, speaker, f"{where}, {place}"), f"{place}.{speaker}", where)
        if role not in ROLES:
            raise DataError(
                f"{where}: found the role {shorten(role)} in {place}; expected one of: {', '.join(ROLES)}. Rename it."
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: found tool calls in {place}; expected text only. Remove the row.")
        turns.append((ROLES[role], _content(field(message, content, f"{where}, {place}"), f"{place}.{content}", where)))
    return turns


def _content(value: Any, name: str, where: str) -> str:
    """Text of a message; a list of parts is joined, and parts other than text are refused."""
    if not isinstance(value, list):
        return text(value, name, where)
    pieces: list[str] = []
    for index, part in enumerate(cast("list[Any]", value)):
        if not isinstance(as_object(part).get("text"), str):
            raise DataError(
                f"{where}: found {shorten(part)} as {name}[{index}]; expected a part of type text. Remove the row; "
                "images and sound are not supported."
            )
        pieces.append(text(as_object(part)["text"], f"{name}[{index}].text", where))
    return "".join(pieces)
