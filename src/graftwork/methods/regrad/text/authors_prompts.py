"""Prompts of the authors' code, read from the string constants of its source file; the file is never executed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from string import Formatter

from graftwork.core.native import first_line
from graftwork.errors import DataError
from graftwork.tasks.prompts import PromptFamily

PROMPTS_FILE = "ICL.py"
"""Source file that defines the prompts."""
_PASSAGE = "Passage {{ number - 1 }}: {{ text }}"
"""Form of a passage in a prompt: its rank from 0 and its text, without its title."""
_FIELDS = {
    "context": '{{ passages | join("\\n") }}',
    "question": "{{ question }}",
    **{f"c{number}": f"{{{{ choices[{number}] }}}}" for number in range(5)},
}
_LEVELS = 4
"""Number of folders that are searched: that of the checkpoint and those above it."""


def authors_prompts(folder: Path, *, simple: bool) -> dict[str, PromptFamily] | None:
    """Return the authors' prompt of every kind of question; None if their source is not above the checkpoint.

    Their code writes checkpoints to `outputs/NAME` in its repository, whose `src` has the prompts.

    Args:
        folder: Folder of the checkpoint.
        simple: Ask open questions without the markup of a chat, as their `use_simple_prompt`.

    Raises:
        DataError: If the file is no Python source, or a prompt is missing in it.
    """
    places = [folder.resolve(), *folder.resolve().parents][:_LEVELS]
    source = next((file for place in places if (file := place / "src" / PROMPTS_FILE).is_file()), None)
    if source is None:
        return None
    texts = _constants(source)

    def family(suffix: str, question: str, prefix: str = "ICLprompt") -> PromptFamily:
        needed = [f"{prefix}_context{suffix}", f"{prefix}_context_blind{suffix}", f"{prefix}_{question}"]
        if missing := [name for name in needed if name not in texts]:
            raise DataError(
                f"{source} has no {missing[0]}; expected the prompts of the authors. Pass --prompt instead."
            )
        shown, blind, asked = (texts[name] for name in needed)
        # their code formats the prompt with passages only, so that braces are doubled there and nowhere else
        first = f"{{% if passages %}}{_formatted(shown, source)}{{% else %}}{_raw(blind)}{{% endif %}}"
        return PromptFamily("", "", _PASSAGE, "", "", (first, _replaced(asked)))

    return {
        "open": family("", "question", "simple_ICLprompt" if simple else "ICLprompt"),
        "yes_no": family("_yn", "question"),
        "choice": family("_5choices", "question_5choices"),
    }


def _constants(source: Path) -> Mapping[str, str]:
    """Text constants that a source file assigns to names."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{source} is no Python source: {first_line(error)}. Pass --prompt instead.") from None
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _formatted(text: str, source: Path) -> str:
    """Template of a text for `str.format`."""
    try:
        parts = [(literal, field) for literal, field, _, _ in Formatter().parse(text)]
    except ValueError as error:
        raise DataError(f"{source}: a prompt cannot be read: {error}. Pass --prompt instead.") from None
    if unknown := [field for _, field in parts if field is not None and field not in _FIELDS]:
        raise DataError(f"{source}: found the field {unknown[0]!r} in a prompt; expected {', '.join(_FIELDS)}.")
    return "".join(_raw(literal) + (_FIELDS[field] if field is not None else "") for literal, field in parts)


def _replaced(text: str) -> str:
    """Template of a text whose fields are replaced one after the other."""
    for name in ("question", *(f"c{number}" for number in range(5))):
        head, found, tail = text.partition(f"{{{name}}}")
        if found:
            return _replaced(head) + _FIELDS[name] + _replaced(tail)
    return _raw(text)


def _raw(text: str) -> str:
    """Template of a literal text."""
    return f"{{% raw %}}{text}{{% endraw %}}" if text else ""
