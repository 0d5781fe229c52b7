"""Rows of the card section "From the paper's commands to ours", and their coverage by executed commands.

The right cell of a row contains commands, flags, tasks, recipes, files and Python as code. Words in capitals such as
`DIR`, single letters and `…` match anything, and numbers of the flags in `SIZES` may be smaller. All other words must
match exactly.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from graftwork.cli.output import hyphenated

SECTION = "From the paper's commands to ours"
SIZES = {
    "--cost-lengths",
    "--end",
    "--eval-steps",
    "--max-steps",
    "--num-train-epochs",
    "--save-steps",
    "--start",
    "--checkpoints",
}
"""Flags whose number depends on the size of the experiment."""
BIG_MODELS = {"google-t5/t5-11b"}
"""Models that are replaced by a tiny one."""
NOT_RUN = {
    "gcloud storage cp -r gs://unifiedqa/data/boolq DATA/": "download by another program",
    "--backend opensearch": "needs a search server, which tests/retrieval/test_opensearch.py starts",
    "TrainingArguments": "class of transformers that the setting in the same cell configures",
    "src/ICL.py": "file of the authors' code, read by the commands in the same cell",
    "train_args.json": "file of the authors' code, read by the commands in the same cell",
}
"""Code that is not executed, with the reason."""

_SHORT = {"-o": "--output", "-i": "--input"}


@dataclass(frozen=True)
class Row:
    """One row of a card table."""

    card: str
    theirs: str
    ours: str

    @property
    def removed(self) -> bool:
        """True if the row states that the option has no counterpart."""
        return self.ours.startswith("removed")

    @property
    def refuses(self) -> bool:
        return re.search(r"\brefuse[sd]\b", self.ours) is not None

    @property
    def code(self) -> list[str]:
        """Code spans of the right cell; `a|b` counts as two."""
        spans = re.findall(r"`([^`]+)`", self.ours.replace("\\|", "|"))
        return [one for span in spans for one in _alternatives(span)]


def _alternatives(span: str) -> list[str]:
    words = span.split(" ")
    last = words[-1].split("|")
    return [" ".join([*words[:-1], one]) for one in last]


def rows_of(card: str, text: str) -> list[Row]:
    """Return all rows of the tables in the section."""
    section = text.partition(f"## {SECTION}")[2].partition("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("| ") and line != "| theirs | ours |":
            theirs, ours = re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))
            found.append(Row(card, theirs, ours))
    return found


@dataclass
class Executed:
    """Executed commands as words, and the resulting files."""

    commands: list[list[str]] = field(default_factory=list)
    """Commands with exit code 0."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """Commands refused with a one-line error, by the text in the left cell of their row."""
    calls: list[str] = field(default_factory=list)
    """Executed Python calls, as source."""
    files: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Commands with an unexpected outcome, with their last line of output."""


def uncovered(row: Row, executed: Executed, names: Sequence[str]) -> list[str]:
    """Return the code of a row that no executed command covers.

    Args:
        row: Row to check.
        executed: Executed commands.
        names: Names of all tasks, mixtures, recipes and commands.
    """
    refused = [words for key, words in executed.refused.items() if row.refuses and key in row.theirs]
    commands = [*executed.commands, *refused]
    missing = [code for code in row.code if not _covered(code, row, executed, commands, names)]
    if row.refuses and not row.removed and not refused:
        missing.append("a refusal")
    return missing


def _covered(code: str, row: Row, executed: Executed, commands: Sequence[list[str]], names: Sequence[str]) -> bool:
    if code in NOT_RUN:
        return True
    if code.startswith(("graftwork ", "python ", "-")):
        return any(_runs(code, words) for words in commands)
    if "(" in code or code.startswith(("legacy.", "methods.")):
        return any(_calls(code, call) for call in executed.calls)
    pattern = _pattern(code)
    if any(pattern.fullmatch(name) for name in names):
        return any(pattern.fullmatch(word) for words in commands for word in _pieces(words))
    if code.endswith(("/", ".json", ".jsonl", ".yaml", ".safetensors")) or code.startswith("RUN/"):
        return any(re.fullmatch(rf"(.+/)?{pattern.pattern}", file) for file in executed.files)
    if row.removed or code in executed.environment:
        return True
    # a value: of a flag in the same row, or of any flag if the row has none
    flags = {_SHORT.get(word, word) for other in row.code for word in other.split() if word.startswith("-")}
    pattern = _pattern(code, shrinks=bool(flags & SIZES))
    values = (_values(words, flags) if flags else words for words in commands)
    return any(pattern.fullmatch(piece) for words in values for piece in _pieces(words))


def _values(words: Sequence[str], flags: Collection[str]) -> list[str]:
    return [value for flag, value in pairwise(words) if flag in flags]


def normal(words: Sequence[str]) -> list[str]:
    """Normalise a command line: long flags with hyphens, values as separate words."""
    made: list[str] = []
    for word in map(hyphenated, words):
        flag, equals, value = word.partition("=")
        made += [flag, value] if word.startswith("--") and equals else [_SHORT.get(word, word)]
    return made


def _runs(code: str, words: Sequence[str]) -> bool:
    """True if a command contains the words of a span: the leading words in order, and each flag with its value."""
    span = [word for word in normal(shlex.split(code)) if word != "…"]
    groups: list[list[str]] = [[]]
    for word in span:
        if word.startswith("-"):
            groups.append([])
        groups[-1].append(word)
    front, *flags = groups
    return _starts(front, words) and all(_has(flag, words) for flag in flags)


def _starts(front: Sequence[str], words: Sequence[str]) -> bool:
    if len(front) > len(words):
        return False
    return all(_pattern(one).fullmatch(word) for one, word in zip(front, words, strict=False))


def _has(group: Sequence[str], words: Sequence[str]) -> bool:
    flag, *values = group
    for place in (place for place, word in enumerate(words) if word == flag):
        given = words[place + 1 : place + 1 + len(values)]
        if len(given) == len(values) and all(
            _pattern(value, shrinks=flag in SIZES).fullmatch(word) for value, word in zip(values, given, strict=True)
        ):
            return True
    return False


def _pattern(text: str, *, shrinks: bool = False) -> re.Pattern[str]:
    """Compile the pattern of a word on a card."""
    if text in BIG_MODELS:
        return re.compile(".+")
    if shrinks and re.fullmatch(r"\d+(,\d+)*", text):
        return re.compile(r"\d+(,\d+)*")
    parts = re.split(r"(<[a-z]+>|…|\b[A-Z_]+\b|(?<![\w.-])[a-z](?![\w.-]))", text)
    return re.compile("".join(re.escape(part) if number % 2 == 0 else ".+" for number, part in enumerate(parts)))


def _pieces(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command and the values inside them."""
    for word in words:
        yield word
        yield from re.split("[=,]", word)
        yield word.rpartition("=")[2]


def _calls(code: str, call: str) -> bool:
    if "(" not in code:
        # a module or one of its names
        return code.rpartition(".")[2] in re.split(r"\W", call)
    wanted, made = (ast.parse(text, mode="eval").body for text in (code, call))
    if not isinstance(wanted, ast.Call) or not isinstance(made, ast.Call):
        return False
    options = {option.arg: ast.unparse(option.value) for option in made.keywords}
    return ast.unparse(made.func).endswith(ast.unparse(wanted.func)) and all(
        options.get(option.arg) == ast.unparse(option.value) for option in wanted.keywords
    )


def lines_of(script: Path) -> list[str]:
    """Return the lines of a script without comments; a trailing backslash continues a line."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
