"""Tasks of lm-eval by name, group, pattern or YAML file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.settings.evaluation import EvaluationSettings

FEWSHOT_SEED = 1234
"""Default seed of lm-eval for the choice of few-shot examples."""


def check_lm_eval(settings: EvaluationSettings) -> None:
    """Look up the tasks of lm-eval before a model is loaded, which can take minutes.

    Raises:
        MissingExtraError: If lm-eval is not installed.
        ConfigError: If it has no such task, or the folder of further tasks does not exist.
    """
    if not settings.lm_eval:
        return
    if find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "lm-eval")
    folder = settings.include_path
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"Found no folder {folder} of lm-eval tasks. Expected YAML files in it; check include_path.")
    find_tasks(settings.lm_eval, folder)


def with_absolute_paths(settings: EvaluationSettings) -> EvaluationSettings:
    """Return settings whose YAML files and folder of tasks are found from every working directory."""
    folder = settings.include_path
    names = tuple(str(Path(name).resolve()) if _is_yaml(name) else name for name in settings.lm_eval)
    return replace(settings, lm_eval=names, include_path=None if folder is None else str(Path(folder).resolve()))


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@lru_cache(maxsize=4)
def find_tasks(names: tuple[str, ...], include_path: str | None) -> tuple[Any, tuple[str, ...]]:
    """Find tasks of lm-eval, without reading their data.

    Args:
        names: Names of tasks, groups and tags, patterns such as `mmlu_*`, and YAML files.
        include_path: Folder with YAML files of further tasks.

    Returns:
        The task manager of lm-eval, and the names with patterns replaced by what they match.

    Raises:
        ConfigError: If a name or pattern matches nothing.
    """
    manager = _manager(names, include_path)
    found: list[str] = []
    for name in names:
        if _is_yaml(name):
            if not Path(name).is_file():
                raise ConfigError(f"Found no file {name}. Expected the YAML file of a task of lm-eval; check the path.")
            found.append(str(Path(name).resolve()))
            continue
        matched: list[str] = manager.match_tasks([name])
        if not matched:
            known: list[str] = manager.all_tasks
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"Unknown task of lm-eval {name!r}.{hint} `lm_eval ls tasks` lists its tasks; --include-path names a "
                "folder of further ones."
            )
        found += matched
    return manager, tuple(dict.fromkeys(found))


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """Task manager of lm-eval; its own 14,000 tasks, which take seconds to list, only if a name needs them."""
    import lm_eval.tasks  # pyright: ignore[reportMissingTypeStubs]

    build: Any = lm_eval.tasks.TaskManager
    own = build(include_path=include_path, include_defaults=False)
    others = [name for name in names if not _is_yaml(name)]
    return own if all(own.match_tasks([name]) for name in others) else build(include_path=include_path)


def load_tasks(settings: EvaluationSettings) -> list[dict[str, Any]]:
    """Load tasks of lm-eval with their data, one entry for each task or group that the settings name.

    Args:
        settings: Names, further tasks, and number of examples in the prompt.

    Returns:
        Mappings with `tasks` and `groups` by name, as lm-eval's `evaluate` expects them.

    Raises:
        ConfigError: If a task cannot be loaded, or executes generated code.
    """
    manager, names = find_tasks(settings.lm_eval, settings.include_path)
    loaded: list[dict[str, Any]] = []
    for name in names:
        try:
            with redirect_stdout(sys.stderr):
                found: dict[str, Any] = manager.load([name])
        except GraftworkError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(
                f"Cannot load the task {name} of lm-eval: {reason}. Expected its data on the hub, in the hub's cache, "
                "or in local files that its YAML names."
            ) from None
        for task_name, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"The task {task_name} of lm-eval executes generated code. Run it in a sandbox with lm-eval's own "
                    "command: lm_eval --model graftwork --confirm_run_unsafe_code."
                )
            _set_shots(task, settings.num_fewshot)
        loaded.append(found)
    return loaded


def _set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples in the prompt as lm-eval's command does: a task that fixes 0 keeps 0."""
    default = task.get_config("num_fewshot")
    if shots is not None and default != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
