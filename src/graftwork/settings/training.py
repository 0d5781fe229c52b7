"""Settings of training; names follow `transformers.TrainingArguments` where it has the same setting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftwork.errors import ConfigError
from graftwork.settings.fields import DataFields
from graftwork.settings.lengths import GENERAL, apply_profile, sequences_per_step


@dataclass(frozen=True)
class TrainingSettings(DataFields):
    """Training data, optimisation and validation."""

    tasks: tuple[str, ...] = ()
    """Tasks to train on: task names, data files, or hub:ID. Several are mixed in proportion to their
    size; use a mixture for other proportions."""
    mixture: str | None = None
    """Mixture to train on instead of tasks: each task is sampled in proportion to its rate, and repeated as needed. A
    name, or a file NAME.mixture.yaml with name and rates of task files and registered tasks."""
    mixing_maximum: int | None = None
    """Number of examples above which a task counts as no larger when its share of the training is computed; for several
    tasks, or a mixture with rates by size. null uses the sizes themselves."""
    mixing_temperature: float | None = None
    """Sample each task in proportion to its size to the power of 1 / temperature; above 1, small tasks are sampled more
    often than their size, and repeated. For several tasks, or a mixture with rates by size; null is 1."""
    split: str = "train"
    """Split to train on."""
    lowercase: bool = False
    """Lower-case inputs and targets. Turn it on for UnifiedQA checkpoints, which were trained on lower-cased text."""
    take: int | None = None
    """Number of training examples per task, for learning curves; chosen by hash, so that a larger number includes the
    examples of a smaller one. null uses all."""
    subset_seed: int | None = None
    """Seed of the subsets that take and the tasks select; set it to keep the subset while the seed of the run varies.
    null uses the seed of the run."""
    explanations: int | None = None
    """Own explained data: number of training rows that keep their explanation, chosen by hash; the others are trained
    with their label alone. null keeps all explanations."""
    mode: Literal["fixed", "reference"] = "fixed"
    """fixed formats tasks with the defects of the authors' code corrected. Choose reference, which keeps them, to
    reproduce published training runs."""
    lengths: str | None = None
    """Length profile that sets max_input_tokens and max_target_tokens: cos_e, esnli, movie_rationales or
    eraser_multi_rc. null uses the lengths that the tasks declare."""
    max_input_tokens: int | None = None
    """Maximum input length; longer inputs are truncated, and counted. Lower it to save memory; null uses the length
    that the tasks declare, the largest of several (512 if they declare none)."""
    max_target_tokens: int | None = None
    """Maximum target length; longer targets are truncated, and counted. null uses the length that the tasks declare
    (100 if they declare none)."""
    max_steps: int = -1
    """Number of optimiser steps; -1 uses num_train_epochs instead."""
    num_train_epochs: float = 3.0
    """Number of epochs; used if max_steps is -1."""
    learning_rate: float = 5e-5
    """Peak learning rate. Typical: 5e-5 for full fine-tuning, 1e-4 to 1e-3 for LoRA and for T5."""
    lr_scheduler_type: str = "linear"
    """Learning rate schedule: linear, constant, cosine, constant_with_warmup, … as in TrainingArguments."""
    warmup_steps: int = 0
    """Number of warm-up steps, over which the learning rate rises from 0 to its peak."""
    warmup_ratio: float | None = None
    """Warm-up as a fraction of all steps, rounded to the nearest integer; null uses warmup_steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay coefficient."""
    optim: str = "adamw_torch"
    """Optimiser, by its name in TrainingArguments: adamw_torch, or adafactor for T5 and for less optimiser memory."""
    adafactor_scale_parameter: bool = True
    """With optim adafactor: scale each update by the RMS of its parameter, as in T5's training. Off is a common recipe
    with much larger updates, which needs a smaller learning rate."""
    max_grad_norm: float | None = 1.0
    """Maximum gradient norm; larger gradients are clipped. null disables clipping."""
    per_device_train_batch_size: int = 8
    """Number of examples per device and forward pass; lower it if memory runs out."""
    gradient_accumulation_steps: int = 1
    """Number of forward passes per optimiser step; raise it to keep the effective batch size with less memory."""
    tokens_per_batch: int | None = None
    """Token budget of one optimiser step, each sequence counted at the larger of max_input_tokens and
    max_target_tokens; use it for recipes that state the batch size in tokens, as T5's do. It replaces
    gradient_accumulation_steps; per_device_train_batch_size stays the upper limit of a forward pass. null counts
    examples."""
    packing: bool = False
    """Pack several examples into one row, of max_input_tokens for an encoder and with the targets for a decoder,
    separated by masks. The loss is the same with less padding; turn it on when examples are much shorter than a row."""
    train_sampling_strategy: str = "random"
    """Order of the examples: random, or group_by_length, which reduces padding when lengths vary."""
    bf16: bool = False
    """Mixed precision in bfloat16, weights in float32; prefer it where the hardware supports it."""
    fp16: bool = False
    """Mixed precision in float16 with loss scaling, weights in float32; for GPUs without bfloat16. T5 may overflow."""
    gradient_checkpointing: bool = False
    """Keep only layer inputs and recompute activations in the backward pass: less memory, about a third more time."""
    logging_steps: int = 10
    """Number of steps between log entries."""
    save_steps: int = 500
    """Number of steps between checkpoints, from which an interrupted run resumes."""
    save_total_limit: int | None = 1
    """Maximum number of checkpoints kept; null keeps all."""
    validation: float | str | None = None
    """Validation data, scored during training: a fraction of the training examples, selected by hash and held out, or a
    split such as dev, of every task that has it. Use a fraction if dev is reported as a result; null disables
    validation."""
    eval_steps: int | None = None
    """Number of steps between validations; null uses save_steps."""
    load_best_model_at_end: bool = False
    """Load the checkpoint with the best validation score at the end: by accuracy for classification, else by loss; the
    earliest of equals. Every validation writes a checkpoint, and the best one is kept in addition to
    save_total_limit."""
    early_stopping: int | None = None
    """Patience: stop after this many consecutive validations without improvement, and load the best checkpoint; null
    trains to the end."""
    lora: Mapping[str, Any] | None = None
    """Train a LoRA adapter and merge it into the weights, for less optimiser memory: fields of peft.LoraConfig, such as
    {r: 8, target_modules: [q, v]}. null trains all parameters."""
    lora_adapter: bool = False
    """Also write the LoRA adapter as a folder of PEFT, adapter/ in the run, for programs that serve adapters; where the
    model before training is a graft, adapter/base contains it. Off keeps the merged weights only."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of TrainingArguments, such as fsdp, deepspeed or report_to."""

    @property
    def input_limit(self) -> int:
        """Maximum input length, by default that of tasks that declare none."""
        return GENERAL.input if self.max_input_tokens is None else self.max_input_tokens

    @property
    def target_limit(self) -> int:
        """Maximum target length, by default that of tasks that declare none."""
        return GENERAL.target if self.max_target_tokens is None else self.max_target_tokens

    @property
    def shards_weights(self) -> bool:
        """True if the Trainer distributes the weights of one model over processes, by FSDP or DeepSpeed."""
        launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED"))
        return any(map(self.arguments.get, ("fsdp", "deepspeed"))) or "true" in launched

    def __post_init__(self) -> None:
        """Validate the settings before a model is loaded.

        Raises:
            ConfigError: If a number is out of range, or two settings exclude each other.
        """
        super().__post_init__()
        apply_profile(self, "max_input_tokens", "max_target_tokens")
        if self.tasks and self.mixture is not None:
            raise ConfigError(f"Found tasks {', '.join(self.tasks)} and mixture {self.mixture!r}. Give one of the two.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps is {self.max_steps}. Expected a whole number from 1, or -1 to go by epochs.")
        positive = (
            "take",
            "mixing_maximum",
            "mixing_temperature",
            "explanations",
            "max_input_tokens",
            "max_target_tokens",
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "learning_rate",
            "tokens_per_batch",
            "max_grad_norm",
            "eval_steps",
            "early_stopping",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}. Expected a number above 0.")
        if self.warmup_ratio is not None and (not 0 <= self.warmup_ratio < 1 or self.warmup_steps):
            raise ConfigError(
                f"warmup_ratio is {self.warmup_ratio} and warmup_steps is {self.warmup_steps}. Expected a share from 0 "
                "to below 1, and only one of the two."
            )
        self._check_validation()
        if self.explanations is not None and self.text_field is None:
            raise ConfigError(
                f"explanations is {self.explanations}, which has an effect on own explained data only. Name its "
                "columns with text_field, label_field, and explanation_field or spans_field, or leave it out."
            )
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 are both on. Switch one of them off.")
        if self.packing and self.train_sampling_strategy != "random":
            raise ConfigError("packing and train_sampling_strategy are both set. Packing fills rows anyway; drop one.")
        own = set(self.__dataclass_fields__) | {"output_dir", "seed", "remove_unused_columns"}
        if self.lora_adapter and self.lora is None:
            raise ConfigError("lora_adapter is on and lora is null, so that there is no adapter. Set lora, or drop it.")
        if clash := sorted(own & set(self.arguments)):
            raise ConfigError(f"arguments holds {', '.join(clash)}, which has a setting of its own. Move it there.")

    def _check_validation(self) -> None:
        if self.validation is None:
            if self.eval_steps is not None or self.keeps_best:
                raise ConfigError(
                    "eval_steps, load_best_model_at_end or early_stopping is set and validation is null. Set "
                    "validation to a share of the training examples to hold out, such as 0.1, or to a split, such "
                    "as dev."
                )
            return
        if not isinstance(self.validation, str) and not 0 < self.validation < 1:
            raise ConfigError(
                f"validation is {self.validation}. Expected a share above 0 and below 1, or a split's name; null for "
                "none."
            )
        if self.keeps_best and self.save_steps != self.steps_between_scores:
            raise ConfigError(
                f"eval_steps is {self.eval_steps} and save_steps is {self.save_steps}. With load_best_model_at_end "
                "every score needs a checkpoint; set both to the same number."
            )

    @property
    def keeps_best(self) -> bool:
        """True if training ends with the best checkpoint."""
        return self.load_best_model_at_end or self.early_stopping is not None

    @property
    def steps_between_scores(self) -> int:
        """Number of steps between validations: eval_steps, or save_steps if it is null."""
        return self.eval_steps or self.save_steps

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences per optimiser step of one process, over all accumulated forward passes."""
        micro, accumulation = self.passes()
        return micro * accumulation

    def passes(self, processes: int = 1) -> tuple[int, int]:
        """Number of sequences per forward pass and of forward passes per optimiser step, for each process.

        Raises:
            ConfigError: If the sequences of a step cannot be divided evenly among the processes.
        """
        if self.tokens_per_batch is None:
            return self.per_device_train_batch_size, self.gradient_accumulation_steps
        sequences = sequences_per_step(
            self.tokens_per_batch, self.input_limit, self.target_limit, exact=self.mode == "reference"
        )
        if sequences % processes:
            raise ConfigError(
                f"tokens_per_batch is {self.tokens_per_batch}, which is {sequences} sequences a step for {processes} "
                "processes. Expected a multiple of these; change it or the number of processes."
            )
        share = sequences // processes
        micro = max(
            size for size in range(1, share + 1) if share % size == 0 and size <= self.per_device_train_batch_size
        )
        return micro, share // micro
