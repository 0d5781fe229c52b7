"""WT5: fine-tuning of text-to-text models that explain their predictions if the input starts with `explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graftwork.core.example import AUXILIARY, Example
from graftwork.core.messages import say
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.evaluation.prediction import predict_records, prompt_ids
from graftwork.grafting.capabilities import Examination
from graftwork.grafting.converted import Converted
from graftwork.grafting.method import Change, Method
from graftwork.methods.wt5.about import ABOUT
from graftwork.methods.wt5.config import WT5Config
from graftwork.methods.wt5.decoding import GrammarProcessor, answer_ends, label_probabilities, lead_of
from graftwork.methods.wt5.explanation_scores import label_consistency, similarity, simulated
from graftwork.methods.wt5.faithfulness import (
    Faithfulness,
    Probabilities,
    differences,
    means,
    measure_aopc,
    perturbed_probabilities,
    random_spans,
    span_faithfulness,
)
from graftwork.methods.wt5.grammar import Grammar, grammar_of
from graftwork.methods.wt5.orders import answer_order, combined, ordered
from graftwork.methods.wt5.parsing import abstractive_explanations
from graftwork.methods.wt5.phases import FinetuneExplanations
from graftwork.methods.wt5.reading import read_answer
from graftwork.methods.wt5.templates import EXPLANATION_SCORES, NAN, Extractive
from graftwork.metrics.spans import ranking_scores
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.tasks.eraser import token_places
from graftwork.tasks.spans import token_array
from graftwork.tasks.task import Task, metric_names
from graftwork.training.encoding import padding_id
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
            UnsupportedModelError: If the model does not generate text.
        """
        inner = pretrained(model)
        if is_classifier(inner) or not inner.can_generate():
            raise UnsupportedModelError(
                f"wt5 cannot train {type(inner).__name__}: it generates no text. Expected an encoder–decoder such as "
                "T5, BART or LongT5, or a decoder such as Llama, Qwen or Gemma. Nothing was changed."
            )
        return ()

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """One fine-tuning phase, on tasks or on a mixture of explained and label-only examples."""
        own = self.config
        first = own.explanation_order == "reason_first"
        weight = 0.5 if own.alpha is None else own.alpha
        alpha = weight if own.explanation_order == "separate" else None
        return (FinetuneExplanations(own.explanation_weight, own.z_loss, reason_first=first, alpha=alpha),)

    @property
    def formats(self) -> bool:
        """True unless the label is first, as tasks format it; see `FormatsExamples`."""
        return self.config.explanation_order != "label_first"

    def formatted(self, row: Example, *, training: bool, explain: bool | None = None) -> Example:
        """Example in the configured order; see `FormatsExamples`."""
        return ordered(row, self.config.explanation_order, training=training, explain=explain)

    def combined(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
        """Label and explanations of the answers to two prompts, as one answer; see `FormatsExamples`."""
        return combined(first, second)

    def generation(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> Mapping[str, Any]:
        """Logits processor of the grammar if `constrained` is on; see `ConstrainsGeneration`."""
        both = bool(pretrained(model).config.is_encoder_decoder)
        # the targets of the training do not begin with the token that BART, for one, is made to generate first
        options: dict[str, Any] = {"forced_bos_token_id": None} if both else {}
        if not self.config.constrained:
            return options
        grammars = _grammars(tokenizer, rows, both)
        processor = GrammarProcessor(grammars, settings.answer_limit, before=1 if both else None)
        return {**options, "logits_processor": [processor]}

    def read(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        generated: Sequence[Sequence[int]],
    ) -> Sequence[Mapping[str, Any]]:
        """Label, explanations and positions of each answer, as `answer`; see `ReadsAnswers`."""
        grammars = _grammars(tokenizer, rows, bool(pretrained(model).config.is_encoder_decoder))
        return [
            {} if grammar is None else {"answer": read_answer(tokenizer, grammar, row, ids)}
            for grammar, row, ids in zip(grammars, rows, generated, strict=True)
        ]

    def examine(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None,
        rows: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        settings: EvaluationSettings,
    ) -> Examination:
        """Label, explanations and spans of each answer; probabilities and faithfulness if enabled. See `Examines`."""
        found = [_details(row, answer) for row, answer in zip(rows, answers, strict=True)]
        scores = self._unasked(task, rows)
        if any("choices" not in row.metadata for row in rows):
            return Examination(found, scores)
        probabilities = partial(self._probabilities, model, tokenizer, settings)
        full: Sequence[Mapping[str, float]] = ()
        if self.config.probabilities or self.config.faithfulness:
            full = probabilities(rows, explanations=[entry["explanations"] for entry in found])
            for entry, own in zip(found, full, strict=True):
                entry["probabilities"] = _rounded(own)
                # greedy search may generate another label than the most probable one
                entry["contradicts"] = entry["label"] != max(own, key=lambda label, own=own: own[label])
            scores["contradiction_rate"] = 100 * sum(entry["contradicts"] for entry in found) / len(found)
        if self.config.consistency:
            scores |= label_consistency(rows, found, partial(self._answers, model, tokenizer, settings))
        if self.config.simulatability:
            scores |= simulated(rows, found)
        if self.config.bertscore is not None:
            scores |= similarity(found, self.config.bertscore, str(pretrained(model).device))
        if all("source" in row.metadata for row in rows):
            if self.config.faithfulness:
                scores |= self._faithfulness(tokenizer, rows, found, full, probabilities)
            if self.config.samples is not None:
                scores |= self._ranking(model, tokenizer, rows, found, settings)
                if self.config.faithfulness:
                    labels = [entry["label"] for entry in found]
                    soft = [entry["token_scores"] for entry in found]
                    scores |= _added(found, measure_aopc(rows, labels, soft, probabilities, full=full), "aopc_")
        return Examination(found, scores)

    def _unasked(self, task: Task | None, rows: Sequence[Example]) -> dict[str, float]:
        """Scores of explanations, which are undefined if no prompt asks for one.

        Raises:
            ConfigError: If explanations are to be examined.
        """
        if any(row.metadata.get("explain") or AUXILIARY in row.metadata for row in rows):
            return {}
        if "explain" not in rows[0].metadata:
            return {}
        given = ("faithfulness", "samples", "simulatability", "bertscore")
        if self.formats and (name := next((name for name in given if getattr(self.config, name)), None)):
            raise ConfigError(
                f"{name} is {getattr(self.config, name)}, and no answer has an explanation. Expected a request for it; "
                "add --explain (evaluate.explain=true), or leave the setting out."
            )
        names = () if task is None else metric_names(task.metrics)
        return {} if "parsed_rate" not in names else {name: NAN for name in names if name in EXPLANATION_SCORES}

    def _probabilities(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: EvaluationSettings,
        rows: Sequence[Example],
        explanations: Sequence[Sequence[str]] | None = None,
    ) -> Sequence[Mapping[str, float]]:
        """Label probabilities; where the explanation is first, after the given or the model's own explanations."""
        if explanations is None and any(answer_order(row) == "reason_first" for row in rows):
            # the explanation of a changed input is another one
            answers = self._answers(model, tokenizer, settings, rows)
            explanations = [answer["answer"]["explanations"] for answer in answers]
        return label_probabilities(
            model,
            tokenizer,
            rows,
            batch_size=settings.rows_at_once,
            max_input_tokens=settings.input_limit,
            explanations=explanations,
        )

    def _answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: EvaluationSettings,
        rows: Sequence[Example],
    ) -> Sequence[Mapping[str, Any]]:
        """Answers of the model to further examples."""
        return predict_records(Converted(model, (self,), tokenizer=tokenizer), rows, settings)

    def _faithfulness(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        found: Sequence[dict[str, Any]],
        full: Sequence[Mapping[str, float]],
        probabilities: Probabilities,
    ) -> dict[str, float]:
        """Comprehensiveness and sufficiency of the spans, and those of random spans of the same lengths."""
        sentinels = cast(Sequence[str], tokenizer.extra_special_tokens or ())
        mask = next(iter(sentinels), str(tokenizer.unk_token)) if self.config.masking else None
        labels = [entry["label"] for entry in found]
        spans = [[(start, end) for start, end in entry["characters"]] for entry in found]
        perturbed = perturbed_probabilities(rows, labels, spans, probabilities, mask=mask)
        for index, both in perturbed.items():
            found[index].update({f"probabilities_{name}": _rounded(own) for name, own in both._asdict().items()})
        scores = _added(found, differences(perturbed, labels, full), "")
        for index, each in span_faithfulness(rows, labels, spans, probabilities, full=full, mask=mask).items():
            found[index]["span_faithfulness"] = [[round(value, 6) for value in own] for own in each]
        generator = Random(0)
        placed = [random_spans(row, own, generator) for row, own in zip(rows, spans, strict=True)]
        chance = differences(perturbed_probabilities(rows, labels, placed, probabilities, mask=mask), labels, full)
        return {**scores, "faithfulness_n": float(len(perturbed)), **means(chance, "random_")}

    def _ranking(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        found: Sequence[dict[str, Any]],
        settings: EvaluationSettings,
    ) -> dict[str, float]:
        """AUPRC and related scores of the token scores; NaN if no sample contains a span."""
        soft = self._token_scores(model, tokenizer, rows, settings)
        for entry, own in zip(found, soft, strict=True):
            entry["token_scores"] = own
        scored = sum(any(own) for own in soft)
        if not scored:
            say("AUPRC, average precision and ROC AUC are undefined: no sample of any answer names a span.")
        ranked = ranking_scores([_array(row) for row in rows], soft)
        # equal scores of all tokens rank nothing, but have an area of their own
        scores = {name: 100 * value if scored else float("nan") for name, value in ranked.items() if value is not None}
        return {**scores, "ranked_rate": 100 * scored / len(rows)}

    @torch.no_grad()
    def _token_scores(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> list[list[float]]:
        """Share of sampled answers whose spans contain each of ERASER's tokens of a source."""
        inner: Any = pretrained(model)
        both = bool(inner.config.is_encoder_decoder)
        count = self.config.samples or 1
        found: list[list[float]] = []
        with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
            for own in rows:
                row: Example = own.metadata.get(AUXILIARY, own)
                (ids,), ends = prompt_ids(tokenizer, [row], settings.input_limit, both)
                tokens = inner.generate(
                    input_ids=torch.tensor([ids], device=inner.device),
                    do_sample=True,
                    num_return_sequences=count,
                    max_new_tokens=settings.answer_limit,
                    pad_token_id=padding_id(tokenizer),
                    **({"eos_token_id": ends} if ends else {}),
                    **self.generation(model, tokenizer, [row], settings),
                )
                answers = tokens[:, 1 if both else len(ids) :].tolist()
                places = token_places(row.metadata["source"])
                read = self.read(model, tokenizer, [row] * count, answers)
                arrays = [token_array(one["answer"]["spans"], places) for one in read]
                found.append([sum(column) / count for column in zip(*arrays, strict=True)])
        return found


def _grammars(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], both: bool) -> list[Grammar | None]:
    """Grammar of each row; equal rows share one."""
    known: dict[int, Grammar | None] = {}
    for row in rows:
        if id(row) not in known:
            ends = answer_ends(tokenizer, row, both)
            known[id(row)] = grammar_of(tokenizer, row, lead=lead_of(row, encoder_decoder=both), ends=ends)
    return [known[id(row)] for row in rows]


def _details(row: Example, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Details of one answer, with the gold label and explanations."""
    metadata, text = row.metadata, str(answer["prediction"])
    entry: dict[str, Any] = {"id": row.key, "input": row.input, "target": row.target, "prediction": text}
    located = answer.get("answer")
    if AUXILIARY in metadata:
        entry["second_input"] = metadata[AUXILIARY].input
    order = answer_order(row)
    if order != "label_first" or "second_input" in entry:
        entry["order"] = "separate" if "second_input" in entry else order
    if "source" not in metadata:
        entry |= abstractive_explanations(text, order=order) if located is None else located
    else:
        parser = Extractive("fixed", "whitespace")
        read = parser(text, row) if located is None else parser.located(located, text, row)
        entry |= {name: read[name] for name in ("label", "explanations", "unmatched")}
        entry["characters"] = [list(span) for span in read["characters"]]
        entry["source"] = metadata["source"]
        entry["gold_characters"] = [list(span) for span in metadata["spans"]]
        if "document" in metadata:
            entry["document"] = metadata["document"]
            entry["class_names"] = dict(zip(metadata["choices"], metadata["class_names"], strict=True))
    if "label" in metadata:
        entry["gold_label"] = metadata["label"]
        entry["gold_explanations"] = list(metadata["explanations"])
        entry["right"] = entry["label"] == metadata["label"]
    return entry


def _rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: round(value, 6) for label, value in probabilities.items()}


def _array(row: Example) -> list[int]:
    """1 for ERASER's tokens of the source inside gold spans, otherwise 0."""
    return token_array(row.metadata["spans"], token_places(row.metadata["source"]))


def _added(entries: Sequence[dict[str, Any]], measured: Sequence[Faithfulness | None], prefix: str) -> dict[str, float]:
    """Add the measured values to each answer, and return their means."""
    for entry, value in zip(entries, measured, strict=True):
        if value is not None:
            entry |= {prefix + name: round(number, 6) for name, number in value._asdict().items()}
    return means(measured, prefix)
