"""The settings of training. Names are those of `transformers.TrainingArguments` wherever it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftwork.errors import ConfigError
from graftwork.settings.lengths import apply_profile, sequences_per_step


@dataclass(frozen=True)
class TrainingSettings:
    """What is trained on, and how."""

    tasks: tuple[str, ...] = ()
    """Tasks to train on, by name, or prepared JSON-lines files; several are mixed in proportion to their size."""
    mixture: str | None = None
    """Mixture to train on instead of tasks; each of its tasks is drawn in proportion to its rate, again and again."""
    split: str = "train"
    """Split to train on."""
    lowercase: bool = False
    """Lower-case inputs and targets; recommended for UnifiedQA checkpoints, which were trained so."""
    take: int | None = None
    """Train on this many examples of each task, chosen by hash, the same ones and more for a larger number."""
    subset_seed: int | None = None
    """Draws other subsets where a task takes or skips some of its examples; null for the seed of the run."""
    mode: Literal["fixed", "reference"] = "fixed"
    """reference words tasks as their authors' code does, known defects included."""
    lengths: str | None = None
    """Length profile that sets max_input_tokens and max_target_tokens: cos_e, esnli, movie_rationales or
    eraser_multi_rc."""
    max_input_tokens: int = 512
    """Longer inputs are cut."""
    max_target_tokens: int = 100
    """Longer targets are cut."""
    max_steps: int = -1
    """Optimiser steps; -1 leaves it to num_train_epochs."""
    num_train_epochs: float = 3.0
    """Passes over the data, where max_steps is -1."""
    learning_rate: float = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """Shape of the learning rate over steps: linear, constant, cosine, constant_with_warmup, …"""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    warmup_ratio: float | None = None
    """The same as a share of all steps, rounded to the nearest whole number; null goes by warmup_steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    optim: str = "adamw_torch"
    """Optimiser, as TrainingArguments calls it."""
    adafactor_scale_parameter: bool = True
    """With optim adafactor: multiply a step by the size of its parameter, as T5 was trained. Off is a common recipe
    whose steps are much larger."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null does not clip."""
    per_device_train_batch_size: int = 8
    """Examples per device and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    tokens_per_batch: int | None = None
    """Tokens of one optimiser step: as many sequences as fit, each counted at its longest side, in forward passes of at
    most per_device_train_batch_size; replaces gradient_accumulation_steps. null counts examples."""
    packing: bool = False
    """Put several examples into one row of max_input_tokens, kept apart by masks. Same loss, less padding."""
    train_sampling_strategy: str = "random"
    """Order of the examples: random, or group_by_length, which pads less."""
    bf16: bool = False
    """Compute in bfloat16, keep weights in float32."""
    fp16: bool = False
    """Compute in float16 with loss scaling, keep weights in float32."""
    gradient_checkpointing: bool = False
    """Store layer inputs only and recompute the rest in the backward pass."""
    logging_steps: int = 10
    """Steps between two lines of the log."""
    save_steps: int = 500
    """Steps between two checkpoints, from which a stopped run goes on."""
    save_total_limit: int | None = 1
    """Checkpoints kept."""
    validation: float | str | None = None
    """What is scored on the way: a share of the training examples, drawn by hash and not trained on, or a split of the
    tasks, such as dev, of every task that has it; null scores nothing."""
    eval_steps: int | None = None
    """Steps between two such scores; null for save_steps."""
    load_best_model_at_end: bool = False
    """End with the weights that scored best on what is held out, by accuracy where there are classes, else by loss; the
    first of equals. Every score needs a checkpoint, and the best one is kept beside save_total_limit others."""
    early_stopping: int | None = None
    """Stop when this many scores in a row have not been better than the best, and end with the weights that scored
    best; null trains to the end."""
    lora: Mapping[str, Any] | None = None
    """Train a LoRA adapter and merge it: fields of peft.LoraConfig, such as {r: 8, target_modules: [q, v]}."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Any further field of TrainingArguments, such as fsdp, deepspeed or report_to."""

    def __post_init__(self) -> None:
        """Refuse what would only fail after the model has been loaded.

        Raises:
            ConfigError: If a number is out of range, or tasks and a mixture are both given.
        """
        apply_profile(self, "max_input_tokens", "max_target_tokens")
        if self.tasks and self.mixture is not None:
            raise ConfigError(f"Found tasks {', '.join(self.tasks)} and mixture {self.mixture!r}. Give one of the two.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps is {self.max_steps}. Expected a whole number from 1, or -1 to go by epochs.")
        positive = (
            "take",
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
        if self.bf16 and self.fp16:
            raise ConfigError("bf16 and fp16 are both on. Switch one of them off.")
        if self.packing and self.train_sampling_strategy != "random":
            raise ConfigError("packing and train_sampling_strategy are both set. Packing fills rows anyway; drop one.")
        own = set(self.__dataclass_fields__) | {"output_dir", "seed", "remove_unused_columns"}
        if clash := sorted(own & set(self.arguments)):
            raise ConfigError(f"arguments holds {', '.join(clash)}, which has a setting of its own. Move it there.")

    def _check_validation(self) -> None:
        if self.validation is None:
            if self.eval_steps is not None or self.keeps_best:
                raise ConfigError(
                    "eval_steps, load_best_model_at_end or early_stopping is set and validation is null. Say what to "
                    "score: a share of the training examples to hold out, such as 0.1, or a split, such as dev."
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
        """Whether training ends with the weights that scored best."""
        return self.load_best_model_at_end or self.early_stopping is not None

    @property
    def steps_between_scores(self) -> int:
        """Steps after which what is held out is scored, settled."""
        return self.eval_steps or self.save_steps

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all accumulated passes of one process."""
        micro, accumulation = self.passes()
        return micro * accumulation

    def passes(self, processes: int = 1) -> tuple[int, int]:
        """Sequences of one forward pass, and forward passes of one optimiser step, on each of some processes.

        Raises:
            ConfigError: If the sequences of a step cannot be shared out evenly.
        """
        if self.tokens_per_batch is None:
            return self.per_device_train_batch_size, self.gradient_accumulation_steps
        sequences = sequences_per_step(
            self.tokens_per_batch, self.max_input_tokens, self.max_target_tokens, exact=self.mode == "reference"
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
