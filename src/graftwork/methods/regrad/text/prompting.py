"""PromptBuilder, passages and answers as token ids; special tokens in users' texts are encoded as ordinary text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.text.requests import Question
from graftwork.retrieval.retriever import Hit
from graftwork.tasks.chat import render_chat
from graftwork.tasks.prompts import PromptFamily, prompt_family
from graftwork.tasks.special_tokens import SpecialTokenEscaper, decoded_text, token_ids, tokenizer_lock

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

FAMILY_OF_KIND: Mapping[str, str] = {"open": "open", "yes_no": "yes_no", "choice": "choice"}
"""Prompt family of every kind of question."""
_RUN = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")
"""White space between two words of a line, longer than one character."""


class ContextLengthError(DataError):
    """A question is longer than the model's context."""


class PromptBuilder:
    """Builds prompts that fit into the model's context, and decodes generated tokens. Thread-safe.

    Args:
        tokenizer: The model's tokenizer.
        config: Settings of the conversion.
        context_tokens: Maximum number of tokens of all passages in a prompt together.
        positions: Maximum sequence length of the model; None for no limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: ReGradConfig, context_tokens: int, positions: int | None
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.context_tokens, self.positions = context_tokens, positions
        self._lock = tokenizer_lock(tokenizer)

    def build(self, question: Question, hits: Sequence[Hit], max_new_tokens: int) -> list[int]:
        """Return the prompt of a question, with its passages if `question.context` is set.

        Raises:
            ContextLengthError: If the question without passages is longer than the model's context.
        """
        with self._lock:
            blind = self._ids(question, ())
            room = self.context_tokens
            if self.positions is not None:
                room = min(room, self.positions - len(blind) - max_new_tokens)
                if room < 0:
                    raise ContextLengthError(
                        f"Found a question of {len(blind)} tokens; expected at most "
                        f"{self.positions - max_new_tokens}, so that {max_new_tokens} new tokens fit into the model's "
                        f"context of {self.positions}. Shorten it."
                    )
            return self._with_context(question, hits, blind, room) if question.context and hits else blind

    def decode(self, tokens: Sequence[int], *, verbatim: bool = False) -> str:
        """Return the answer in generated tokens: their first line; with `verbatim` the whole text, unstripped."""
        text = decoded_text(self.tokenizer, tokens)
        return text if verbatim else text.lstrip(" ").partition("\n")[0].strip()

    def token_text(self, token: int) -> str:
        """Return the text that a token adds, with its leading space; a replacement character for a part of one."""
        with self._lock:
            # decoders of SentencePiece vocabularies remove the space at the beginning of a text
            before = decoded_text(self.tokenizer, self._anchor, keep_special=True)
            return decoded_text(self.tokenizer, [*self._anchor, token], keep_special=True)[len(before) :]

    @cached_property
    def _anchor(self) -> list[int]:
        return token_ids(self.tokenizer, "a")

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer: the end-of-turn token and every token that contains a line feed."""
        tokenizer: Any = self.tokenizer
        pieces: list[str] = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        end: int | None = tokenizer.eos_token_id
        line_feeds = {token for token, piece in enumerate(pieces) if "\n" in piece}
        return frozenset(line_feeds if end is None else {end, *line_feeds})

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Special tokens that decode to no text; the unknown token is not one of them."""
        tokenizer: Any = self.tokenizer
        ids: list[int] = tokenizer.all_special_ids
        return frozenset(token for token in ids if token != tokenizer.unk_token_id)

    def _with_context(self, question: Question, hits: Sequence[Hit], blind: Sequence[int], room: int) -> list[int]:
        """The prompt with passages cut to `room` tokens; the last passages are cut first."""
        shown = [(hit.title, hit.text) for hit in hits]
        whole = self._ids(question, shown)
        while shown and len(whole) - len(blind) > room:
            title, text = shown.pop()
            excess = len(whole) - len(blind) - room
            tokens = token_ids(self.tokenizer, text)
            if len(tokens) > excess:
                shown.append((title, decoded_text(self.tokenizer, tokens[: len(tokens) - excess], keep_special=True)))
            whole = self._ids(question, shown) if shown else list(blind)
        return whole

    def _ids(self, question: Question, passages: Sequence[tuple[str, str]]) -> list[int]:
        family = family_for(self.config, question.kind)
        if question.verbatim:
            return verbatim_ids(self.tokenizer, family, question.text, passages)
        return question_ids(
            self.tokenizer,
            family,
            question.text,
            choices=question.choices,
            passages=passages,
            system=question.system,
            history=question.history,
        )


def document_text(template: str, title: str, text: str) -> str:
    """Return the text whose loss is differentiated: the passage in the document template.

    Title and text are normalised first, so that passages which differ in white space or Unicode form only have equal
    texts, and share one gradient.
    """
    return _template(template).render(title=normalized_text(title), text=normalized_text(text))


def normalized_text(text: str) -> str:
    """Return a text in Unicode form C, without white space at the ends of lines and text, or runs of it in lines.

    Indentation and line breaks are kept.
    """
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip().split("\n")
    return "\n".join(_RUN.sub(" ", line.rstrip()) for line in lines)


def document_ids(
    tokenizer: PreTrainedTokenizerBase, config: ReGradConfig, title: str, text: str
) -> tuple[list[int], bool]:
    """Return the token ids of a passage after the tokenizer's automatic prefix, and True if they were truncated.

    Raises:
        DataError: If fewer than two tokens are left: no token could be predicted.
    """
    # a server encodes passages on another thread than questions
    with tokenizer_lock(tokenizer):
        escaper = SpecialTokenEscaper(tokenizer)
        formatted = document_text(config.document_template, escaper.escape(title), escaper.escape(text))
        ids = escaper.tokens(formatted, automatic=True)
    if len(ids) < 2 or not text.strip():
        raise DataError(
            f"Found a passage of {len(ids)} tokens, {text[:40]!r}; expected at least 2 and some text. Leave it out."
        )
    return ids[: config.max_document_tokens], len(ids) > config.max_document_tokens


def family_for(config: ReGradConfig, kind: str) -> PromptFamily:
    """Return the prompt family for a kind of question: open, yes_no or choice."""
    return prompt_family(config.prompt or FAMILY_OF_KIND.get(kind, "open"), kind)


def question_ids(
    tokenizer: PreTrainedTokenizerBase,
    family: PromptFamily,
    question: str,
    *,
    choices: Sequence[str] = (),
    passages: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Return the token ids of a prompt, up to the position where the answer begins.

    The tokenizer's chat template is applied if it has one and the family has a system message. Other prompts are plain
    text after the tokenizer's automatic prefix.

    Args:
        tokenizer: The model's tokenizer.
        family: The prompt family.
        question: The question, verbatim.
        choices: Options of a multiple-choice question.
        passages: (title, text) of the passages in the prompt.
        system: System prompt in place of the family's; None for that one.
        history: Earlier turns as (role, text).

    Raises:
        ConfigError: If the chat template refuses the turns, or the family is of segments, which have none.
    """
    escaper = SpecialTokenEscaper(tokenizer)
    if family.segments:
        if system is not None or history:
            raise ConfigError(
                "Found a system prompt or earlier turns; expected a single question, because this model is asked in "
                "the words that it was trained with, which have no place for them. Ask without them."
            )
        first, *others = family.rendered_segments(
            escaper.escape(question),
            choices=[escaper.escape(choice) for choice in choices],
            passages=[(escaper.escape(title), escaper.escape(text)) for title, text in passages],
        )
        ids = escaper.tokens(first, automatic=True)
        return ids + [token for one in others for token in escaper.tokens(one, automatic=False)]
    if getattr(tokenizer, "chat_template", None) is None or not family.system:
        # the prompt family is the template here, so that its own control tokens keep their meaning
        plain = family.plain(
            escaper.escape(question),
            choices=[escaper.escape(choice) for choice in choices],
            passages=[(escaper.escape(title), escaper.escape(text)) for title, text in passages],
            system=None if system is None else escaper.escape(system),
            history=[(role, escaper.escape(text)) for role, text in history],
        )
        return escaper.tokens(plain, automatic=True)
    messages = family.messages(question, choices=choices, passages=passages, system=system, history=history)
    # whole messages, with the system prompt: only the chat template and the answer prefix write control tokens
    turns = [{"role": turn["role"], "content": escaper.escape(turn["content"])} for turn in messages]
    rendered = _rendered(tokenizer, turns)
    # some chat templates write the beginning-of-text token, others leave it to the tokenizer
    start: Any = tokenizer.bos_token
    has_start = start is None or rendered.startswith(str(start))
    return escaper.tokens(rendered + family.assistant, automatic=not has_start)


def verbatim_ids(
    tokenizer: PreTrainedTokenizerBase, family: PromptFamily, text: str, passages: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Return the token ids of a text that is the whole prompt, after the tokenizer's automatic prefix.

    Args:
        tokenizer: The model's tokenizer.
        family: Prompt family, for the form of passages.
        text: The text, verbatim.
        passages: (title, text) of passages to show before it.
    """
    escaper = SpecialTokenEscaper(tokenizer)
    shown = family.shown([(escaper.escape(title), escaper.escape(one)) for title, one in passages])
    return escaper.tokens("\n".join([*shown, escaper.escape(text)]), automatic=True)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return render_chat(tokenizer, turns, generate=True)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(
            f"Found the turns {roles}, which the chat template refuses ({' '.join(str(error).split())}). Send other "
            "turns, or write them into the question."
        ) from None


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, config: ReGradConfig, answer: str, *, kind: str = "open"
) -> list[int]:
    """Return the token ids of a training target: the answer, after a space unless the prompt has one, and its end."""
    escaper = SpecialTokenEscaper(tokenizer)
    end: Any = tokenizer.eos_token_id
    text = escaper.escape(answer) if family_for(config, kind).ends_with_space else f" {escaper.escape(answer)}"
    if config.answer_end == "newline" or end is None:
        return escaper.tokens(f"{text}\n", automatic=False)
    return [*escaper.tokens(text, automatic=False), int(end)]


@cache
def _template(text: str) -> Template:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
