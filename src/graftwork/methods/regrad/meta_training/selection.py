"""Checkpoint selection: score held-out questions after one gradient step on their passages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.core.example import Example
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.meta_training.episodes import EpisodeCollator, Episodes, passages_of, prompt_ids
from graftwork.methods.regrad.meta_training.learning import losses_of
from graftwork.methods.regrad.modules import layout, step_sizes, updated
from graftwork.metrics.answers import score_answer
from graftwork.surgery.sites import pretrained
from graftwork.tasks.augmentation import read_augmented
from graftwork.tasks.multihop import DATASETS, PARSERS, format_question
from graftwork.tasks.sources import Record
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS_AT_ONCE = 16


class Selection:
    """Scores checkpoints on held-out questions, with gradients at the current adapter.

    Args:
        config: Files of questions, their number, and the score: F1 or loss.
        tokenizer: The model's tokenizer.
        max_input_tokens: Maximum number of prompt tokens.
        max_target_tokens: Maximum number of answer tokens, for the loss.

    Raises:
        DataError: If a file is not readable, or its questions have no passages.
    """

    def __init__(
        self, config: ReGradConfig, tokenizer: PreTrainedTokenizerBase, *, max_input_tokens: int, max_target_tokens: int
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.sets = [
            Episodes(
                _questions(Path(path), config.select_samples),
                tokenizer,
                config,
                max_input_tokens=max_input_tokens,
                max_target_tokens=max_target_tokens,
            )
            for path in config.select
        ]

    def score(self, model: nn.Module) -> float:
        """Return the mean over files of F1 in percent, or of minus the loss; higher is better."""
        training = model.training
        model.eval()
        try:
            scores = [self._score(model, episodes) for episodes in self.sets]
        finally:
            model.train(training)
        return sum(scores) / len(scores)

    @torch.no_grad()
    def _score(self, model: nn.Module, episodes: Episodes) -> float:
        total = 0.0
        for start in range(0, len(episodes), QUESTIONS_AT_ONCE):
            chosen = range(start, min(start + QUESTIONS_AT_ONCE, len(episodes)))
            batch = EpisodeCollator(padding_id(self.tokenizer))([episodes[index] for index in chosen])
            batch = {name: tensor.to(pretrained(model).device) for name, tensor in batch.items()}
            with updated(model, self._updates(model, batch)):
                if self.config.select_by == "loss":
                    losses = losses_of(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
                    total -= float(losses.sum())
                else:
                    rows = [episodes.rows[index] for index in chosen]
                    total += sum(_f1_scores(rows, self._answers(model, episodes, rows)))
        return total / len(episodes)

    def _updates(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "questions numbers"]:
        """The update of every question; zero after plain continual pretraining, which answers without a step."""
        questions = len(batch["input_ids"])
        sums = torch.zeros(questions, layout(model).size, device=batch["input_ids"].device)  # [questions numbers]
        if not self.config.outer_loss:
            return sums
        gradients, _ = passage_gradients(model, batch["document_ids"], batch["document_mask"])  # [passages numbers]
        sums.index_add_(0, batch["document_task"], gradients)
        return functional.update(step_sizes(model), sums)

    def _answers(self, model: nn.Module, episodes: Episodes, rows: Sequence[Example]) -> Iterator[str]:
        prompts = [
            prompt_ids(self.tokenizer, self.config, row, passages_of(row, self.config), episodes.max_input_tokens)
            for row in rows
        ]
        collate = EpisodeCollator(padding_id(self.tokenizer))
        ids, mask = (tensor.to(pretrained(model).device) for tensor in collate.pad(prompts, left=True))
        untyped: Any = model
        generated: Tensor = untyped.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.config.select_new_tokens,
            do_sample=False,
            pad_token_id=padding_id(self.tokenizer),
        )
        new = generated[:, ids.shape[1] :]  # [rows new_tokens]
        tokenizer: Any = self.tokenizer
        return iter(tokenizer.batch_decode(new, skip_special_tokens=True))


def _f1_scores(rows: Sequence[Example], answers: Iterator[str]) -> list[float]:
    found: list[float] = []
    for row, answer in zip(rows, answers, strict=True):
        parsed = PARSERS[row.metadata["kind"]](answer, row)
        found.append(100 * score_answer(parsed, row.answers).f1)
    return found


def _questions(path: Path, count: int | None) -> list[Example]:
    """The questions of an augmented file; the name of its folder determines their kind."""
    dataset = DATASETS.get(path.parent.name)
    rows: list[Example] = []
    for number, fields in enumerate(read_augmented(path)[:count]):
        kind = dataset.kind if dataset is not None else ("choice" if fields.get("choices") else "open")
        example = format_question(Record(str(fields.get("test_id", number)), fields), kind)
        if example is not None:
            rows.append(example)
    return rows
