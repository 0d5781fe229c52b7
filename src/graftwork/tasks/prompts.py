"""Prompt families for question answering: Jinja templates in YAML files; values are inserted verbatim."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from graftwork.core.config import build, read_yaml
from graftwork.core.readers import shorten
from graftwork.errors import ConfigError, UnknownNameError

FAMILIES = ("open", "yes_no", "choice", "simple")


@dataclass(frozen=True, slots=True)
class PromptFamily:
    """Prompt templates of one kind of question.

    `passage`, `user` and `assistant` are Jinja templates. They are rendered once: inserted values are never rendered
    as templates themselves.
    """

    system: str
    """System message; empty for a chat without one."""
    context: str
    """Instruction appended to the system message if passages are shown."""
    passage: str
    """Template of one passage, with number (from 1), title and text."""
    user: str
    """Template of the user message, with the question and, for five-way questions, the choices."""
    assistant: str
    """Prefix of the answer."""

    def messages(
        self,
        question: str,
        *,
        choices: Sequence[str] = (),
        passages: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[dict[str, str]]:
        """Return the chat messages in the format of a tokenizer's chat template.

        Args:
            question: The question, verbatim.
            choices: Options of a five-way question.
            passages: (title, text) of each passage to show; empty for a closed-book prompt.
            system: System message in place of the family's; None for that one.
            history: Earlier turns as (role, text); consecutive turns of one role become one message.

        Raises:
            ConfigError: If the family needs choices and none are given.
        """
        if "choices" in self.user and "Question:" not in self.user and not choices:
            raise ConfigError("Found a five-way question without choices; expected some. Use another prompt family.")
        shown = self.shown(passages)
        parts = [self.system if system is None else system, *([self.context, *shown] if shown else [])]
        instruction = "\n".join(part for part in parts if part)
        turns = [{"role": "system", "content": instruction}] if instruction else []
        for role, text in history:
            # earlier answers have the prefix that the next one gets
            user = role == "user"
            _add_turn(turns, role, _filled(self.user, question=text, choices=[]) if user else self._answer(text))
        _add_turn(turns, "user", _filled(self.user, question=question, choices=list(choices)))
        return turns

    def shown(self, passages: Sequence[tuple[str, str]]) -> list[str]:
        """Return each passage (title, text) in the passage template."""
        return [
            _filled(self.passage, number=number, title=title, text=text).strip("\n")
            for number, (title, text) in enumerate(passages, start=1)
        ]

    def _answer(self, text: str) -> str:
        return f"{self.assistant} {text}" if self.assistant else text

    def plain(
        self,
        question: str,
        *,
        choices: Sequence[str] = (),
        passages: Sequence[tuple[str, str]] = (),
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Return the prompt as one text that ends with the answer prefix, for models without a chat template.

        See `messages` for the arguments.
        """
        turns = self.messages(question, choices=choices, passages=passages, system=system, history=history)
        return "\n".join([*(turn["content"] for turn in turns), self.assistant])

    def digest(self) -> str:
        """Return a hash of the templates, for cache keys."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


def _add_turn(turns: list[dict[str, str]], role: str, content: str) -> None:
    """Append a turn; some chat templates refuse two turns of one role in a row, which become one."""
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += f"\n\n{content}"
    else:
        turns.append({"role": role, "content": content})


@cache
def prompt_family(name: str) -> PromptFamily:
    """Return a built-in prompt family by name, or a custom one by the path of its YAML file.

    Raises:
        UnknownNameError: If no built-in family has that name.
        ConfigError: If the file has unknown or missing keys.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if name not in FAMILIES:
        raise UnknownNameError("prompt family", name, FAMILIES)
    with as_file(files("graftwork.tasks") / "prompt_families" / f"{name}.yaml") as path:
        return _read(path)


def _read(path: Path) -> PromptFamily:
    values: Mapping[str, object] = read_yaml(path)
    return build(PromptFamily, values, where=str(path))


@cache
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)


def _filled(template: str, **values: object) -> str:
    from jinja2 import TemplateError

    try:
        return _template(template).render(**values)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(
            f"The template {shorten(template)} cannot be filled: {' '.join(str(error).split())}. Fix the template in "
            "its YAML file."
        ) from None
