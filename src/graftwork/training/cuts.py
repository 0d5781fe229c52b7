"""Number of inputs and targets that are longer than the maximum lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from graftwork.core.example import Example
from graftwork.tasks.offsets import ESCAPE, PARTS, encode_texts, visible_target
from graftwork.training.lengths import row_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cuts:
    """Inputs and targets of a data set that are cut at their end."""

    inputs: int
    """Number of inputs with more than `input_limit` tokens."""
    targets: int
    """Number of targets with more than `target_limit` tokens."""
    explanations: int
    """Number of explanations that are left out of targets, because their text is beyond the end of a cut input."""
    input_limit: int
    target_limit: int
    longest_input: int
    """Number of tokens of the longest input."""
    longest_target: int
    """Number of tokens of the longest target."""
    size: int
    """Number of examples."""

    def plain(self) -> Mapping[str, int]:
        """Return the numbers by name."""
        return asdict(self)

    def line(self, what: str) -> str | None:
        """One line for people; None if nothing is cut.

        Args:
            what: Name of the data.
        """
        found: list[str] = []
        for name, count, limit, longest in (
            ("inputs", self.inputs, self.input_limit, self.longest_input),
            ("targets", self.targets, self.target_limit, self.longest_target),
        ):
            if count:
                share = f"{count:,} of {self.size:,} {name}"
                found.append(f"{share} cut after {limit:,} tokens (the longest has {longest:,})")
        if self.explanations:
            found.append(f"{self.explanations:,} explanations beyond a cut left out of the targets")
        return f"{what}: {'; '.join(found)}" if found else None


def count_cuts(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    input_limit: int,
    target_limit: int,
) -> Cuts:
    """Count what is cut; conversations, whose oldest turns are dropped instead, count as their last answers.

    Args:
        rows: Examples.
        tokenizer: Tokenizer of the model.
        encoder_decoder: True if input and target go to different stacks.
        input_limit: Maximum number of input tokens.
        target_limit: Maximum number of target tokens, with the end-of-sequence token.
    """

    def count(part: Sequence[Example]) -> list[tuple[int, int]]:
        escape = any(row.metadata.get(ESCAPE) for row in part)
        inputs = encode_texts(tokenizer, [row.text for row in part], automatic=encoder_decoder, escape=escape)
        targets = encode_texts(tokenizer, [row.target for row in part], automatic=False, escape=escape)
        return [(len(source), len(target) + 1) for source, target in zip(inputs, targets, strict=True)]

    lengths = row_lengths(rows, tokenizer, count, "whole input and target", encoder_decoder)
    cut: list[int] = (lengths[:, 0] > input_limit).nonzero()[0].tolist() if len(rows) else []
    explanations = 0
    for index in cut:
        if PARTS in rows[index].metadata:
            explanations += visible_target(tokenizer, rows[index], input_limit, automatic=encoder_decoder)[1]
    return Cuts(
        inputs=len(cut),
        targets=int((lengths[:, 1] > target_limit).sum()) if len(rows) else 0,
        explanations=explanations,
        input_limit=input_limit,
        target_limit=target_limit,
        longest_input=int(lengths[:, 0].max()) if len(rows) else 0,
        longest_target=int(lengths[:, 1].max()) if len(rows) else 0,
        size=len(rows),
    )
