"""Settings of ReGrad: adapted projections, step sizes, meta-training, formatting and answering."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.surgery.layers import parse_layers

Projection = Literal["gate", "up", "down"]
StepSizeMode = Literal["tie", "same", "full", "fix"]
PlainLoss = Literal["text", "text_and_answers", "answers"]


@dataclass(frozen=True)
class ReGradConfig:
    """Adapted projections, step sizes, objective of meta-training, and use of gradients at question time."""

    rank: int = 16
    """Rank of the low-rank pair of each projection. Bank size and adapter capacity grow in proportion; published are
    16, 8 and 4 for models of 1B, 3B and 8B parameters."""
    lora_alpha: float | None = None
    """Numerator of the scale lora_alpha / rank of the low-rank product. null means twice the rank, as published; set it
    only to match an existing adapter."""
    layers: str | None = None
    """Numbers of the adapted layers, from 0, such as "8-15". null means the upper half; more layers make gradients
    larger and encoding slower."""
    projections: tuple[Projection, ...] = ("gate", "up", "down")
    """Adapted projections of the feed-forward layers. Choose fewer for a smaller bank."""
    step_size_mode: StepSizeMode = "tie"
    """Sharing of learned step sizes: tie (one per adapter tensor), same (one for all), full (one per parameter), fix
    (not learned). tie is the published choice; full learns the most numbers; fix needs no meta-training."""
    initial_step_size: float = 0.01
    """Initial step size, or the constant one with step_size_mode fix."""
    step_size_sign: Literal["free", "positive"] = "free"
    """free allows negative step sizes, as in the original; positive keeps them above 0 by a softplus. Choose positive
    if training drives step sizes below 0."""
    b_std: float = 0.0
    """Standard deviation of the initial values of B. 0, as published, makes the initial model equal the pretrained
    one."""
    meta_order: Literal[1, 2] = 2
    """2 differentiates exactly through the gradient step; 1 treats the gradient as constant. Choose 1 if memory or time
    is short; it learns less."""
    meta_chunk: int | Literal["auto", "all"] = "auto"
    """Number of passages that training differentiates at once, each with a graph of its own in memory. auto takes as
    many as need at most 4 GB of an accelerator or 128 MB of a CPU (estimated), at least one; all keeps the graphs of a
    whole batch, which omits a repeated forward and backward pass. Choose a number if memory is short, or plenty."""
    outer_loss: bool = True
    """Train answers after the gradient step. off trains without any step, with the objective plain_loss, and answers
    without a step; choose it for baselines."""
    plain_loss: PlainLoss = "text"
    """Objective with outer_loss off: text (the text of the passages, standard continual pretraining), text_and_answers
    (both with equal weight, instruction continual pretraining), or answers (fine-tuning)."""
    blind: bool = True
    """Ask questions without passages in the prompt. off includes them, in training and in answering, which makes
    prompts longer."""
    passages: int | None = None
    """Number of passages per question, taken from the top ranks. null means all passages recorded with a question, and
    3 retrieved ones."""
    document_template: str = "{{ text }}"
    """Jinja template of the differentiated text, with the variables `title` and `text`. Gradients depend on it, so a
    change requires a new bank."""
    max_document_tokens: int = 1536
    """Maximum passage length in tokens; longer passages are cut. Gradients depend on it, so a change requires a new
    bank."""
    prompt: str | None = None
    """Prompt family of questions: open, yes_no, choice, simple, or a YAML file. null selects it by the kind of
    question."""
    answer_end: Literal["end_of_turn", "newline"] = "end_of_turn"
    """Token that ends answers in training: end_of_turn of the tokenizer, or newline as in the original. Choose newline
    for base models without turns."""
    select: tuple[str, ...] = ()
    """Augmented question files for checkpoint selection; the best checkpoint becomes the model. Empty keeps the last
    one."""
    select_every: int = 1000
    """Number of updates between evaluations for checkpoint selection; the end of training is always evaluated."""
    select_samples: int | None = 300
    """Number of questions per selection file, from its beginning; null means all. Lower values make selection faster
    and noisier."""
    select_by: Literal["f1", "loss"] = "f1"
    """Criterion of checkpoint selection: f1 (highest mean F1 over files) or loss (lowest mean answer loss, which is
    faster because nothing is generated)."""
    select_new_tokens: int = 20
    """Maximum number of generated tokens per answer during checkpoint selection."""
    seed: int = 0
    """Random seed of the adapter initialisation."""
    bank: str | None = None
    """Gradient bank for answering: a folder, or an address such as s3://bucket/bank."""
    index: str | None = None
    """Retrieval index for questions without passages."""
    backend: Literal["embedded", "opensearch", "elasticsearch"] = "embedded"
    """Search engine of the index: embedded (a local folder), or opensearch or elasticsearch (a server, for corpora that
    exceed one machine)."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """Ranking of an embedded index: bm25 (words), dense (vectors, which find paraphrases), or hybrid (both, by
    reciprocal rank fusion). null takes what the index was built for."""
    strength: float = 1.0
    """Factor of the gradient step at question time. 0 uses the adapter without a step; values between 0 and 1 weaken
    the passages."""
    adapter: bool = True
    """Use the adapter for answering. off answers with the pretrained model, as the closed-book baseline, or with blind
    off as the RAG baseline."""
    on_missing: Literal["error", "skip", "encode"] = "error"
    """Handling of passages without a gradient at question time: error, skip (answer with the others), or encode
    (compute it, which delays the answer)."""
    shifted: bool = False
    """Control experiment: answer every question with the passages of the previous one."""
    mixed: float = 0.0
    """Control experiment: share of each question's passages, from the lowest rank, that the top passages of the next
    question replace."""
    temperature: float = 0.0
    """Sampling temperature of answers; 0 decodes greedily and is the choice for reproducible evaluation."""
    top_p: float = 1.0
    """Nucleus sampling: sample among the most probable tokens that together reach this probability. 1 samples among
    all."""
    sampling_seed: int = 0
    """Random seed of sampling; combined with the id of each question."""
    in_place: bool = False
    """Write updates to the parameters and revert them, one question at a time, instead of applying them per row. Choose
    it only for engines that read parameters directly; it is slower."""

    def __post_init__(self) -> None:
        """Validate the settings.

        Raises:
            ConfigError: If a number is out of range, no projection is adapted, or a setting has no effect.
        """
        for name in ("rank", "max_document_tokens", "select_every", "select_new_tokens", "passages", "select_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}. Expected a whole number from 1.")
        if self.max_document_tokens < 2:
            raise ConfigError("max_document_tokens is 1. Expected at least 2, since the first token is not predicted.")
        if isinstance(self.meta_chunk, int) and self.meta_chunk < 1:
            raise ConfigError(f"meta_chunk is {self.meta_chunk}. Expected a whole number from 1, auto or all.")
        if not self.outer_loss and self.meta_chunk != "auto":
            raise ConfigError(
                f"meta_chunk is {self.meta_chunk}, which has no effect while outer_loss is off. Leave meta_chunk out."
            )
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha is {self.lora_alpha}. Expected a number above 0, or null.")
        if self.b_std < 0:
            raise ConfigError(f"b_std is {self.b_std}. Expected a number from 0.")
        if self.step_size_sign == "positive" and (self.initial_step_size <= 0 or self.step_size_mode == "fix"):
            raise ConfigError(
                f"step_size_sign is positive, initial_step_size is {self.initial_step_size} and step_size_mode is "
                f"{self.step_size_mode}. Expected a learned step size that starts above 0; omit step_size_sign."
            )
        if self.outer_loss and self.plain_loss != "text":
            raise ConfigError(
                f"plain_loss is {self.plain_loss}, which has no effect while outer_loss is on. Switch outer_loss off."
            )
        if not math.isfinite(self.strength):
            raise ConfigError(f"strength is {self.strength}. Expected a finite number.")
        if not 0 <= self.mixed <= 1:
            raise ConfigError(f"mixed is {self.mixed}. Expected a share from 0 to 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}. Expected a finite number from 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Expected a share above 0, up to 1.")
        if not self.projections:
            raise ConfigError("projections is empty. Expected at least one of: gate, up, down.")
        parse_layers(self.layers, "layers")

    @property
    def scaling(self) -> float:
        """Scale of the low-rank product: lora_alpha / rank."""
        return (2.0 * self.rank if self.lora_alpha is None else self.lora_alpha) / self.rank
