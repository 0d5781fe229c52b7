"""`graftwork convert`: its options include the settings of the method that the command line names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, get_args

import typer

from graftwork.cli import completion
from graftwork.cli.options import NoSettings, with_columns, with_options
from graftwork.core.messages import show
from graftwork.grafting.commands import Assignments, Data, Device, DeviceMap, Dtype, Json, RandomWeights


def convert(
    method: Annotated[
        str, typer.Argument(help="Method; `graftwork list` names them.", autocompletion=completion.methods)
    ],
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or a run whose model gets a further method.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Run folder to write.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the model of the run folder; removes its training, results and reports."
        ),
    ] = False,
    base_by_reference: Annotated[
        bool,
        typer.Option(
            "--base-by-reference",
            help="Link to the weights of MODEL in place of a copy; for methods that leave them unchanged.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the modules that would change.")] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task or table whose classes an encoder without a head gets a head for; its examples calibrate "
            "automatic settings.",
            autocompletion=completion.tasks,
        ),
    ] = None,
    data: Data = None,
    head_seed: Annotated[int, typer.Option(help="Seed of a new head, and of random weights.")] = 0,
    random_weights: RandomWeights = False,
    assignments: Assignments = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
    settings: Any = None,
    fields: Any = None,
) -> None:
    """Graft a method onto a model."""
    from graftwork.cli import verbs

    changes = verbs.convert_model(
        method,
        model,
        output=output,
        dry_run=dry_run,
        overwrite=overwrite,
        tasks=task or [],
        data=data,
        seed=head_seed,
        assignments=assignments or [],
        flags=settings or {},
        random_weights=random_weights,
        fields=fields or {},
        by_reference=base_by_reference,
        device=device,
        device_map=device_map,
        dtype=dtype,
    )
    show(changes, as_json=json)


def command(arguments: Sequence[str]) -> Callable[..., None]:
    """Return the command with the settings of the named method as options.

    Args:
        arguments: Words of the command line, the verb first.

    Raises:
        UnknownNameError: If the first word after the verb is no method, before any option is parsed.
    """
    from graftwork.methods import NAMES, about

    mapped = with_columns(convert)
    method = method_of(arguments)
    # a shell asks for completions before the word is whole
    if method is None or (completion.words() and method not in NAMES):
        return with_options(mapped, NoSettings)
    return with_options(mapped, about(method).config_class, panel=f"Settings of {method}")


def help_text() -> str:
    """Return the help of the verb: how to see the settings of each method."""
    from graftwork.methods import NAMES, about

    width = max(map(len, NAMES))
    lines = [f"  {name:<{width}}  {about(name).title}" for name in NAMES]
    # \b: the lines below it are not joined
    return (
        "Graft a method onto a model: graftwork convert METHOD MODEL -o RUN.\n\n"
        "Each method has settings of its own: graftwork convert METHOD --help.\n\n\b\nMethods:\n" + "\n".join(lines)
    )


def method_of(arguments: Sequence[str]) -> str | None:
    """Find the method on the command line, before or after options; None if it is not `convert` or names none.

    A word that is the value of an option is not taken for a method.
    """
    if not arguments or arguments[0] != "convert":
        return None
    from graftwork.methods import NAMES

    with_value = _flags_with_value()
    words = [word for before, word in pairwise(arguments) if not word.startswith("-") and before not in with_value]
    first = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None
    return next((word for word in words if word in NAMES), first)


def _flags_with_value() -> set[str]:
    """Options of the verb itself that take a value."""
    found: set[str] = set()
    for name, parameter in inspect.signature(convert, eval_str=True).parameters.items():
        parts = list(get_args(parameter.annotation))
        options = [part for part in parts if isinstance(part, typer.models.OptionInfo)]
        for option in options if parts[:1] != [bool] else []:
            found.update(option.param_decls or (f"--{name.replace('_', '-')}",))
    return found
