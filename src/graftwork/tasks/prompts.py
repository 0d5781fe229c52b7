"""Prompt families for question answering: Jinja templates in YAML or JSON; values are inserted verbatim."""

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
from graftwork.core.readers import parse_json, shorten
from graftwork.errors import ConfigError, UnknownNameError

FAMILIES = ("open", "yes_no", "choice", "simple")
CHOICES = 5
"""Number of options of a five-way question."""
KINDS = ("open", "yes_no", "choice")
"""Kinds of questions; a file may contain one family for each."""


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
    segments: tuple[str, ...] = ()
    """Templates of the whole prompt, in place of those above but `passage`; with the question, the choices, and the
    passages in their template. They are tokenized one after the other."""

    def __post_init__(self) -> None:
        """Validate that no template is without effect.

        Raises:
            ConfigError: If there are segments, and other templates that they replace.
        """
        others = {"system": self.system, "context": self.context, "user": self.user, "assistant": self.assistant}
        if self.segments and (given := [name for name, template in others.items() if template]):
            raise ConfigError(
                f"Found a prompt family with segments and {given[0]}, which has no effect beside them. Leave "
                f"{given[0]} empty, or remove the segments."
            )

    @property
    def ends_with_space(self) -> bool:
        """True if the prompt ends with white space, so that an answer begins without a space of its own."""
        text = self.rendered_segments("", choices=[""] * CHOICES)[-1] if self.segments else self.assistant
        return text.endswith((" ", "\n"))

    def rendered_segments(
        self, question: str, *, choices: Sequence[str] = (), passages: Sequence[tuple[str, str]] = ()
    ) -> list[str]:
        """Return the text of each segment.

        Args:
            question: The question, verbatim.
            choices: Options of a five-way question.
            passages: (title, text) of each passage to show; empty for a closed-book prompt.

        Raises:
            ConfigError: If a segment names a choice that the question does not have.
        """
        values = {"question": question, "choices": list(choices), "passages": self.shown(passages)}
        return [_filled(segment, **values) for segment in self.segments]

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
def prompt_family(name: str, kind: str = "open") -> PromptFamily:
    """Return a built-in prompt family by name, or a custom one by the path of its YAML file, or by its JSON text.

    Args:
        name: Name, path, or JSON text.
        kind: Kind of the question, which selects one family of a file or text that contains several.

    Raises:
        UnknownNameError: If no built-in family has that name.
        ConfigError: If the file has unknown or missing keys.
    """
    if name.endswith((".yaml", ".yml")):
        return _chosen(read_yaml(Path(name)), kind, name)
    if name.startswith("{"):
        try:
            return _chosen(parse_json(name, any_text=True), kind, "the recorded prompts")
        except ValueError as error:
            raise ConfigError(f"The recorded prompts {shorten(name)} are no JSON: {error}.") from None
    if name not in FAMILIES:
        raise UnknownNameError("prompt family", name, FAMILIES)
    with as_file(files("graftwork.tasks") / "prompt_families" / f"{name}.yaml") as path:
        return _chosen(read_yaml(path), kind, str(path))


def recorded(families: Mapping[str, PromptFamily]) -> str:
    """Return the JSON text of one family for each kind of question."""
    return json.dumps({kind: asdict(family) for kind, family in families.items()})


def _chosen(values: Any, kind: str, where: str) -> PromptFamily:
    if values and set(values) <= set(KINDS):
        if kind not in values:
            raise ConfigError(f"Found no prompt for {kind} questions in {where}. Add the key {kind}.")
        return build(PromptFamily, values[kind], where=f"{where}: {kind}")
    return build(PromptFamily, values, where=where)


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
