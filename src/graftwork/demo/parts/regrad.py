"""Demonstration of ReGrad: questions about unseen facts, answered with the gradients of retrieved passages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from graftwork.core.config import to_plain
from graftwork.core.files import read_json, write_json
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.comparing import folder_mib, right_answers, weight_bytes
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.demo.world.passages import HELD_OUT_QUESTIONS
from graftwork.errors import GraftworkError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, required_tokenizer, save
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.digests import weights_digest
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.metrics.results import Results
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.sweeps import sweep
from graftwork.pipeline.training import train
from graftwork.reporting.verdicts import MIB, Comparison, compare_scores, compare_times
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label, write_run
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.augmentation import augment, check_leakage
from graftwork.tasks.multihop import DATASETS

MODEL = "decoder"
TASK = "multihop/popqa"
STEPS = 400
SHORT_STEPS = 120
PRECISIONS = ("float32", "bfloat16", "int8")
COMPARED = 256
"""Number of passages for the comparison of storage precisions."""
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
BASE: Mapping[str, Any] = {"method.adapter": False}
IN_THE_PROMPT: Mapping[str, Any] = {"method.adapter": False, "method.blind": False}
SHIFTED: Mapping[str, Any] = {"method.shifted": True}
POINTS: tuple[Mapping[str, Any], ...] = (
    BASE,
    IN_THE_PROMPT,
    SHIFTED,
    *({"method.strength": strength} for strength in STRENGTHS),
)
PRETRAINED, REGRAD = "pretrained model", "ReGrad"
ROWS: Mapping[str, Mapping[str, Any]] = {
    PRETRAINED: BASE,
    "passage in the prompt (RAG)": IN_THE_PROMPT,
    "adapter alone (γ = 0)": {"method.strength": 0.0},
    REGRAD: {"method.strength": 1.0},
    "gradient of another question's passage": SHIFTED,
}
CHECK_FILE = "check.json"
TIMES_FILE = "times.json"
TIMED = 64
"""Number of questions in the measurement of time."""
ROUNDS = 4
STORAGE_FILE = "storage.json"


class ReGradPart(Part):
    """Answers with and without gradients, accuracy against the step size, and storage cost of gradients."""

    method = "regrad"
    intro = (
        "A tiny Llama, pretrained on a small invented world, answers questions about people who do not occur in its "
        "pretraining; the facts about each are in one passage. A small adapter is meta-trained on passages about other "
        "people, so that one gradient step on a passage teaches its facts. Then the gradients of all passages are "
        "stored in a bank, BM25 retrieves a passage for each question, and its stored gradient is applied for that "
        "answer only. The passage is never in the prompt, and the weights are never overwritten. This pretrained model "
        "has no reading ability: a passage in its prompt does not improve its answers, so the RAG baseline is weak "
        "here. That is no evidence about RAG with a model that can read."
    )

    shortened = f"{SHORT_STEPS} of {STEPS} steps"

    def stages(self) -> Sequence[Stage]:
        """Retrieval, meta-training, encoding, answering and storage."""
        return (
            Stage("indexing passages and retrieving one for every question", self._retrieve, 1),
            Stage("meta-training the adapter for one gradient step on a passage", self._learn, self.sized(6, 12, 45)),
            Stage("computing the gradients of all passages", self._encode, 2),
            Stage("answering with and without gradients", self._answer, 4),
            Stage("comparing storage precisions of gradients", self._store, 2),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The run of the meta-trained decoder."""
        return (self._run,)

    def summary(self) -> Summary:
        """Accuracy with and without gradients, and storage cost.

        Raises:
            GraftworkError: If answering changed the weights.
        """
        results, check = Results.read(self._run.results_file), read_json(self.folder / CHECK_FILE)
        if check["before"] != check["after"]:
            raise GraftworkError(
                "Answering changed the weights of the model; they must stay the same. Please report this with the "
                "output of `graftwork doctor`."
            )
        stored = {row["precision"]: row for row in read_json(self.folder / STORAGE_FILE)}
        kept = stored["bfloat16"]
        names = {name: label(point) for name, point in ROWS.items()}
        answers = {name: right_answers(self._run, TASK, own) for name, own in names.items()}
        times = read_json(self.folder / TIMES_FILE)
        weights = [size / MIB for size in (check["dense_bytes"], check["bytes"])]
        wrong = list(ROWS)[-1]
        return Summary(
            changed=f"{results.changes[label(BASE)]} projections of the upper layers have a low-rank adapter; a "
            f"separate bank holds the gradients of {check['passages']} passages; the weights of the model were "
            f"identical bit by bit after {check['answers']} answers",
            accuracy=compare_scores(
                "exact match on questions about unseen people, with the gradient of the retrieved passage",
                answers[PRETRAINED],
                answers[REGRAD],
                "questions",
                baseline=PRETRAINED,
            ),
            time=compare_times(f"answering {TIMED} questions", times[PRETRAINED], times[REGRAD], baseline=PRETRAINED),
            memory=Comparison(
                f"weights, and bank of {check['passages']} gradients on disk",
                weights[0],
                weights[1] + folder_mib(self._bank),
                "MiB",
                1,
                "counted exactly",
                higher_is_better=False,
                baseline=PRETRAINED,
            ),
            others=(
                compare_scores(
                    f"exact match with the {wrong}",
                    answers[PRETRAINED],
                    answers[wrong],
                    "questions",
                    baseline=PRETRAINED,
                ),
            ),
            facts=(
                f"A passage is {kept['bytes_per_passage'] / 1024:.0f} KiB in the bank, "
                f"{kept['bytes_per_passage'] / kept['text_bytes']:.0f} times its text; bfloat16 storage changes a "
                f"gradient by {100 * kept['error']:.2f} %",
            ),
            table=[
                {
                    "setting": name,
                    **{metric: f"{results.scores(TASK, own)[metric]:.1f}" for metric in ("exact_match", "f1")},
                }
                for name, own in names.items()
            ],
        )

    def tables(self) -> Mapping[str, Sequence[Mapping[str, str]]]:
        """Comparison of settings, storage cost, and answers with their retrieved passages."""
        stored = [
            {
                "precision": row["precision"],
                "bytes per passage": f"{row['bytes_per_passage']:,}",
                "bytes per passage in the folder": f"{row['folder_bytes']:,.0f}",
                "bytes of the text": f"{row['text_bytes']:.0f}",
                "relative error": f"{100 * row['error']:.3f} %",
            }
            for row in read_json(self.folder / STORAGE_FILE)
        ]
        return {
            f"Questions about held-out people ({self._asked} of them)": self.summary().table,
            "One passage in the bank": stored,
            "Answers with their retrieved passages": self._examples(),
        }

    @property
    def _run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    @property
    def _questions(self) -> Path:
        return (self.folder / "questions").resolve()

    @property
    def _index(self) -> Path:
        return (self.folder / "index").resolve()

    @property
    def _bank(self) -> Path:
        return (self._run.artifacts / "bank").resolve()

    @property
    def _asked(self) -> int:
        return 6 if self.quick else HELD_OUT_QUESTIONS

    @cached_property
    def _method(self) -> ReGrad:
        return ReGrad(
            rank=8,
            initial_step_size=0.1,
            passages=1,
            prompt="simple",
            answer_end="newline",
            bank=str(self._bank),
            index=str(self._index),
        )

    @property
    def _evaluation(self) -> EvaluationSettings:
        return EvaluationSettings(tasks=(TASK,), max_new_tokens=8, batch_size=64, limit=self._asked)

    def _retrieve(self) -> None:
        if not self._index.exists():
            build_embedded(self.world / "dpr" / "psgs_w100.tsv", self._index)
        index, folder = EmbeddedIndex(self._index), self._questions / "popqa"
        folder.mkdir(parents=True, exist_ok=True)
        # the first rows are reserved for evaluation
        for split, start, end in (("dev", None, HELD_OUT_QUESTIONS), ("train", HELD_OUT_QUESTIONS, None)):
            path = folder / f"{split}.json"
            if not path.exists():
                augment(DATASETS["popqa"], self.world, path, index, split=split, top_k=1, start=start, end=end)
        check_leakage(folder / "train.json", [folder / "dev.json"])

    def _learn(self) -> None:
        training = TrainingSettings(
            tasks=(TASK,),
            max_steps=self.steps(SHORT_STEPS, STEPS),
            learning_rate=1e-2,
            warmup_ratio=0.1,
            max_grad_norm=0.5,
            per_device_train_batch_size=16,
            save_steps=100,
            logging_steps=20,
            max_input_tokens=64,
            max_target_tokens=8,
        )
        if not self._run.model.exists():
            model, tokenizer = load_model(shipped_model(MODEL), dtype="float32")
            save(convert(model, self._method, tokenizer=tokenizer), self._run.path)
        write_run(
            self._run.run_file,
            RunConfig(
                model=shipped_model(MODEL),
                method={"name": "regrad", **to_plain(self._method.config)},
                data=str(self._questions),
                train=training,
                evaluate=self._evaluation,
            ),
        )
        train(load(self._run.path), training, data=self._questions, run=self._run.path)

    def _encode(self) -> None:
        encoder = self._encoder(load(self._run.path))
        bank, index = encoder.open_bank(self._bank), EmbeddedIndex(self._index)
        encode_passages(encoder, bank, index.all_passages(), total=len(index))

    def _answer(self) -> None:
        converted = load(self._run.path)
        before = weights_digest(converted.model)
        sweep(converted, POINTS, self._evaluation, data=self._questions, run=self._run.path)
        write_json(
            self.folder / CHECK_FILE,
            {
                "before": before,
                "after": weights_digest(converted.model),
                "dense_bytes": weight_bytes(load_model(shipped_model(MODEL), dtype="float32")[0]),
                "bytes": weight_bytes(converted.model),
                "answers": len(POINTS) * self._asked,
                "passages": len(GradientBank(self._bank)),
            },
        )

        write_json(self.folder / TIMES_FILE, self._answer_times(converted))

    def _answer_times(self, converted: Converted) -> dict[str, list[float]]:
        """Seconds of answers without and with gradients, in turns after one round that is not counted."""
        settings = replace(self._evaluation, limit=min(TIMED, self._asked))
        times: dict[str, list[float]] = {PRETRAINED: [], REGRAD: []}
        for _ in range(ROUNDS + 1):
            for name, seconds in times.items():
                (row,) = sweep(converted, [ROWS[name]], settings, data=self._questions).rows
                seconds.append(row.seconds)
        return {name: seconds[1:] for name, seconds in times.items()}

    def _store(self) -> None:
        converted, index = load(self._run.path), EmbeddedIndex(self._index)
        passages = list(islice(index.all_passages(), 16 if self.quick else COMPARED))
        encoder, names = self._encoder(converted), [passage.id for passage in passages]
        gradients = encoder.encode(passages)
        found: list[dict[str, Any]] = []
        exact: Tensor | None = None
        for precision in PRECISIONS:
            bank = encoder.open_bank(self.folder / "storage" / precision, precision=precision)
            bank.append(gradients)
            bank.compact()
            stored, size = bank.get(names), bank.stats()  # stored: [passages numbers]
            exact = stored if exact is None else exact
            errors = (stored - exact).square().sum(1).sqrt() / exact.square().sum(1).sqrt()  # [passages]
            found.append(
                {
                    "precision": precision,
                    "bytes_per_passage": size["bytes_per_record"],
                    "folder_bytes": size["bytes"] / size["records"],
                    "text_bytes": sum(len(passage.text.encode()) for passage in passages) / len(passages),
                    "error": float(errors.mean()),
                }
            )
        write_json(self.folder / STORAGE_FILE, found)

    def _encoder(self, converted: Converted) -> PassageEncoder:
        return PassageEncoder(converted.model, required_tokenizer(converted), self._method.config, batch_size=32)

    def _examples(self) -> list[Mapping[str, str]]:
        questions = json.loads((self._questions / "popqa" / "dev.json").read_text(encoding="utf-8"))
        passages = {row["question"]: row["passages"][0] for row in questions if row["passages"]}
        shown = {name: point for name, point in ROWS.items() if point is not IN_THE_PROMPT}
        return [
            {
                "question": sample.input,
                "retrieved passage": passages.get(sample.input, "none"),
                "expected": sample.answers[0],
                **{name: sample.predictions.get(label(point), "") or "(nothing)" for name, point in shown.items()},
            }
            for sample in Results.read(self._run.results_file).samples
        ]


PART = ReGradPart
