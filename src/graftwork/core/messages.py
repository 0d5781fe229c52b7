"""Output of commands: results on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from graftwork.core.processes import is_main_process


def say(text: str) -> None:
    """Print one line on stderr from the main process."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def show(value: Any, *, as_json: bool) -> None:
    """Print a result from the main process: as JSON, as a table if it is a list of records, or line by line."""
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=2))
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[str, object], value).items():
            print(f"{key}: {item}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = cast(Sequence[Any], value)
        if items and isinstance(items[0], Mapping):
            table(items)
        else:
            print(*items, sep="\n", end="\n" if items else "")
    else:
        print(value)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table that fits the terminal, or tab-separated if stdout is not a terminal."""
    header = list(rows[0])
    if not sys.stdout.isatty():
        print("\t".join(header))
        for row in rows:
            print("\t".join(str(row[name]) for name in header))
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, box=None, header_style="bold")
    for row in rows:
        grid.add_row(*(str(row[name]) for name in header))
    Console().print(grid)


def aligned(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give all records the same keys; a value that a record lacks is shown as a dash."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key, "–") for key in columns} for record in records]
