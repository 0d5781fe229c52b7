"""Batches that are generated as a whole by transformers, for models and modes without continuous batching."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from graftwork.methods.regrad.text.generation import generate_tokens

if TYPE_CHECKING:
    from graftwork.methods.regrad.answering.cancellation import CancellationCriterion
    from graftwork.methods.regrad.answering.row_updates import RowUpdates


def generate_batch(
    updates: RowUpdates,
    prompts: Sequence[Sequence[int]],
    stop_tokens: Set[int],
    *,
    padding: int,
    max_new_tokens: int,
    stopped: CancellationCriterion | None,
) -> list[list[int]]:
    """Generate the new tokens of every row, up to and including the first stop token.

    Args:
        updates: Updates of the rows, with their questions.
        prompts: Token ids of each row.
        stop_tokens: Tokens that end the answer of every row.
        padding: Padding token.
        max_new_tokens: Maximum number of new tokens.
        stopped: Criterion for cancelled rows; None if rows are not cancelled.
    """
    with updates.applied():
        tokens = generate_tokens(
            updates.model,
            prompts,
            [row.question.sampling for row in updates.rows],
            padding=padding,
            ends=sorted(stop_tokens),
            max_new_tokens=max_new_tokens,
            stopping=[] if stopped is None else [stopped],
        )
    found: list[list[int]] = []
    for number, row in enumerate(tokens):
        cancelled_at = stopped.rows.get(number) if stopped is not None else None
        kept = row if cancelled_at is None else row[:cancelled_at]
        length = next((at for at, token in enumerate(kept) if token in stop_tokens), None)
        # the stop token is kept: it may contain letters before its line feed
        found.append(kept if length is None else kept[: length + 1])
    return found
