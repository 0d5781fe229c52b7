"""Memory that a method needs on a model in training and in inference, before either starts."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core.devices import CPU, place
from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import Calibrates, StoresPassages
from graftwork.grafting.method import Method
from graftwork.metrics.fake_tensors import fake_tensors
from graftwork.metrics.memory import MemoryRecorder
from graftwork.pipeline.estimation.building import fake_converted, read_config
from graftwork.pipeline.estimation.inference import InferenceMemory, measure_inference
from graftwork.pipeline.estimation.training import TrainingMemory, measure_training
from graftwork.pipeline.model_files import stored_type
from graftwork.pipeline.phases import phases_of, with_lora
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.quantised import check_trained
from graftwork.training.batching import BatchSize
from graftwork.training.phases import Phase

DENSE_LORA = {"r": 16, "target_modules": "all-linear"}
"""Adapter of the row `lora` of a comparison, unless the training settings have one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Properties of an estimate besides the method and its settings."""

    device: str = "cuda"
    """Type of device: its kernels and its alignment of memory decide."""
    dtype: str | None = None
    """Data type of the weights; null for that of the checkpoint, or of a CPU without instructions for it."""
    labels: tuple[str, ...] | None = None
    """Class labels of an encoder's classification head."""
    passage_tokens: int = 256
    """Number of tokens of a passage, for methods that read passages."""


@dataclass(frozen=True, slots=True)
class Row:
    """Estimated memory of one way to use a model, in bytes."""

    name: str
    parameters: int
    """Number of parameters, not bytes."""
    trained: int
    """Number of trained parameters of the phase with the highest peak, not bytes."""
    phase: str
    """Training phase with the highest peak."""
    training: TrainingMemory | None
    """Memory of that phase; None if nothing is trained."""
    inference: InferenceMemory | None
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes on disk of all passages, by place."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "label": "estimated"}


@contextmanager
def recording(recorder: MemoryRecorder | None = None) -> Generator[MemoryRecorder]:
    """Fake tensors whose memory is recorded, by a new recorder by default; warnings of transformers are hidden."""
    noisy = logging.getLogger("transformers")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with fake_tensors(), recorder or MemoryRecorder() as found:
            yield found
    finally:
        noisy.setLevel(before)


class Estimator:
    """Estimates for one model; every call builds the model anew, without weights.

    Args:
        model: Hub id, folder, run folder or `config.json`; or a configuration of transformers.
        shape: Device, data type and lengths.
    """

    def __init__(self, model: Any, shape: Shape) -> None:
        self.config = read_config(model) if isinstance(model, (str, Path)) else model
        self.shape = shape
        chosen = shape.dtype
        if chosen is None and shape.device == CPU and (stored := stored_type(self.config)) is not None:
            chosen = place(stored, device=CPU).dtype
        self.dtype = _dtype(chosen, self.config)

    def training(
        self, methods: Sequence[Method[Any]], settings: TrainingSettings
    ) -> tuple[str, int, TrainingMemory | None]:
        """Return name, trained parameters and memory of the phase with the highest peak."""
        best: tuple[str, int, TrainingMemory | None] = ("", 0, None)
        size = BatchSize(
            settings.passes()[0],
            settings.input_limit,
            settings.target_limit,
            self.shape.passage_tokens,
        )
        for number in range(self._phase_count(methods)):
            with recording() as recorder:
                converted = self._converted(methods)
                phase = phases_of(converted)[number]
                model: nn.Module = with_lora(converted.model, phase.settings(settings).lora)
                if not _trains(model, phase):
                    continue
                memory = measure_training(model, phase, settings, size, recorder, SampleTokenizer())
                trained = sum(p.numel() for group in phase.parameters(model) for p in group.parameters)
            if best[2] is None or memory.peak > best[2].peak:
                best = (phase.name, trained, memory)
        return best

    def inference(
        self, methods: Sequence[Method[Any]], settings: EvaluationSettings
    ) -> tuple[int, InferenceMemory, Mapping[str, int]]:
        """Return parameters, memory of inference, and bytes of one passage on disk."""
        size = BatchSize(settings.rows_at_once, settings.input_limit, settings.answer_limit)
        stored: dict[str, int] = {}
        with recording() as recorder:
            converted = self._converted(methods)
            model: nn.Module = converted.model
            parameters = sum(parameter.numel() for parameter in model.parameters())
            memory = measure_inference(converted, size, recorder)
        for method in methods:
            if isinstance(method, StoresPassages):
                stored |= method.passage_bytes(model)
        return parameters, memory, stored

    def row(
        self,
        name: str,
        methods: Sequence[Method[Any]],
        train: TrainingSettings,
        evaluate: EvaluationSettings,
        passages: int,
    ) -> Row:
        """Return the estimate of one way to use the model.

        Args:
            name: Name of the row.
            methods: Methods on the model.
            train: Settings of the training.
            evaluate: Settings of inference.
            passages: Number of stored passages.
        """
        phase, trained, training = self.training(methods, train)
        parameters, inference, stored = self.inference(methods, evaluate)
        kept = {place: each * passages for place, each in stored.items()} if passages else {}
        return Row(name, parameters, trained, phase, training, inference, kept)

    def _converted(self, methods: Sequence[Method[Any]]) -> Any:
        return fake_converted(
            self.config, methods, dtype=self.dtype, device=self.shape.device, labels=self.shape.labels
        )

    def _phase_count(self, methods: Sequence[Method[Any]]) -> int:
        with recording():
            return len(phases_of(self._converted(methods)))


def estimate(
    model: Any,
    method: Method[Any] | Sequence[Method[Any]] | None = None,
    *,
    train: TrainingSettings | None = None,
    evaluate: EvaluationSettings | None = None,
    shape: Shape | None = None,
    passages: int = 0,
    compare: bool = True,
) -> list[Row]:
    """Estimate the memory of training and inference by running the real code on tensors without values.

    No weights are read and no device is needed. Figures cover tensors; a CUDA context, workspaces of libraries and
    fragmentation come on top.

    Args:
        model: Hub id, folder, run folder, `config.json`, or a configuration of transformers.
        method: Method, or several; None for the untouched model.
        train: Settings of the training: batch size, lengths, optimiser, precision, checkpointing, LoRA.
        evaluate: Settings of inference: batch size, lengths.
        shape: Device, data type and lengths.
        passages: Number of passages that a method stores.
        compare: Add the untouched model, trained in full and with LoRA.

    Returns:
        The method first, then `dense` and `lora`.

    Raises:
        ConfigError: If there is no configuration, or a setting of the method is still open.
    """
    methods = [] if method is None else [method] if isinstance(method, Method) else list(method)
    for each in methods:
        if isinstance(each, Calibrates) and each.needs_calibration:
            raise ConfigError(
                f"A setting of {each.name} is chosen from examples, which an estimate does not read. Give a number."
            )
    estimator = Estimator(model, shape or Shape())
    return comparison(
        estimator, methods, train or TrainingSettings(), evaluate or EvaluationSettings(), passages, compare=compare
    )


def comparison(
    estimator: Estimator,
    methods: Sequence[Method[Any]],
    train: TrainingSettings,
    evaluate: EvaluationSettings,
    passages: int,
    *,
    compare: bool,
) -> list[Row]:
    """Return the rows of `estimate`.

    Args:
        estimator: Estimates of the model.
        methods: Methods on the model.
        train: Settings of the training.
        evaluate: Settings of inference.
        passages: Number of stored passages.
        compare: Add the untouched model, trained in full and with LoRA.
    """
    rows: list[Row] = []
    if methods:
        rows.append(estimator.row("+".join(each.name for each in methods), methods, train, evaluate, passages))
    if compare or not methods:
        rows.append(estimator.row("dense", (), replace(train, lora=None), evaluate, 0))
    if compare:
        rows.append(estimator.row("lora", (), replace(train, lora=train.lora or DENSE_LORA), evaluate, 0))
    return rows


class SampleTokenizer:
    """Tokenizer for phases that tokenize fixed words; one token per word."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        """Return one token per word of each text."""
        return {"input_ids": [[1] * len(one.split()) for one in text]}


def _trains(model: nn.Module, phase: Phase) -> bool:
    """True if a phase has parameters to train; quantised weights are none."""
    trained = [parameter for group in phase.parameters(model) for parameter in group.parameters]
    try:
        check_trained(model, trained, phase.name)
    except ConfigError:
        return False
    return bool(trained)


def _dtype(name: str | None, config: Any) -> torch.dtype:
    found: Any = name or getattr(config, "dtype", None) or "float32"
    dtype = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype is {found!r}. Expected a name of torch such as bfloat16, float16 or float32.")
    return dtype
