"""Settings of evaluation and prediction. Torch-free, so that the command line starts quickly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.settings.fields import DataFields
from graftwork.settings.lengths import GENERAL, NEW_TOKENS, apply_profile, sequences_per_step

_OF_LM_EVAL = ("include_path", "num_fewshot", "apply_chat_template")
"""Settings that tasks of lm-eval alone have."""
_COUNTS = ("limit", "max_input_tokens", "max_new_tokens", "batch_size", "tokens_per_batch", "num_beams", "workers")
"""Settings that are whole numbers from 1."""
_OF_BOTH = ("lm_eval", "limit", "batch_size", "baseline", "cost_lengths")
"""Settings that apply to tasks of lm-eval as to others."""


@dataclass(frozen=True)
class EvaluationSettings(DataFields):
    """Tasks to evaluate, and generation of their answers."""

    tasks: tuple[str, ...] = ()
    """Tasks to evaluate: task names, data files, hub:ID, or mixtures (all of their tasks that have a metric)."""
    split: str = "dev"
    """Split to evaluate: dev while choosing settings, test for final numbers."""
    lowercase: bool = False
    """Lower-case inputs and answers. Turn it on for UnifiedQA checkpoints, which were trained on lower-cased text;
    leave it off to reproduce the paper's tables."""
    limit: int | None = None
    """Evaluate only the first rows, for a quick check; scores are means over these rows. null evaluates all rows."""
    mode: Literal["fixed", "reference"] = "fixed"
    """fixed formats, parses and scores tasks with the defects of the authors' code corrected. Choose reference, which
    keeps them, to compare with published numbers."""
    lengths: str | None = None
    """Length profile that sets max_input_tokens and max_new_tokens: cos_e, esnli, movie_rationales, eraser_multi_rc.
    null uses the lengths of the run's training, else those that each task declares."""
    prompt: str | None = None
    """Task whose template formats the inputs of a file: JSON lines with the fields of the task, or one text per
    line."""
    explain: bool | None = None
    """true asks for an explanation, by the prefix explain before the input; false asks for the label only; null leaves
    inputs unchanged."""
    max_input_tokens: int | None = None
    """Maximum input length; longer inputs are truncated, and counted. null uses the length of the run's training, else
    the one that each task declares (512 if it declares none)."""
    max_new_tokens: int | None = None
    """Maximum number of generated tokens. null uses the number that the task declares (19 for the published tables of
    UnifiedQA), else the target length of the run's training or of the task."""
    batch_size: int = 32
    """Number of inputs per generation batch; lower it if memory runs out."""
    tokens_per_batch: int | None = None
    """Token budget of a generation batch, each input counted at the larger of max_input_tokens and max_new_tokens;
    replaces batch_size, which null uses."""
    workers: int | None = None
    """Number of Ray actors that answer, each with a model of its own; the answers are those of one process. null
    answers in this process, or in those of torchrun."""
    gpus_per_worker: float = 0.0
    """GPUs that each of the workers reserves and computes on; 0 for the CPU, 0.5 for two workers per GPU."""
    num_beams: int = 1
    """Number of beams; 1 is greedy search, more is slower and may improve free text."""
    temperature: float | None = None
    """Sampling temperature; 1 samples from the model's own distribution, lower values prefer likely tokens. null is
    greedy search, unless top_p or top_k is set."""
    top_p: float | None = None
    """Nucleus sampling: sample from the most likely tokens that together reach this probability; null uses all."""
    top_k: int | None = None
    """Sample from this many most likely tokens; null uses all."""
    seed: int | None = None
    """Seed of sampling, combined with the id of each input: the same seed gives the same answers, in any batch. null is
    0."""
    official: bool = False
    """Use the metrics of the data set's publishers instead of exact match and F1, to compare with leaderboards."""
    baseline: bool = False
    """Also evaluate the unconverted dense model, with the same code, as the baseline."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-eval, scored by its own code: names, groups, patterns such as mmlu_*, or YAML files. The
    extra lm-eval is needed; limit, batch_size and baseline apply to them too."""
    include_path: str | None = None
    """Folder with YAML files of further tasks for lm_eval. null uses those of lm-eval only."""
    num_fewshot: int | None = None
    """Number of examples in the prompts of lm_eval; null uses that of each task."""
    apply_chat_template: bool = False
    """Format the prompts of lm_eval with the chat template of the tokenizer. Choose it for instruction-tuned models."""
    cost_lengths: tuple[int, ...] = ()
    """Sequence lengths at which time and memory of the converted and the dense model are measured; empty measures
    none."""

    def __post_init__(self) -> None:
        """Validate the settings.

        Raises:
            ConfigError: If a number is out of range, or a setting would have no effect.
        """
        super().__post_init__()
        apply_profile(self, "max_input_tokens", "max_new_tokens")
        self._check_sampling()
        self._check_lm_eval()
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}. Expected a whole number from 1.")
        if self.gpus_per_worker < 0 or (self.gpus_per_worker and self.workers is None):
            raise ConfigError(
                f"gpus_per_worker is {self.gpus_per_worker:g}. Expected a number from 0, which has an effect beside "
                "workers only."
            )
        if any(length < 1 for length in self.cost_lengths):
            raise ConfigError(f"cost_lengths is {list(self.cost_lengths)}. Expected whole numbers from 1.")

    def _check_sampling(self) -> None:
        if self.temperature is not None and not (isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature is {self.temperature}. Expected a number above 0; leave it out, or set null, for greedy "
                "search."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Expected a share above 0, up to 1; null uses all tokens.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}. Expected a whole number from 1; null uses all tokens.")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed is {self.seed}. Expected a whole number from 0 below {1 << 63}.")
        if self.seed is not None and not self.samples:
            raise ConfigError(
                f"seed is {self.seed}, which has no effect on greedy search. Expected temperature, top_p or top_k "
                "beside it. Set one of them, or leave seed out."
            )
        if self.samples and self.num_beams > 1:
            raise ConfigError(
                f"num_beams is {self.num_beams}, and {', '.join(self.sampling)} is set. Beam search does not sample. "
                "Leave out one of the two."
            )

    def _check_lm_eval(self) -> None:
        """Refuse settings without effect: those of lm-eval without its tasks, and most others without other tasks."""
        given = [name for name in _OF_LM_EVAL if getattr(self, name) not in (None, False)]
        if given and not self.lm_eval:
            raise ConfigError(
                f"{given[0]} is {getattr(self, given[0])}, which has an effect on tasks of lm-eval only. Name some "
                "with lm_eval (--lm-eval), or leave it out."
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot is {self.num_fewshot}. Expected a whole number from 0.")
        if not self.lm_eval or self.tasks:
            return
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in (*_OF_LM_EVAL, *_OF_BOTH) and value != entry.default:
                raise ConfigError(
                    f"{entry.name} is {value}, which has no effect on tasks of lm-eval; their YAML files set it. "
                    "Leave it out, or name other tasks too."
                )

    @property
    def input_limit(self) -> int:
        """Maximum input length, by default that of tasks that declare none."""
        return GENERAL.input if self.max_input_tokens is None else self.max_input_tokens

    @property
    def answer_limit(self) -> int:
        """Maximum number of generated tokens, by default that of tasks that declare none."""
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling settings that are set, by name; empty for greedy and beam search."""
        names = ("temperature", "top_p", "top_k", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def samples(self) -> bool:
        """True if answers are sampled."""
        return not (self.temperature is None and self.top_p is None and self.top_k is None)

    @property
    def rows_at_once(self) -> int:
        """Number of inputs per generation batch, from tokens_per_batch or batch_size."""
        if self.tokens_per_batch is None:
            return self.batch_size
        return sequences_per_step(self.tokens_per_batch, self.input_limit, self.answer_limit)
