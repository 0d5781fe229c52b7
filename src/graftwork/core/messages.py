"""Output of commands: results on stdout, messages on stderr."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from graftwork.core.files import to_json
from graftwork.core.processes import is_main_process

# C0 without tab and line feed, DEL, C1, and half surrogate pairs
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def say(text: str) -> None:
    """Print one line on stderr from the main process."""
    if is_main_process():
        print(printable(text), file=sys.stderr, flush=True)


def show(value: Any, *, as_json: bool) -> None:
    """Print a result from the main process: as JSON, as a table if it is a list of records, or line by line."""
    if not is_main_process():
        return
    if as_json:
        print(json_text(value, indent=2))
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[str, object], value).items():
            print(printable(f"{key}: {item}"))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = cast(Sequence[Any], value)
        if items and isinstance(items[0], Mapping):
            table(items)
        else:
            print(*(printable(str(item)) for item in items), sep="\n", end="\n" if items else "")
    else:
        print(printable(str(value)))


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table that fits the terminal, or tab-separated if stdout is not a terminal."""
    header = list(rows[0])
    if not sys.stdout.isatty():
        print("\t".join(map(_cell, header)))
        for row in rows:
            print("\t".join(_cell(row[name]) for name in header))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text objects are not parsed as markup, which titles and predictions may contain
    grid = Table(box=None, header_style="bold")
    for name in header:
        grid.add_column(Text(_cell(name)))
    for row in rows:
        grid.add_row(*(Text(_cell(row[name])) for name in header))
    Console().print(grid)


def printable(text: str) -> str:
    r"""Escape control codes, such as those that move the cursor; line feeds and tabs are kept.

    Example:
        >>> printable("a" + chr(127))
        'a\x7f'
    """
    return _CONTROL.sub(_escaped, text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Convert a value to JSON that is valid in the encoding of stdout and contains no control codes."""
    text = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", to_json(value, indent=indent))
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        # json.loads of the text is lossless; only its characters outside ASCII are escaped
        return json.dumps(json.loads(text), indent=indent)
    return text


def _escaped(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


def _cell(value: object) -> str:
    """Text of one cell, in one line and without tabs."""
    return printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")


def aligned(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give all records the same keys; a value that a record lacks is shown as a dash."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key, "–") for key in columns} for record in records]
