"""Label probabilities, and generation constrained to a label and spans of the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.evaluation.prediction import prompt_ids
from graftwork.methods.wt5.grammar import Grammar, States, grammar_of
from graftwork.methods.wt5.orders import reason_first
from graftwork.methods.wt5.spelling import Spelling
from graftwork.surgery.sites import pretrained
from graftwork.tasks.chat import ChatEncoder
from graftwork.training.encoding import IGNORED_LABEL, PadBatch, is_chat, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarProcessor:
    """Logits processor that masks the tokens forbidden by the grammar of each row.

    Every text ends within the token limit with a complete span. A text also ends at a repeated span, because small
    models loop once they repeat themselves.

    Args:
        grammars: One grammar per row of the batch; None leaves a row unconstrained.
        max_new_tokens: Maximal number of generated tokens; None for no limit.
        before: Number of tokens before the first generated one: the start token of a decoder with an encoder. None for
            the number of tokens at the first call, which is the length of the prompts.
    """

    def __init__(
        self, grammars: Sequence[Grammar | None], max_new_tokens: int | None = None, *, before: int | None = 1
    ) -> None:
        self.grammars = grammars
        self.max_new_tokens = max_new_tokens
        self.before = before
        self._states: list[dict[tuple[int, ...], States]] = [{} for _ in grammars]

    def __call__(
        self, input_ids: Int[Tensor, "rows_beams tokens"], scores: Float[Tensor, "rows_beams vocabulary"]
    ) -> Float[Tensor, "rows_beams vocabulary"]:
        """Set the scores of forbidden tokens to −∞; beams of a row are consecutive."""
        if self.before is None:
            self.before = input_ids.shape[1]
        beams = len(input_ids) // len(self.grammars)
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        rows = cast("list[list[int]]", input_ids[:, self.before :].tolist())  # pyright: ignore[reportUnknownMemberType]
        for number, ids in enumerate(rows):
            grammar = self.grammars[number // beams]
            if grammar is None:
                continue
            states = self._follow(number // beams, grammar, tuple(ids))
            left = None if self.max_new_tokens is None else self.max_new_tokens - len(ids)
            if grammar.free_before(states, left):
                blocked[number, list(grammar.ends)] = True
                continue
            allowed = grammar.allowed(states, left)
            if grammar.closing in allowed and grammar.units is not None and _repeats(grammar.reasons(ids)):
                allowed = {grammar.closing}
            if allowed and (grammar.order == "reason_first" or not grammar.is_free(states)):
                blocked[number] = True
                blocked[number, list(allowed)] = False
        return scores.masked_fill(blocked, float("-inf"))

    def _follow(self, row: int, grammar: Grammar, ids: tuple[int, ...]) -> States:
        known = self._states[row]
        if not ids:
            return grammar.start
        if ids not in known:
            known[ids] = grammar.advance(self._follow(row, grammar, ids[:-1]), ids[-1])
        return known[ids]


def _repeats(reasons: Sequence[Sequence[int]]) -> bool:
    """True if the last explanation of a text equals an earlier one."""
    return bool(reasons) and reasons[-1] in reasons[:-1]


@torch.no_grad()
def label_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    batch_size: int,
    max_input_tokens: int,
    explanations: Sequence[Sequence[str]] | None = None,
) -> list[dict[str, float]]:
    """Probability of every label of each example: softmax over the labels y of log p(y, e | x).

    e is the token after the label: the end of the text, or the separator if an explanation is requested. Where the
    explanations r come first, it is log p(y, e | x, r).

    Args:
        model: Encoder-decoder model, or decoder.
        tokenizer: Tokenizer of the model.
        rows: Examples with `choices` in their metadata.
        batch_size: Number of inputs per batch.
        max_input_tokens: Maximal number of input tokens; longer inputs are truncated.
        explanations: Explanations of each example, where they come first; none by default.
    """
    given = explanations or [()] * len(rows)
    found: list[dict[str, float]] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        found += _probabilities(model, tokenizer, rows[part], given[part], max_input_tokens)
    return found


def _probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    explanations: Sequence[Sequence[str]],
    longest: int,
) -> list[dict[str, float]]:
    """Label probabilities of one batch."""
    inner: Any = pretrained(model)
    both = bool(inner.config.is_encoder_decoder)
    prompts, _ = prompt_ids(tokenizer, rows, longest, both)
    answers: list[tuple[int, ...]] = []
    counts: list[int] = []
    skipped: list[int] = []
    for row, reasons in zip(rows, explanations, strict=True):
        grammar = required_grammar(tokenizer, row, encoder_decoder=both)
        before, following = (), (grammar.end,)
        if grammar.order == "reason_first":
            spelling = Spelling(tokenizer, lead_of(row, encoder_decoder=both))
            (before,) = spelling.first([reason_first("", reasons)])
        elif row.metadata.get("explain", True):
            following = grammar.separator
        answers += [before + own + following for own in grammar.labels]
        counts.append(len(grammar.labels))
        skipped += [len(before)] * len(grammar.labels)
    repeats = torch.tensor(counts, device=inner.device)
    if both:
        each = _after_encoder(model, tokenizer, prompts, answers, repeats, skipped)
    else:
        repeated = [ids for ids, count in zip(prompts, counts, strict=True) for _ in range(count)]
        # explanations before the label belong to the prompt
        repeated = [[*ids, *own[:count]] for ids, own, count in zip(repeated, answers, skipped, strict=True)]
        answers = [own[count:] for own, count in zip(answers, skipped, strict=True)]
        each = _after_prompt(model, tokenizer, repeated, answers)
    scores = torch.split(each, counts)  # [labels] per row
    return [
        dict(zip(row.metadata["choices"], map(float, own.softmax(0)), strict=True))
        for row, own in zip(rows, scores, strict=True)
    ]


def _after_encoder(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    repeats: Tensor,
    skipped: Sequence[int],
) -> Float[Tensor, " answers"]:
    """Log-probability of each answer after `skipped` tokens; an input is encoded once for its `repeats` answers."""
    inner: Any = pretrained(model)
    batch = PadBatch(padding_id(tokenizer))([{"input_ids": ids} for ids in prompts])
    ids, mask = batch["input_ids"].to(inner.device), batch["attention_mask"].to(inner.device)  # [rows tokens]
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(answer) for answer in answers], batch_first=True, padding_value=IGNORED_LABEL
    ).to(inner.device)
    # padded [answers target_tokens], hidden [rows tokens width]
    hidden: Tensor = inner.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    outputs = model(
        encoder_outputs=(hidden.repeat_interleave(repeats, dim=0),),  # [answers tokens width]
        attention_mask=mask.repeat_interleave(repeats, dim=0),
        labels=padded,
    )
    places = torch.arange(padded.shape[1], device=padded.device)  # [target_tokens]
    before = places < torch.tensor(skipped, device=padded.device)[:, None]  # [answers target_tokens]
    return _summed(outputs.logits, padded.masked_fill(before, IGNORED_LABEL))


def _after_prompt(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Float[Tensor, " answers"]:
    """Log-probability of each answer that follows its prompt in one row of a decoder."""
    inner: Any = pretrained(model)
    rows = [
        {"input_ids": [*prompt, *answer], "labels": [IGNORED_LABEL] * len(prompt) + list(answer)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batch = {name: value.to(inner.device) for name, value in PadBatch(padding_id(tokenizer))(rows).items()}
    labels = batch.pop("labels")  # [answers tokens]
    logits: Tensor = model(**batch, use_cache=False).logits
    # the token at a position is predicted at the one before it
    return _summed(logits[:, :-1], labels[:, 1:])


def _summed(
    logits: Float[Tensor, "answers tokens vocabulary"], labels: Int[Tensor, "answers tokens"]
) -> Float[Tensor, " answers"]:
    """Sum of the log-probabilities of the tokens that are not ignored."""
    each = logits.float().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return each.masked_fill(labels == IGNORED_LABEL, 0.0).sum(-1)


def required_grammar(tokenizer: PreTrainedTokenizerBase, row: Example, *, encoder_decoder: bool) -> Grammar:
    """Grammar of the labels of an example, without its source.

    Args:
        tokenizer: Tokenizer of the model.
        row: Example with `choices`.
        encoder_decoder: True if the answer is a text of its own.
    """
    metadata = {name: value for name, value in row.metadata.items() if name != "source"}
    found = grammar_of(
        tokenizer,
        replace(row, metadata=metadata),
        lead=lead_of(row, encoder_decoder=encoder_decoder),
        ends=answer_ends(tokenizer, row, encoder_decoder),
    )
    if found is None:
        raise DataError(f"example {row.key}: found no labels; expected the choices of the task.")
    return found


def answer_ends(tokenizer: PreTrainedTokenizerBase, row: Example, encoder_decoder: bool) -> list[int]:
    """Token ids that end an answer, the one of the training first.

    Args:
        tokenizer: Tokenizer of the model.
        row: The example; the answer of a conversation ends with the end of a turn.
        encoder_decoder: True if the answer is a text of its own.
    """
    end: Any = tokenizer.eos_token_id
    found = [] if end is None else [int(end)]
    if encoder_decoder or not is_chat(row):
        return found
    turn = ChatEncoder(tokenizer).end_tokens
    return [*sorted(turn - set(found)), *found]


def lead_of(row: Example, *, encoder_decoder: bool) -> str:
    """Text before the first word of an answer: a space in a decoder's row of prompt and answer."""
    return "" if encoder_decoder or is_chat(row) else " "
