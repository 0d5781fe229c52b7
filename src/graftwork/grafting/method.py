"""The protocol that every method follows. No implementation lives here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from torch import nn


C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published."""

    title: str
    identifier: str
    """arXiv or DOI."""
    year: int
    repository: str
    """The authors' code."""


@dataclass(frozen=True, slots=True)
class Change:
    """One module that a conversion changed."""

    path: str
    before: str
    after: str
    keeps: tuple[str, ...] = ()
    """Parts of the module, as paths from it, that it still calls as modules, so that another method may change them."""

    def plain(self) -> dict[str, str]:
        """What is written down of it."""
        return {"path": self.path, "before": self.before, "after": self.after}


@dataclass(frozen=True, slots=True)
class Examination:
    """What a method can tell of a model's answers beyond the metrics of the task."""

    rows: Sequence[Mapping[str, Any]] = ()
    """One entry for each answer, of values that JSON knows; empty if there is nothing to tell."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Numbers over all answers, to stand beside the metrics."""


@dataclass(frozen=True, slots=True)
class Answering:
    """A way of answering that a method has of its own, open for as long as there are questions."""

    answer: Callable[[Sequence[Any]], Sequence[Mapping[str, Any]]]
    """Examples to one record each: `prediction`, and whatever else is to be told, of values that JSON knows."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What answers depend on beside the model and the settings; those of another identity are not gone on with."""


class Method(ABC, Generic[C]):
    """One published way to retrofit a model. Holds its configuration and nothing else.

    Args:
        config: The configuration; built from `settings` if it is left out.
        settings: Fields of the configuration.

    Raises:
        ConfigError: If a setting does not exist or has an impossible value.
    """

    name: ClassVar[str]
    """The method's word: folder, command line, manifest."""
    title: ClassVar[str]
    paper: ClassVar[Paper]
    config_class: ClassVar[type[Any]]
    families: ClassVar[frozenset[str]]
    """Families of `surgery.families` that the method is tested on."""
    changes_model: ClassVar[bool] = True
    places: ClassVar[frozenset[str]] = frozenset()
    """Settings that only say where something lies; a model may be loaded with others without a warning."""

    def __init__(self, config: C | None = None, **settings: Any) -> None:
        from graftwork.core.config import build

        self.config: C = (
            build(self.config_class, settings, where=f"settings of {self.name}") if config is None else config
        )

    @abstractmethod
    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Change the model in place, without data. Called by `graftwork.convert`, undone by `graftwork.restore`."""

    @property
    def settled(self) -> bool:
        """Whether the settings are complete; if not, `settle` fills them in from examples before `apply`."""
        return True

    def settle(self, model: Any, tokenizer: Any, rows: Sequence[Any]) -> Method[C]:
        """This method with complete settings.

        Args:
            model: The model as it is before conversion.
            tokenizer: Its tokenizer.
            rows: Examples of the task; the first ones are enough.
        """
        return self

    def matches(self, recorded: Any) -> bool:
        """Whether recorded settings are those of this method, apart from what `settle` fills in."""
        from graftwork.core.config import to_plain

        return bool(to_plain(self.config) == to_plain(recorded))

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """The phases of training, in order."""
        from graftwork.training.phases import Finetune

        return (Finetune(),)

    def assist(self, model: nn.Module, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
        """What must hold around a forward pass or a generation for this batch."""
        return nullcontext()

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Numbers that only this method can tell about one batch, such as the mass that it kept."""
        return {}

    def generation(self, model: nn.Module, tokenizer: Any, rows: Sequence[Any], settings: Any) -> Mapping[str, Any]:
        """Further arguments of `generate` for these examples, such as a rule for the tokens that may come next."""
        return {}

    def answering(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Any], settings: Any
    ) -> AbstractContextManager[Answering | None]:
        """How this method answers questions, if otherwise than by going on with their text.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            rows: All examples that will be asked, batch by batch, in their order.
            settings: The settings of the evaluation.
        """
        return nullcontext()

    def examine(
        self, model: nn.Module, tokenizer: Any, task: Any, rows: Sequence[Any], answers: Sequence[str], settings: Any
    ) -> Examination:
        """What only this method can tell of each answer.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            task: The task that the examples belong to; None for inputs of one's own.
            rows: The examples.
            answers: What the model generated for them.
            settings: The settings of the evaluation.
        """
        return Examination()

    def drift(self, model: nn.Module, tokenizer: Any, questions: int) -> tuple[bool, str] | None:
        """Use a model as its users do, failures included, and compare its weights with those before.

        Args:
            model: The converted model.
            tokenizer: Its tokenizer.
            questions: How many to ask.

        Returns:
            Whether every weight and buffer stayed as it was, and what was done; None if use cannot touch them.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"
