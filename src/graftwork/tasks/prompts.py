"""Prompts of question answering: templates that lie in files, filled by value, so that a question stays what it is."""

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
from graftwork.errors import ConfigError, UnknownNameError

FAMILIES = ("open", "yes_no", "choice", "simple")


@dataclass(frozen=True, slots=True)
class PromptFamily:
    """The wording around one kind of question.

    `passage`, `user` and `assistant` are Jinja templates; they are filled once, and what is put in is never read as a
    template again.
    """

    system: str
    """What the model is told first; empty for no such turn."""
    context: str
    """Added to it where passages are shown."""
    passage: str
    """One passage: number (from 1), title and text."""
    user: str
    """The user's turn: question and, for five-way questions, choices."""
    assistant: str
    """What the answer begins with."""

    def messages(
        self, question: str, *, choices: Sequence[str] = (), passages: Sequence[tuple[str, str]] = ()
    ) -> list[dict[str, str]]:
        """The turns of a chat, as a tokenizer's chat template takes them.

        Args:
            question: The question, verbatim.
            choices: Options of a five-way question.
            passages: (title, text) of each passage to show; none asks blindly.

        Raises:
            ConfigError: If the family shows choices and there are none, which would leave a question without options.
        """
        if "choices" in self.user and "Question:" not in self.user and not choices:
            raise ConfigError("Found a five-way question without choices; expected some. Use another prompt family.")
        shown = [
            _filled(self.passage, number=number, title=title, text=text).strip("\n")
            for number, (title, text) in enumerate(passages, start=1)
        ]
        parts = [self.system, *([self.context, *shown] if shown else [])]
        system = "\n".join(part for part in parts if part)
        turns = [{"role": "system", "content": system}] if system else []
        return [*turns, {"role": "user", "content": _filled(self.user, question=question, choices=list(choices))}]

    def plain(self, question: str, *, choices: Sequence[str] = (), passages: Sequence[tuple[str, str]] = ()) -> str:
        """The whole prompt as one text, for models without a chat template; ends with what the answer begins with."""
        turns = self.messages(question, choices=choices, passages=passages)
        return "\n".join([*(turn["content"] for turn in turns), self.assistant])

    def digest(self) -> str:
        """What stands for the wording in fingerprints."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


@cache
def prompt_family(name: str) -> PromptFamily:
    """A shipped family by its name, or one of your own by the path of its YAML file.

    Raises:
        UnknownNameError: If there is none of that name.
        ConfigError: If the file has other keys.
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
    return _template(template).render(**values)
