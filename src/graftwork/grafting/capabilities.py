"""Optional abilities of a method, one small protocol each; a method implements those that it needs.

Callers test with `isinstance(method, Trains)`, which compares method names only, so no registration is necessary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example
    from graftwork.grafting.method import Method
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.tasks.task import Task
    from graftwork.training.phases import Phase


@dataclass(frozen=True, slots=True)
class Examination:
    """Details of a model's answers beyond the metrics of the task."""

    rows: Sequence[Mapping[str, Any]] = ()
    """One JSON object for each answer; empty if there are no details."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """Scores over all answers, reported with the metrics."""


@dataclass(frozen=True, slots=True)
class Answering:
    """A method's own way of answering, valid inside the context that returned it."""

    answer: Callable[[Sequence[Example]], Sequence[Mapping[str, Any]]]
    """Maps a batch of examples to one JSON object each, with `prediction` and further fields."""
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Cache key: everything besides model and settings that answers depend on. Others are discarded."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Outcome of comparing a model's weights before and after use."""

    same: bool
    """True if every weight and buffer is bit-identical."""
    report: str
    """One line: number and kind of questions, and the tensors that differ."""


@runtime_checkable
class Trains(Protocol):
    """Trains in phases of its own; other methods use plain fine-tuning."""

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """Training phases, in order."""
        ...


@runtime_checkable
class Calibrates(Protocol):
    """Derives settings that were left open from examples, before conversion."""

    @property
    def needs_calibration(self) -> bool:
        """True if a setting is still open, so that `apply` would refuse."""
        ...

    def calibrate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> Method[Any]:
        """Return this method with every setting decided.

        Args:
            model: The model before conversion.
            tokenizer: Its tokenizer.
            rows: Examples of the task; the first ones suffice.
        """
        ...

    def matches(self, recorded: object) -> bool:
        """True if a recorded configuration equals this one, apart from what calibration decides."""
        ...


@runtime_checkable
class ChecksSettings(Protocol):
    """Refuses settings that are valid but have no effect, in new conversions; recorded runs are loaded as they are."""

    def check_settings(self) -> None:
        """Raise a ConfigError for the first setting without effect."""
        ...


@runtime_checkable
class Continues(Protocol):
    """Keeps its modules, with their learned parameters, if a model is converted again with fitting settings."""

    def continues(self, recorded: object) -> bool:
        """True if the recorded configuration creates the same modules as this one."""
        ...


@runtime_checkable
class ConstrainsGeneration(Protocol):
    """Restricts the tokens that may be generated."""

    def generation(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> Mapping[str, Any]:
        """Extra arguments of `generate` for these examples, such as a logits processor."""
        ...


@runtime_checkable
class Answers(Protocol):
    """Answers questions in its own way instead of by classification or generation from the input."""

    def answering(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> AbstractContextManager[Answering]:
        """Open what answers need.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            rows: All examples that will be answered, in order; batches are taken from them.
            settings: Settings of the evaluation.
        """
        ...


@runtime_checkable
class ReadsAnswers(Protocol):
    """Reads further fields of an answer from its tokens, such as positions of quoted text."""

    def read(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        generated: Sequence[Sequence[int]],
    ) -> Sequence[Mapping[str, Any]]:
        """Return the fields of each answer, as JSON values.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            rows: The examples.
            generated: Token ids of each answer, with those that follow the end of the text.
        """
        ...


@runtime_checkable
class FormatsExamples(Protocol):
    """Changes prompts and targets of examples, such as the order of label and explanation."""

    @property
    def formats(self) -> bool:
        """True if the configuration changes any example."""
        ...

    def formatted(self, row: Example, *, training: bool, explain: bool | None = None) -> Example:
        """Return the changed example; its metadata field `AUXILIARY` can have a second one.

        Args:
            row: Example as its task formats it.
            training: True for an example of a training.
            explain: Whether an answer has an explanation; None for the default.
        """
        ...

    def combined(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return one answer made of those to an example and to its second one."""
        ...


@runtime_checkable
class Examines(Protocol):
    """Derives details from each answer, such as label, spans and faithfulness."""

    def examine(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None,
        rows: Sequence[Example],
        answers: Sequence[Mapping[str, Any]],
        settings: EvaluationSettings,
    ) -> Examination:
        """Examine answers.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            task: Task of the examples; None for inputs without a task.
            rows: The examples.
            answers: Answer to each example: `prediction`, the generated text, and the fields that `read` added.
            settings: Settings of the evaluation.
        """
        ...


@runtime_checkable
class Measures(Protocol):
    """Computes numbers of one batch that no metric covers, such as the activation mass that was kept."""

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Numbers by name; empty if the configuration leaves nothing to measure."""
        ...


@runtime_checkable
class ChecksDrift(Protocol):
    """Temporarily modifies what a model computes, and can prove that its weights stay unchanged."""

    def drift(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: int) -> Drift:
        """Answer questions, including ones that fail, and compare the weights with those before.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            questions: Number of questions.
        """
        ...


@runtime_checkable
class StoresPassages(Protocol):
    """Answers with something stored for each passage, which memory estimates count."""

    def passage_bytes(self, model: nn.Module) -> Mapping[str, int]:
        """Bytes on disk of one passage, by place of storage."""
        ...

    def applied(self, model: nn.Module, rows: int) -> AbstractContextManager[None]:
        """Context in which the model computes as it does for a batch of `rows` questions with passages."""
        ...


@runtime_checkable
class Chunks(Protocol):
    """Divides each batch of its training into chunks, of which one at a time is in memory."""

    @property
    def chunk_setting(self) -> str | None:
        """Name of the setting with the size of a chunk; None if the size is not automatic."""
        ...

    def chunked(self, size: int, rows: int) -> Method[Any]:
        """Return this method with chunks of a given size, for batches of `rows` examples; see `largest_chunk`."""
        ...

    def largest_chunk(self, rows: int) -> int:
        """Return the size of a chunk that is the whole batch of `rows` examples."""
        ...
