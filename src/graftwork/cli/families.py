"""Table of model types and methods, for `graftwork list families` and the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping

from graftwork.surgery import coverage

TESTED = "tested"
_MODEL = re.compile(r"\b[A-Z]\w*(?:For[A-Z]\w*|Model|Decoder|LMHead\w*)\b")
_PLACE = re.compile(r"\b[\w.]*\.\d+\.[\w.]*")
_LAYERS = re.compile(r"layers (?:\d+(?:, )?)+")


def rows() -> list[dict[str, str]]:
    """Return one record for each model type: `tested`, `verified` or `refused: …` for each method.

    A pair is tested if the contract tests of the method cover the family, and verified if the sweep over all model
    types has compared it with the dense model.
    """
    return [
        {"name": name, **{column: _status(name, column, found) for column in coverage.COLUMNS}}
        for name, found in coverage.table().items()
    ]


def short_rows() -> list[dict[str, str]]:
    """Return `rows` with `no` for refusals, for a terminal."""
    return [{key: "no" if value.startswith("refused") else value for key, value in row.items()} for row in rows()]


def markdown() -> str:
    """Return the table in Markdown, with the reasons of refusals as notes below it."""
    notes: dict[str, int] = {}
    lines = [
        f"With transformers {coverage.version()}:",
        "",
        "| model type | " + " | ".join(coverage.COLUMNS) + " |",
        "|---" * (len(coverage.COLUMNS) + 1) + "|",
    ]
    for row in rows():
        cells = [f"`{row['name']}`"]
        for column in coverage.COLUMNS:
            status = row[column]
            if status.startswith("refused"):
                status = f"no ({notes.setdefault(reason(status), len(notes) + 1)})"
            cells.append(status)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Reasons of refusals:", ""]
    lines += [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(lines) + "\n"


def reason(status: str) -> str:
    """Return the reason of a refusal without the names of the model and its modules."""
    text = status.removeprefix("refused: ").removesuffix(" Nothing was changed.")
    text = _LAYERS.sub("layers", _PLACE.sub("a layer", _MODEL.sub("the model", text)))
    return text.replace("|", "\\|").replace("<", "&lt;")


def _status(name: str, column: str, found: Mapping[str, str]) -> str:
    from graftwork.methods import about

    if column not in found:
        return f"refused: a tiny model cannot be built ({found.get('model', 'no reason')})"
    if found[column] == coverage.VERIFIED and name in about(column.partition(" ")[0]).families:
        return TESTED
    return found[column]
