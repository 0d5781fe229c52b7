"""Passages, questions and answers as token ids; what users wrote is never read as a special token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from graftwork.errors import DataError
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.tasks.prompts import PromptFamily, prompt_family

FAMILY_OF_KIND = {"open": "open", "yes_no": "yes_no", "choice": "choice"}
_MARKED = re.compile("\ue000([0-9]+)\ue001")


def document_text(template: str, title: str, text: str) -> str:
    """A passage as it is differentiated."""
    return _template(template).render(title=title, text=text)


def document_ids(tokenizer: Any, config: ReGradConfig, title: str, text: str) -> tuple[list[int], bool]:
    """A passage as tokens, the tokenizer's automatic start in front, and whether it was cut.

    Raises:
        DataError: If less than two tokens are left, so that there is nothing to differentiate.
    """
    hidden = _Hidden(tokenizer)
    worded = document_text(config.document_template, hidden.hide(title), hidden.hide(text))
    ids = hidden.tokens(worded, automatic=True)
    if len(ids) < 2 or not text.strip():
        raise DataError(
            f"Found a passage of {len(ids)} tokens, {text[:40]!r}; expected at least 2 and some text. Leave it out."
        )
    return ids[: config.max_document_tokens], len(ids) > config.max_document_tokens


def family_for(config: ReGradConfig, kind: str) -> PromptFamily:
    """The wording around a question of this kind: open, yes_no or choice."""
    return prompt_family(config.prompt or FAMILY_OF_KIND.get(kind, "open"))


def question_ids(
    tokenizer: Any,
    family: PromptFamily,
    question: str,
    *,
    choices: Sequence[str] = (),
    passages: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """A prompt up to where the answer begins.

    Where the tokenizer has a chat template it makes the turns. The simple family is one text even then, behind the
    tokenizer's automatic start.

    Args:
        tokenizer: The model's tokenizer.
        family: The wording.
        question: The question, verbatim.
        choices: Options of a five-way question.
        passages: (title, text) of passages to show.
    """
    hidden = _Hidden(tokenizer)
    asked = {
        "choices": [hidden.hide(choice) for choice in choices],
        "passages": [(hidden.hide(title), hidden.hide(text)) for title, text in passages],
    }
    if getattr(tokenizer, "chat_template", None) is None or not family.system:
        return hidden.tokens(family.plain(hidden.hide(question), **asked), automatic=True)
    turns = family.messages(hidden.hide(question), **asked)
    rendered = _rendered(tokenizer, turns)
    # some templates write the beginning of the text, others leave it to the tokenizer
    written = tokenizer.bos_token is None or rendered.startswith(tokenizer.bos_token)
    return hidden.tokens(rendered + family.assistant, automatic=not written)


def answer_ids(tokenizer: Any, config: ReGradConfig, answer: str) -> list[int]:
    """An answer as training wants it: a space, the answer, and what ends it."""
    hidden, end = _Hidden(tokenizer), tokenizer.eos_token_id
    if config.answer_end == "newline" or end is None:
        return hidden.tokens(f" {hidden.hide(answer)}\n", automatic=False)
    return [*hidden.tokens(f" {hidden.hide(answer)}", automatic=False), int(end)]


def _rendered(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """The turns as the chat template writes them; where it refuses a system's turn, that goes before the question."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        joined = "\n\n".join(turn["content"] for turn in turns)
        only = [{"role": "user", "content": joined}]
        return tokenizer.apply_chat_template(only, tokenize=False, add_generation_prompt=True)


class _Hidden:
    """Special tokens in what users wrote, put out of sight while a text is made of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.specials = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.specials))) if self.specials else None

    def hide(self, text: str) -> str:
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda found: f"\ue000{self.specials.index(found[0])}\ue001", text)

    def tokens(self, text: str, *, automatic: bool) -> list[int]:
        """Tokens of a text; one without hidden parts is tokenized as it is."""
        parts = _MARKED.split(text)
        ids: list[int] = self.tokenizer(parts[0], add_special_tokens=automatic, verbose=False)["input_ids"]
        for number, following in zip(parts[1::2], parts[2::2], strict=True):
            # marks that the user wrote are text as well
            known = int(number) < len(self.specials)
            ids += self._spelled(self.specials[int(number)] if known else f"\ue000{number}\ue001")
            if following:
                ids += self.tokenizer(following, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _spelled(self, special: str) -> list[int]:
        """The name of a special token as ordinary text."""
        forbidden = set(self.tokenizer.all_special_ids)
        # some vocabularies hold the name as one piece, whatever the tokenizer is told
        for pieces in ([special], list(special)):
            encoded = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = [number for piece in encoded for number in piece]
            if not forbidden & set(ids):
                break
        return [number for number in ids if number not in forbidden]


@cache
def _template(text: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
