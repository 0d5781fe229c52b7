"""Loading of training, validation and evaluation examples by task or mixture name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftwork.core.example import Examples
from graftwork.core.stored_rows import has_metadata
from graftwork.errors import ConfigError, DataError, UnknownNameError
from graftwork.settings.fields import DataFields
from graftwork.settings.lengths import GENERAL, Lengths
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.lengths import declared_lengths
from graftwork.tasks.lookup import HUB
from graftwork.tasks.naming import NO_FIELDS, check_fields, is_file, named_tasks
from graftwork.tasks.own_data.explained_task import VALIDATION, ExplainedSource
from graftwork.tasks.own_data.mixture_file import is_mixture_file, read_mixture_file
from graftwork.tasks.own_data.task import HUB_PREFIX, OwnSource, is_own_data
from graftwork.tasks.own_data.task_file import TaskFile
from graftwork.tasks.task import SIZE, Mixture, SizeRate, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Training examples with the sampling weights of their tasks."""

    examples: tuple[Examples, ...]
    """One entry per task."""
    shares: Mapping[str, float] | None = None
    """Sampling probability by task, for a mixture; None samples every example once per epoch."""
    notes: tuple[str, ...] = ()
    """Deviations from the request, such as empty members of the mixture; also written to `run.yaml`."""
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Number of examples by task."""
    lengths: Lengths = GENERAL
    """Largest lengths that the tasks declare."""


def training_tasks(settings: TrainingSettings) -> Sequence[str]:
    """Return the names of the tasks to train on; of a mixture, the members that have the training split.

    Raises:
        ConfigError: If there is no task to train on.
        UnknownNameError: If the mixture name is neither a mixture nor a task.
    """
    mixture = training_mixture(settings)
    if mixture is not None:
        members = [name for name in mixture.training_tasks if is_file(name) or _exposes(name, settings.split)]
        if not members:
            raise ConfigError(
                f"Found no training task in mixture {mixture.name}: none of {', '.join(mixture.rates)} has a rate "
                f"above 0 and the split {settings.split!r}. Train on another mixture."
            )
        return members
    if settings.mixture is not None:
        return (settings.mixture,)
    if not settings.tasks:
        raise ConfigError("Found no task to train on. Name at least one with --task, or a mixture.")
    return settings.tasks


def training_mixture(settings: TrainingSettings) -> Mixture | None:
    """Return the mixture to train on, named in `mixture` or as the only task; None for plain tasks.

    Raises:
        ConfigError: If a mixture is combined with other tasks.
        UnknownNameError: If the mixture name is neither a mixture nor a task.
    """
    from graftwork.tasks import MIXTURES, TASKS

    name = settings.mixture
    if name is None:
        mixed = [task for task in settings.tasks if _is_mixture(task)]
        if mixed and len(settings.tasks) > 1:
            raise ConfigError(f"Found mixture {mixed[0]!r} beside other tasks. Train on the mixture alone.")
        return _mixture_named(mixed[0]) if mixed else None
    if is_mixture_file(name):
        return read_mixture_file(name)
    return None if name in TASKS and name not in MIXTURES else MIXTURES.get(name)


def _is_mixture(name: str) -> bool:
    """True for a mixture file, and for a registered mixture that is no task or file."""
    from graftwork.tasks import MIXTURES, TASKS

    return is_mixture_file(name) or (not is_file(name) and name not in TASKS and name in MIXTURES)


def _mixture_named(name: str) -> Mixture:
    from graftwork.tasks import MIXTURES

    return read_mixture_file(name) if is_mixture_file(name) else MIXTURES.get(name)


def load_training(settings: TrainingSettings, data: str | Path | None, seed: int) -> TrainingData:
    """Load the training examples; rows without a label are dropped.

    Args:
        settings: Tasks or a mixture, split and subsets.
        data: Folder of the tasks' files.
        seed: Seed of subsets, unless the settings define `subset_seed`.

    Raises:
        ConfigError: If no member of a mixture has an example.
        DataError: If data cannot be read.
    """
    mixture = training_mixture(settings)
    chosen = seed if settings.subset_seed is None else settings.subset_seed
    names = training_tasks(settings)
    check_fields(names, settings)
    settings = replace(settings, subset_seed=chosen)
    loaded = load_tasks(
        names,
        data,
        settings.split,
        chosen,
        take=settings.take,
        lowercase=settings.lowercase,
        mode=settings.mode,
        fields=settings,
    )
    examples = tuple(_labelled(part) for _, part in loaded)
    sizes = {part.task: len(part.rows) for part in examples}
    notes = tuple(_notes(loaded, mixture))
    lengths = declared_lengths([task for task, _ in loaded])
    if mixture is not None:
        # members of a mixture file are paths
        known = {name: task.name for name, (task, _) in zip(names, loaded, strict=True)}
        mixture = replace(mixture, rates={known.get(name, name): rate for name, rate in mixture.rates.items()})
    mixture = _mixed(settings, mixture, [part.task for part in examples])
    if mixture is None:
        return TrainingData(examples, None, notes, sizes, lengths)
    shares = mixture.proportions(sizes)
    present = tuple(part for part in examples if part.task in shares)
    return TrainingData(present, shares, notes, sizes, lengths)


def _mixed(settings: TrainingSettings, mixture: Mixture | None, tasks: Sequence[str]) -> Mixture | None:
    """Mixture with the rates by size that the settings define; None if there is none.

    Raises:
        ConfigError: If these settings have no effect.
    """
    given = {name: getattr(settings, name) for name in ("mixing_maximum", "mixing_temperature")}
    name = next((name for name, value in given.items() if value is not None), None)
    if name is None:
        return mixture
    if mixture is None and len(tasks) > 1:
        mixture = Mixture("tasks", dict.fromkeys(tasks, SIZE))
    if mixture is None or SIZE not in mixture.rates.values():
        found = f"mixture {mixture.name}, whose rates are numbers" if mixture else f"the task {tasks[0]} alone"
        raise ConfigError(
            f"{name} is {given[name]}, which has no effect on {found}. Expected several tasks, or a mixture with rates "
            "by size. Leave it out."
        )
    temperature = 1.0 if settings.mixing_temperature is None else settings.mixing_temperature
    return replace(mixture, sized=SizeRate(settings.mixing_maximum, temperature))


def load_validation(settings: TrainingSettings, data: str | Path | None, seed: int) -> tuple[Examples, ...]:
    """Load the validation split of every task that has it; empty unless `settings.validation` is a split name.

    Args:
        settings: Tasks or a mixture, the validation split, and how texts are formatted.
        data: Folder of the tasks' files.
        seed: Seed of hashed subsets.

    Raises:
        ConfigError: If no task has the split.
        DataError: If data cannot be read.
    """
    split = settings.validation
    if not isinstance(split, str):
        return _held_out(settings, data, seed)
    mixture = training_mixture(settings)
    members = training_tasks(settings) if mixture is None else tuple(mixture.rates)
    names = [name for name in members if is_file(name) or _exposes(name, split)]
    if files := [name for name in names if is_own_data(name) and not name.startswith(HUB_PREFIX)]:
        fixed = [task.name for name in files for task, own in named_tasks(name, split, settings) if own == "all"]
        if fixed:
            raise ConfigError(
                f"Found validation split {split!r} for {', '.join(fixed)}, a file without splits, so that validation "
                "would score training examples. Give a share to hold out, such as 0.1."
            )
    if not names:
        raise ConfigError(
            f"Found no task with split {split!r} among {', '.join(members)}, so there is no validation data. Give "
            "another split in train.validation, or a share such as 0.1."
        )
    loaded = load_tasks(names, data, split, seed, lowercase=settings.lowercase, mode=settings.mode, fields=settings)
    return tuple(_labelled(part) for _, part in loaded)


def _held_out(settings: TrainingSettings, data: str | Path | None, seed: int) -> tuple[Examples, ...]:
    """Rows of explained data that the training does not see; empty if no share is held out by a task itself."""
    chosen = seed if settings.subset_seed is None else settings.subset_seed
    settings = replace(settings, subset_seed=chosen)
    found: list[Examples] = []
    for name in training_tasks(settings):
        for task, _ in named_tasks(name, settings.split, settings) if is_file(name) else ():
            if isinstance(task.source, ExplainedSource) and task.splits:
                found.append(task.load(Path(data or "."), VALIDATION, seed=chosen))
    return tuple(found)


def explained_tasks(settings: TrainingSettings, seed: int) -> list[TaskFile]:
    """Definitions of the own explained data of a training, for task files."""
    chosen = replace(settings, subset_seed=seed if settings.subset_seed is None else settings.subset_seed)
    own = [
        task
        for name in training_tasks(settings)
        if is_file(name)
        for task, _ in named_tasks(name, settings.split, chosen)
    ]
    return [task.source.definition for task in own if isinstance(task.source, ExplainedSource)]


def _labelled(examples: Examples) -> Examples:
    if not has_metadata(examples.rows, "labelled"):
        return examples
    rows = tuple(row for row in examples.rows if row.metadata.get("labelled", True))
    return examples if len(rows) == len(examples.rows) else replace(examples, rows=rows, size=len(rows))


def _notes(loaded: Sequence[tuple[Task, Examples]], mixture: Mixture | None) -> list[str]:
    notes = [f"data {task.description}" for task, _ in loaded if isinstance(task.source, OwnSource | ExplainedSource)]
    for task, part in loaded:
        if task.take is not None and len(part.rows) < task.take:
            notes.append(f"{task.name} takes all {len(part.rows)} examples of the split, fewer than {task.take}.")
        if mixture is not None and not part.rows:
            notes.append(f"{task.name} has no example and is dropped from {mixture.name}.")
    return notes


def evaluated_tasks(name: str, split: str) -> list[str]:
    """Return the tasks to evaluate separately: the task itself, or the members of a mixture with split and metric.

    Raises:
        ConfigError: If no member of a mixture has both the split and a metric.
    """
    from graftwork.tasks import get_task

    if not _is_mixture(name):
        return [name]
    mixture = _mixture_named(name)
    members = [
        member for member in mixture.rates if is_file(member) or (_exposes(member, split) and get_task(member).metrics)
    ]
    if not members:
        raise ConfigError(
            f"Found no task with split {split!r} and a metric in mixture {name}; its members are "
            f"{', '.join(mixture.rates)}. Evaluate on another split."
        )
    return members


def load_tasks(
    names: Sequence[str],
    data: str | Path | None,
    split: str,
    seed: int,
    *,
    take: int | None = None,
    lowercase: bool = False,
    mode: str = "fixed",
    fields: DataFields = NO_FIELDS,
) -> list[tuple[Task, Examples]]:
    """Load tasks with their examples; a path is read as a data file, whose split is fixed.

    Args:
        names: Task names, paths of data files, or `hub:ID`.
        data: Folder of the tasks' files, or "hub".
        split: Split to read.
        seed: Seed of hashed subsets.
        take: Maximum number of examples per task; None loads all.
        lowercase: Lower-case texts before they are formatted.
        mode: "fixed", or "reference" for tasks as the authors' code defines them.
        fields: Mapping of the columns of own data.

    Raises:
        UnknownNameError: If a name is neither a task nor a file.
        DataError: If data cannot be read.
    """
    folder = Path(data) if data is not None else Path()
    loaded: list[tuple[Task, Examples]] = []
    for name in names:
        for task, own_split in named_tasks(name, split, fields):
            chosen = task.in_mode(mode)
            chosen = replace(chosen, lowercase=True) if lowercase else chosen
            loaded.append((chosen, chosen.load(folder, own_split, seed=seed, take=take)))
    own = (OwnSource, ExplainedSource)
    _check_names([(task, examples) for task, examples in loaded if isinstance(task.source, own)])
    return loaded


def _check_names(loaded: Sequence[tuple[Task, Examples]]) -> None:
    """Raise if two data sets have one name and split, because results and predictions are stored under them."""
    places: dict[tuple[str, str], str] = {}
    for task, examples in loaded:
        other = places.setdefault((task.name, examples.split), examples.source)
        if other != examples.source:
            raise ConfigError(
                f"Found {other} and {examples.source}, both with the task name {task.name!r}; expected different "
                "names, because results are stored under them. Rename one of the files."
            )


def check_tasks(
    names: Sequence[str], data: str | Path | None, fields: DataFields = NO_FIELDS, *, split: str = ""
) -> None:
    """Validate names, paths and own data before a model is loaded, which can take minutes.

    Args:
        names: Tasks or mixtures.
        data: Folder of the tasks' files.
        fields: Mapping of the columns of own data.
        split: Split of data sets of the hub.

    Raises:
        ConfigError: If columns are mapped, and no name is that of own data.
        UnknownNameError: If a name is neither a task nor a mixture.
        DataError: If a file or the data folder is missing, or a file is malformed.
    """
    from graftwork.tasks import MIXTURES, TASKS

    check_fields(names, fields)
    for name in names:
        if is_mixture_file(name):
            check_tasks(tuple(read_mixture_file(name).rates), None, split=split)
        elif is_file(name):
            named_tasks(name, split, fields)
        elif name not in TASKS and name not in MIXTURES:
            raise UnknownNameError("task or mixture", name, (*TASKS, *MIXTURES))
    if data is not None and Path(data) != HUB and not Path(data).is_dir():
        raise DataError(
            f"Found no folder {data} to read data from. Expected the folder of the tasks' files; check --data."
        )


def _exposes(name: str, split: str) -> bool:
    from graftwork.tasks import get_task

    return get_task(name).exposes(split)
