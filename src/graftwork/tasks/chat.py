"""Conversations in the model's chat template, with a loss on assistant turns only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.core.readers import read_text
from graftwork.errors import ConfigError, DataError
from graftwork.tasks.own_data.values import Turn, as_object
from graftwork.tasks.special_tokens import SpecialTokenEscaper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
GENERATION = "{% generation"
"""Block of templates that mark assistant turns themselves, also written `{%- generation`."""


def use_chat_template(tokenizer: PreTrainedTokenizerBase | None, path: str | None) -> None:
    """Set the chat template of a tokenizer to the content of a file; nothing happens without a path.

    Raises:
        ConfigError: If the file cannot be read.
    """
    if tokenizer is not None and path is not None:
        cast("Any", tokenizer).chat_template = read_text(Path(path), error=ConfigError)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generate: bool) -> str:
    """Apply the chat template; if it rejects system messages, prepend the system text to the next message.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Messages with role and content.
        generate: Add the beginning of an assistant turn.
    """
    from jinja2 import TemplateError

    untyped: Any = tokenizer
    try:
        return str(untyped.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except TemplateError:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise
        joined = "\n\n".join(message["content"] for message in messages[:2])
        merged = [{"role": messages[1]["role"], "content": joined}, *messages[2:]]
        return str(untyped.apply_chat_template(merged, tokenize=False, add_generation_prompt=generate))


class ChatEncoder:
    """Encodes conversations as token ids; control tokens in messages are encoded as ordinary text.

    Markup of assistant turns that is not special, such as <think>, keeps its meaning.

    Args:
        tokenizer: Tokenizer of the model.

    Raises:
        ConfigError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        untyped: Any = tokenizer
        template: Any = getattr(tokenizer, "chat_template", None)
        if not template:
            raise ConfigError(
                f"Found chat messages and a tokenizer without a chat template ({untyped.name_or_path or 'unnamed'}); "
                "expected one. Use an instruction-tuned checkpoint, give a Jinja file with --chat-template, or map the "
                "columns to plain text with --input-field or --input-template."
            )
        # several named templates: the tokenizer chooses "default"
        self.template = str(as_object(template).get("default", template))
        self.escaper = SpecialTokenEscaper(tokenizer)
        self.control = self.escaper.special_ids - {cast("int | None", tokenizer.unk_token_id)}

    def prompt(self, turns: Sequence[Turn], limit: int, key: str = "") -> list[int]:
        """Return the token ids of a prompt, up to the position where the assistant's answer begins.

        Args:
            turns: Conversation; a last assistant turn, the reference, is omitted.
            limit: Maximum number of tokens; the oldest turns are dropped first, except for the system message.
            key: File and place of the example, for errors.
        """
        asked = list(turns[:-1] if turns[-1][0] == "assistant" else turns)
        while True:
            ids = self._ids(self._render(asked, True, key))
            if len(ids) <= limit:
                return ids
            shorter = _without_oldest(asked)
            if shorter is None:
                self._warn(key, len(ids), limit)
                return ids[-limit:]
            asked = shorter

    def training(
        self, turns: Sequence[Turn], max_input: int, max_target: int, key: str = ""
    ) -> tuple[list[int], list[bool]]:
        """Return the token ids of a conversation, and True for each token of an assistant turn.

        The prompt of the last turn is limited to `max_input` tokens as in `prompt`, the last turn to `max_target`.

        Raises:
            DataError: If the template fails, or renders an earlier turn differently once later turns follow.
        """
        kept = list(turns)
        while True:
            ids, spans = self._spans(kept, key)
            begin, end = spans[-1]
            shorter = _without_oldest(kept) if begin > max_input else None
            if shorter is None:
                break
            kept = shorter
        mask = [False] * len(ids)
        for start, stop in spans:
            mask[start:stop] = [True] * (stop - start)
        first = max(0, begin - max_input)
        if first:
            self._warn(key, begin, max_input)
        last = min(end, begin + max_target)
        return ids[first:last], mask[first:last]

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Special tokens that end an assistant turn in this template, and the end-of-sequence token."""
        ids, spans = self._spans([("user", "a"), ("assistant", "b")], "")
        begin, end = spans[-1]
        inside = [token for token in ids[begin:end] if token in self.control]
        eos: Any = self.tokenizer.eos_token_id
        return frozenset([*inside[:1], *([] if eos is None else [int(eos)])])

    def _spans(self, turns: Sequence[Turn], key: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a whole conversation, and the token range of each assistant turn."""
        text = self._render(turns, False, key)
        marked = self._marked(turns) if GENERATION in self.template.replace("{%-", "{%") else None
        characters = self._prefixes(turns, text, key) if marked is None else marked
        if not characters:
            raise DataError(f"{key}: found no assistant turn marked by the chat template; expected at least one.")
        ids = self._ids(text)
        spans: list[tuple[int, int]] = []
        for begin, end in characters:
            # a token that the next turn has merged into is part of that turn
            start = _common(ids, self._ids(text[:begin]))
            stop = len(ids) if end == len(text) else _common(ids, self._ids(text[:end]))
            spans.append((start, max(start, stop)))
        begin, end = spans[-1]
        eos: Any = self.tokenizer.eos_token_id
        if eos is not None and end == len(ids) and ids[-1] not in self.control:
            # a template without an end of turn would train a model that never stops
            ids = [*ids, int(eos)]
            spans[-1] = (begin, len(ids))
        return ids, spans

    def _prefixes(self, turns: Sequence[Turn], text: str, key: str) -> list[tuple[int, int]]:
        """Character range of each assistant turn, by rendering the conversation up to it."""
        found: list[tuple[int, int]] = []
        for index, (role, content) in enumerate(turns):
            if role != "assistant":
                continue
            before = self._render(turns[:index], True, key)
            after = text if index + 1 == len(turns) else self._render(turns[: index + 1], False, key)
            if after.startswith(before) and text.startswith(after):
                found.append((len(before), len(self._without_padding(after))))
                continue
            # templates may add a thought to a prompt or to the last turn only: find the message itself
            known = _common(text, self._render(turns[:index], False, key))
            message = self.escaper.escape(content, keep_markup=True).strip()
            place = text.find(message, known)
            if place < 0 or not message:
                raise DataError(
                    f"{key}: found a chat template that renders turn {index + 1} differently when other turns follow, "
                    "so that the tokens of the assistant are unknown; expected a fixed rendering. Mark assistant turns "
                    "in the template with {% generation %}, or split the conversation into rows of one answer."
                )
            begin = len(before) if text.startswith(before) and len(before) <= place else place
            found.append((begin, self._after_end(text, place + len(message))))
        return found

    def _after_end(self, text: str, place: int) -> int:
        """Position after the special token that follows a message, if one does."""
        following = text[place:]
        spaces = len(following) - len(following.lstrip())
        ending = next((name for name in self.escaper.specials if following.lstrip().startswith(name)), None)
        return place if ending is None else place + spaces + len(ending)

    def _marked(self, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Character range of each `generation` block of the template."""
        from transformers.utils import chat_template_utils

        render: Any = cast("Any", chat_template_utils).render_jinja_template
        special: Any = self.tokenizer.special_tokens_map
        _, indices = render(
            conversations=[self._messages(turns)],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        return [(int(begin), int(end)) for begin, end in indices[0]]

    def _without_padding(self, text: str) -> str:
        """Text without white space after its last special token, which no model generates."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(tuple(self.escaper.specials)) else text

    def _messages(self, turns: Sequence[Turn]) -> Messages:
        # the model writes markup such as <think> itself, so that it is part of what assistant turns teach
        return [
            {"role": role, "content": self.escaper.escape(content, keep_markup=role == "assistant")}
            for role, content in turns
        ]

    def _render(self, turns: Sequence[Turn], generate: bool, key: str) -> str:
        from jinja2 import TemplateError

        try:
            return render_chat(self.tokenizer, self._messages(turns), generate=generate)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            roles = ", ".join(role for role, _ in turns)
            raise DataError(
                f"{key}: found the turns {roles}, which the chat template refuses ({' '.join(str(error).split())}). "
                "Fix or remove the row, or use another template with --chat-template."
            ) from None

    def _ids(self, text: str) -> list[int]:
        # some templates write the beginning-of-text token, others leave it to the tokenizer
        start: Any = self.tokenizer.bos_token
        return self.escaper.tokens(text, automatic=start is not None and not text.startswith(str(start)))

    def _warn(self, key: str, found: int, limit: int) -> None:
        logger.warning("%s: the prompt has %d tokens, cut to the last %d; raise max_input_tokens.", key, found, limit)


def _without_oldest(turns: Sequence[Turn]) -> list[Turn] | None:
    """Conversation without its oldest exchange, keeping system messages; None if only one exchange is left."""
    system = [turn for turn in turns if turn[0] in ("system", "developer")]
    rest = [turn for turn in turns if turn[0] not in ("system", "developer")]
    users = [index for index, (role, _) in enumerate(rest) if role == "user"]
    return [*system, *rest[users[1] :]] if len(users) > 1 else None


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """Number of leading items that two sequences share."""
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
