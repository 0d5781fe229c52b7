"""The method protocol: a configuration and one conversion in place. Optional abilities are in `capabilities`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torch import nn

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Paper:
    """Publication that a method follows."""

    title: str
    identifier: str
    """arXiv identifier or DOI."""
    year: int
    repository: str
    """Repository of the authors' code."""


@dataclass(frozen=True, slots=True)
class About:
    """Name, publication and settings of a method, which can be read without importing the method's code.

    A method folder may have a module `about` with a constant `ABOUT`; commands that only list methods read it, and
    `class MyMethod(Method[MyConfig], about=ABOUT)` takes the class attributes from it.
    """

    name: str
    """Identifier of the method: folder, command line, manifest."""
    title: str
    paper: Paper
    config_class: type[Any]
    summary: str = ""
    """Row of the README table: what the method gives a model; the title if empty."""
    families: frozenset[str] = frozenset()
    """Families of `surgery.families` on which the contract tests cover the method; others are not refused for it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One module that a conversion changed."""

    path: str
    before: str
    after: str
    keeps: tuple[str, ...] = ()
    """Submodules, as paths from the module, that are still called as modules and may be changed by another method."""

    def plain(self) -> dict[str, str]:
        """Fields that are written to `conversion.json`."""
        return {"path": self.path, "before": self.before, "after": self.after}


class Method(ABC, Generic[C]):
    """One published way to retrofit a model. Holds its configuration and nothing else.

    A method that trains in phases of its own, needs calibration, constrains generation, answers in its own way,
    examines answers, measures batches or checks weight drift implements the matching protocol of
    `graftwork.grafting.capabilities`.

    The keyword `about` of the class statement sets name, title, summary, paper, configuration and families; a subclass
    without it assigns them as class attributes.

    Args:
        config: The configuration; built from `settings` if omitted.
        settings: Fields of the configuration.

    Raises:
        ConfigError: If a setting does not exist or has an impossible value.
    """

    name: ClassVar[str]
    """Identifier of the method: folder, command line, manifest."""
    title: ClassVar[str]
    summary: ClassVar[str] = ""
    """Row of the README table: what the method gives a model; the title if empty."""
    paper: ClassVar[Paper]
    config_class: ClassVar[type[Any]]
    families: ClassVar[frozenset[str]] = frozenset()
    """Families of `surgery.families` on which the contract tests cover the method; others are not refused for it."""
    changes_model: bool = True
    """False if the method leaves the modules of the model alone, so that a conversion without changes is no error."""
    places: ClassVar[frozenset[str]] = frozenset()
    """Settings that are locations, such as a bank; loading a model with other values for them gives no warning."""

    def __init_subclass__(cls, about: About | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if about is not None:
            cls.name, cls.title, cls.summary = about.name, about.title, about.summary
            cls.paper, cls.config_class, cls.families = about.paper, about.config_class, about.families

    def __init__(self, config: C | None = None, **settings: Any) -> None:
        # imported here, so that `import graftwork` loads no YAML reader
        from graftwork.core.config import build

        self.config: C = (
            build(self.config_class, settings, where=f"settings of {self.name}") if config is None else config
        )

    @abstractmethod
    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Change the model in place, without data. Called by `graftwork.convert`, undone by `graftwork.restore`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"
