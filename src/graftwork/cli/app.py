"""The `graftwork` command. Heavy imports are inside the verbs, so that `--help` is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.main import get_command

from graftwork.cli import answering, completion, converting, hub, pages
from graftwork.cli import data as data_commands
from graftwork.cli import estimate as estimation
from graftwork.cli.host import HOST
from graftwork.cli.options import with_columns
from graftwork.cli.output import hyphenated, one_line, quiet_libraries
from graftwork.core import faults
from graftwork.core.messages import say, show
from graftwork.core.native import is_panic
from graftwork.core.plugins import method_modules
from graftwork.core.storage import storage_error
from graftwork.core.version import __version__
from graftwork.errors import ConfigError, GraftworkError, NothingConvertedError, UnknownNameError, UnsupportedModelError
from graftwork.grafting.commands import Assignments, Data, Device, DeviceMap, Dtype, Json, Over
from graftwork.serving import command as serving

WRONG_USAGE = (ConfigError, UnknownNameError, UnsupportedModelError, NothingConvertedError)
"""Errors of usage: exit code 2. All others: 1."""
INTERRUPTED = 130
IMPORTED: list[str] = []
"""Methods with an import command."""

app = typer.Typer(
    name="graftwork",
    help="Graft published methods onto pretrained transformers, without pretraining again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from typer.exceptions import TyperException

    debug = "--debug" in arguments
    quiet_libraries(debug)
    # --debug is accepted at any position; no arguments print the help
    words = [hyphenated(argument) for argument in arguments if argument != "--debug"] or ["--help"]
    if words[0] == "import" and len(words) > 1 and words[1] not in (*IMPORTED, "--help", "-h"):
        # the form of the previous release, before other methods had imports
        words.insert(1, "regrad")
    try:
        faults.check_variable()
        code = command_line(completion.words() or words).main(
            words, prog_name="graftwork", standalone_mode=False, obj=HOST
        )
        if code == INTERRUPTED:
            say("Interrupted. Run the same command again to resume.")
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        say("Interrupted. Run the same command again to resume.")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except GraftworkError as error:
        if debug:
            raise
        say(f"{type(error).__name__}: {one_line(error)}")
        return 2 if isinstance(error, WRONG_USAGE) else 1
    except TyperException as error:
        if debug:
            raise
        message = getattr(error, "format_message", error.__str__)()
        say(f"Usage: {' '.join(message.split())}{_new_form(error)} See `graftwork {_verb(words)}--help`.")
        return int(getattr(error, "exit_code", 2))
    except BaseException as error:
        if debug or not (isinstance(error, Exception) or is_panic(error)):
            raise
        found, advice = storage_error(error), " Unexpected error; rerun with --debug for a traceback."
        say(f"{type(found or error).__name__}: {one_line(found or error)}{'' if found else f'.{advice}'}")
        return 1


def _verb(words: Sequence[str]) -> str:
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    if not words or words[0] not in names:
        return ""
    from graftwork.methods import NAMES

    # the settings of a method are in the help of `convert METHOD`
    method = converting.method_of(words)
    return f"{words[0]} {method} " if method in NAMES else f"{words[0]} "


def _new_form(error: Exception) -> str:
    """Advice for an unknown option that a method's original commands had; empty for other errors."""
    option = str(getattr(error, "option_name", ""))
    for module in method_modules("old_flags") if option else ():
        flags: Mapping[str, str] = import_module(module).OLD_FLAGS
        if option in flags:
            return f" The authors' {option} is here: {flags[option]}."
    return ""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the log of libraries and the traceback of errors.")
    ] = False,
) -> None:
    """Options of every verb; `--debug` is parsed before the verbs, `--version` by its callback."""


@app.command("list")
def list_names(
    kind: Annotated[
        str, typer.Argument(help="methods, tasks, mixtures, families or recipes.", autocompletion=completion.kinds)
    ] = "methods",
    method: Annotated[
        str | None,
        typer.Option(help="Only tasks, mixtures or recipes of this method.", autocompletion=completion.methods),
    ] = None,
    json: Json = False,
) -> None:
    """List methods, tasks, mixtures, families or recipes."""
    from graftwork.cli import catalogue

    show(catalogue.names(kind, method, full=json), as_json=json)


def show_one(
    name: Annotated[
        str,
        typer.Argument(
            help="A method, a task, a mixture, a recipe, a data file or hub:ID.", autocompletion=completion.shown
        ),
    ],
    count: Annotated[int, typer.Option("-n", help="Examples of a task to show.", min=1)] = 3,
    data: Data = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a task to show; dev, or the task's own evaluation split, by default.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="fixed, or reference for the authors' exact formatting of a task.")
    ] = "fixed",
    json: Json = False,
    fields: Any = None,
) -> None:
    """Print a method's card and settings, formatted examples of a task or of own data, a mixture, or a recipe."""
    from graftwork.cli import catalogue

    catalogue.describe(name, count=count, data=data, split=split, mode=mode, as_json=json, fields=fields)


app.command("show")(with_columns(show_one))


def train(
    run: Annotated[str, typer.Argument(help="Run folder that `graftwork convert` or an earlier training wrote.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task to train on, a data file, or hub:ID. Repeat to mix.", autocompletion=completion.tasks),
    ] = None,
    data: Data = None,
    config: Annotated[str | None, typer.Option(help="YAML file with training settings.")] = None,
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and dropout.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier training with other settings.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option(help="Estimate the memory first, and warn if the device has less; takes seconds.")
    ] = True,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
    settings: Any = None,
) -> None:
    """Train a converted model; resumes from the last checkpoint after a stop."""
    from graftwork.cli import verbs

    phases = verbs.train_run(
        run,
        task or [],
        data=data,
        config=config,
        assignments=assignments or [],
        flags=settings,
        seed=seed,
        overwrite=overwrite,
        estimate=estimate,
        device=device,
        device_map=device_map,
        dtype=dtype,
    )
    show(phases, as_json=json)


app.command("report")(pages.report)


@app.command("run")
def run_recipe(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a shipped recipe, a YAML file, or the run.yaml of a run.", autocompletion=completion.recipes
        ),
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Run folder; runs/RECIPE by default.")] = None,
    data: Data = None,
    over: Over = None,
    seeds: Annotated[int | None, typer.Option(help="Repeat with this many seeds.", min=1)] = None,
    assignments: Assignments = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier training with other settings.")
    ] = False,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Run a whole recipe, from conversion to report; resumes after a stop."""
    from graftwork.cli import verbs

    rows, paths = verbs.run_whole(
        recipe,
        output=output,
        data=data,
        over=over or [],
        seeds=seeds,
        assignments=assignments or [],
        overwrite=overwrite,
        device=device,
        device_map=device_map,
        dtype=dtype,
    )
    show(rows, as_json=json)
    say(f"Report: {', '.join(paths)}")


for command in (
    hub.push,
    pages.compare,
    pages.demo,
    pages.doctor,
    pages.cache,
    data_commands.index,
    data_commands.prepare,
):
    app.command(command.__name__)(command)


def _register_method_commands() -> None:
    """Add the commands that method folders define in a module `commands`, and their imports as `import METHOD`."""
    imports = typer.Typer(help="Import files of the authors' code into a run, without executing code in them.")
    for module in method_modules("commands"):
        commands = import_module(module)
        for word, entry in getattr(commands, "COMMANDS", {}).items():
            if isinstance(entry, typer.Typer):
                app.add_typer(entry, name=word)
            else:
                app.command(word)(entry)
        if hasattr(commands, "IMPORT"):
            imports.command(module.split(".")[-2])(commands.IMPORT)
            IMPORTED.append(module.split(".")[-2])
    app.add_typer(imports, name="import")


_register_method_commands()


def command_line(arguments: Sequence[str] = ()) -> Any:
    """Build the whole command, including verbs whose options come from configurations; imports no torch.

    Args:
        arguments: Command-line arguments; `convert METHOD` has that method's settings as options.
    """
    from graftwork.cli.options import with_options
    from graftwork.serving.settings import ServeSettings
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.training import TrainingSettings

    # `run` may be called many times in one process
    generated = ("convert", "estimate", "train", "evaluate", "predict", "serve")
    app.registered_commands[:] = [command for command in app.registered_commands if command.name not in generated]
    app.command("convert", help=converting.help_text())(converting.command(arguments))
    app.command("estimate")(with_options(estimation.estimate, TrainingSettings, skip=("tasks",)))
    app.command("train")(with_options(train, TrainingSettings, skip=("tasks",)))
    app.command("serve")(with_options(serving.serve, ServeSettings))
    app.command("evaluate")(with_options(answering.evaluate, EvaluationSettings, skip=("tasks", "prompt")))
    app.command("predict")(
        with_options(
            answering.predict,
            EvaluationSettings,
            skip=(
                "tasks",
                "split",
                "limit",
                "official",
                "baseline",
                "cost_lengths",
                "lm_eval",
                "include_path",
                "num_fewshot",
                "apply_chat_template",
            ),
        )
    )
    return get_command(app)
