"""Commands of a method: shared option types, and the host that runs the commands.

A method folder may have a module `commands` with a mapping `COMMANDS` of command word to function or Typer group; the
command line registers them. A command that needs a model takes a `typer.Context` and calls `host_of(context).load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol, Unpack

import typer

from graftwork.core.devices import Placing
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from graftwork.grafting.converted import Converted

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[str | None, typer.Option("--data", help="Folder of the tasks' files.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as section.key=value; overrides the YAML file, overridden by flags."),
]
Over = Annotated[
    list[str] | None,
    typer.Option("--over", help="Sweep: section.key=v1,v2 (null is off). Repeat to cross two settings."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Accept a model folder with a configuration but no weights.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if settings differ from the recorded ones.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Data type of the weights, such as bfloat16; by default that of the checkpoint, or float32 on a CPU "
        "without instructions for it."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device of the model: cpu, cuda, cuda:1, xpu, mps; by default the accelerator if there is one."),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="Spread a model that is too large for one device: auto, balanced, sequential.")
]


class Loader(Protocol):
    """Loads a converted or untouched model from a run folder, a model folder or the hub; picklable."""

    def __call__(self, path: str, **placing: Unpack[Placing]) -> Converted:
        """Return the model, converted as recorded."""
        ...


class ModelLoader(Protocol):
    """Loads an untouched model and its tokenizer."""

    def __call__(self, name: str, **placing: Unpack[Placing]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model and its tokenizer."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """Functions of later layers that the command line passes to a method's commands."""

    load: Loader
    load_model: ModelLoader


def host_of(context: typer.Context) -> Host:
    """Return the host of a command.

    Raises:
        ConfigError: If the command runs outside the `graftwork` command line.
    """
    if not isinstance(context.obj, Host):
        raise ConfigError("Found a command outside the graftwork command line. Run it as `graftwork …`.")
    return context.obj


def lengths_of(text: str | None) -> list[int]:
    """Parse lengths with commas between them.

    Raises:
        ConfigError: If a part is not a whole number from 2.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) >= 2 for part in parts):
        raise ConfigError(f"cost_lengths is {text!r}. Expected whole numbers from 2 with commas between, as 512,1024.")
    return [int(part) for part in parts]


def required_tasks(tasks: Sequence[str] | None) -> Sequence[str]:
    """Return the tasks of a command that needs at least one.

    Raises:
        ConfigError: If there is none.
    """
    if not tasks:
        raise ConfigError("Found no task to take held-out text from. Name at least one with --task.")
    return tasks
