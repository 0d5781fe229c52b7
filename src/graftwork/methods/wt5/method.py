"""WT5: fine-tuning of text-to-text models that explain their predictions if the input starts with `explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graftwork.core.example import Example
from graftwork.errors import UnsupportedModelError
from graftwork.grafting.capabilities import Examination
from graftwork.grafting.method import Change, Method
from graftwork.methods.wt5.about import ABOUT
from graftwork.methods.wt5.config import WT5Config
from graftwork.methods.wt5.decoding import GrammarProcessor, grammar_of, label_probabilities
from graftwork.methods.wt5.faithfulness import (
    Faithfulness,
    differences,
    means,
    measure_aopc,
    perturbed_probabilities,
)
from graftwork.methods.wt5.parsing import abstractive_explanations
from graftwork.methods.wt5.phases import FinetuneExplanations
from graftwork.methods.wt5.templates import Extractive
from graftwork.metrics.spans import Span, ranking_scores
from graftwork.surgery.sites import pretrained
from graftwork.tasks.eraser import document_tokens
from graftwork.tasks.task import Task
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.settings.evaluation import EvaluationSettings


class WT5(Method[WT5Config], about=ABOUT):
    """Fine-tune a text-to-text model to generate a label and, on request, an explanation.

    Source: Narang et al. 2020, "WT5?! Training Text-to-Text Models to Explain their Predictions"; the `wt5` folder of
    `google-research/google-research`.
    Differs from it: defects of formats, parsers and metrics are fixed outside reference mode; generation can be
    constrained to labels and spans, and answers can be examined for faithfulness. The card lists all differences.
    """

    changes_model: bool = False

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Return no changes: the method consists of training texts only.

        Raises:
            UnsupportedModelError: If the model is no encoder–decoder.
        """
        inner = pretrained(model)
        if not inner.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"wt5 cannot train {type(inner).__name__}: it has no decoder that reads an input from an encoder. "
                "Expected an encoder–decoder such as T5, BART or LongT5. Nothing was changed."
            )
        return ()

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """One fine-tuning phase, on tasks or on a mixture of explained and label-only examples."""
        return (FinetuneExplanations(self.config.explanation_weight, self.config.z_loss),)

    def generation(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> Mapping[str, Any]:
        """Logits processor of the grammar if `constrained` is on; see `ConstrainsGeneration`."""
        if not self.config.constrained:
            return {}
        grammars = [grammar_of(tokenizer, row) for row in rows]
        return {"logits_processor": [GrammarProcessor(grammars, settings.max_new_tokens)]}

    def examine(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None,
        rows: Sequence[Example],
        answers: Sequence[str],
        settings: EvaluationSettings,
    ) -> Examination:
        """Label, explanations and spans of each answer; probabilities and faithfulness if enabled. See `Examines`."""
        found = [self._read(task, row, answer) for row, answer in zip(rows, answers, strict=True)]
        scores: dict[str, float] = {}
        if any("choices" not in row.metadata for row in rows):
            return Examination(found)
        probabilities = partial(
            label_probabilities,
            model,
            tokenizer,
            batch_size=settings.rows_at_once,
            max_input_tokens=settings.max_input_tokens,
        )
        full: Sequence[Mapping[str, float]] = ()
        if self.config.probabilities or self.config.faithfulness:
            full = probabilities(rows)
            for entry, own in zip(found, full, strict=True):
                entry["probabilities"] = _rounded(own)
        if all("source" in row.metadata for row in rows):
            labels = [entry["label"] for entry in found]
            if self.config.faithfulness:
                sentinels = cast(Sequence[str], tokenizer.extra_special_tokens or ())
                mask = next(iter(sentinels), str(tokenizer.unk_token))
                perturbed = perturbed_probabilities(
                    rows,
                    labels,
                    [_whole(entry) for entry in found],
                    probabilities,
                    mask=mask if self.config.masking else None,
                )
                for index, both in perturbed.items():
                    found[index] |= {f"probabilities_{name}": _rounded(own) for name, own in both._asdict().items()}
                scores |= _added(found, differences(perturbed, labels, full), "")
            if self.config.samples is not None:
                soft = self._token_scores(model, tokenizer, task, rows, settings)
                for entry, own in zip(found, soft, strict=True):
                    entry["token_scores"] = own
                ranked = ranking_scores([_array(row) for row in rows], soft)
                scores |= {name: 100 * value for name, value in ranked.items() if value is not None}
                if self.config.faithfulness:
                    scores |= _added(found, measure_aopc(rows, labels, soft, probabilities, full=full), "aopc_")
        return Examination(found, scores)

    def _read(self, task: Task | None, row: Example, answer: str) -> dict[str, Any]:
        """Parse one answer, and add the gold label and explanations."""
        metadata = row.metadata
        entry: dict[str, Any] = {"id": row.key, "input": row.input, "target": row.target, "prediction": answer}
        if "source" not in metadata:
            entry |= abstractive_explanations(answer)
        else:
            # the HTML page counts white-space tokens, independently of the tokenizer of the metrics
            entry |= Extractive("fixed", "whitespace")(answer, row)
            entry["spans"] = [list(span) for span in entry.pop("overlap_spans")]
            entry.pop("span_array")
            entry.pop("gold_unmatched")
            entry["source"] = metadata["source"]
            entry["characters"] = _characters(metadata["source"], entry["spans"])
            entry["gold_spans"] = [list(span) for span in metadata["spans"]]
            if "document" in metadata:
                entry["document"] = metadata["document"]
                entry["class_names"] = dict(zip(metadata["choices"], metadata["class_names"], strict=True))
        if "label" in metadata:
            entry["gold_label"] = metadata["label"]
            entry["gold_explanations"] = list(metadata["explanations"])
            entry["right"] = entry["label"] == metadata["label"]
        return entry

    @torch.no_grad()
    def _token_scores(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> list[list[float]]:
        """Share of sampled answers whose spans contain each token of a source."""
        inner: Any = pretrained(model)
        count = self.config.samples or 1
        parser = Extractive("fixed", "whitespace")
        found: list[list[float]] = []
        with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
            for row in rows:
                encoded = tokenizer(
                    row.input, truncation=True, max_length=settings.max_input_tokens, return_tensors="pt"
                )
                rule = self.generation(model, tokenizer, [row], settings)
                tokens = inner.generate(
                    input_ids=encoded["input_ids"].to(inner.device),
                    do_sample=True,
                    num_return_sequences=count,
                    max_new_tokens=settings.max_new_tokens,
                    **rule,
                )
                texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)  # pyright: ignore[reportUnknownMemberType]
                arrays = [parser(text.strip(), row)["span_array"] for text in texts]
                found.append([sum(column) / count for column in zip(*arrays, strict=True)])
        return found


def _characters(source: str, spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Start and end of each span in characters of the source."""
    places: list[tuple[int, int]] = []
    position = 0
    for token in document_tokens(source):
        position = source.index(token, position)
        places.append((position, position + len(token)))
        position += len(token)
    return [[places[start][0], places[end - 1][1]] for start, end in spans]


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(value, 6) for label, value in probabilities.items()}


def _whole(entry: Mapping[str, Any]) -> list[Span]:
    """Spans of a parsed answer as tuples."""
    return [(start, end) for start, end in entry["spans"]]


def _array(row: Example) -> list[int]:
    """1 for the tokens of the source inside gold spans, otherwise 0."""
    array = [0] * len(document_tokens(row.metadata["source"]))
    for start, end in row.metadata["spans"]:
        array[start:end] = [1] * (end - start)
    return array


def _added(entries: Sequence[dict[str, Any]], measured: Sequence[Faithfulness | None], prefix: str) -> dict[str, float]:
    """Add the measured values to each answer, and return their means."""
    for entry, value in zip(entries, measured, strict=True):
        if value is not None:
            entry |= {prefix + name: round(number, 6) for name, number in value._asdict().items()}
    return means(measured, prefix)
