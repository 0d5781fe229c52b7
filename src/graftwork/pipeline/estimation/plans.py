"""Model, methods and settings of an estimate, from a recipe, a run, a YAML file and assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.config import build, merge, parse_assignments, read_yaml
from graftwork.core.run_folder import is_run
from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import Calibrates
from graftwork.grafting.method import Method
from graftwork.pipeline.estimation.estimate import Estimator, Row, comparison
from graftwork.pipeline.start import build_method, labels_of
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, load_recipe, recipe_names
from graftwork.settings.training import TrainingSettings


@dataclass(frozen=True, slots=True)
class Plan:
    """Model, methods and settings of an estimate."""

    model: str
    methods: tuple[Method[Any], ...]
    train: TrainingSettings
    evaluate: EvaluationSettings
    dtype: str | None
    labels: tuple[str, ...] | None

    def rows(self, estimator: Estimator, passages: int, *, compare: bool) -> list[Row]:
        """Return the estimate of the methods, then those of the untouched model."""
        return comparison(estimator, self.methods, self.train, self.evaluate, passages, compare=compare)


def plan_of(
    model: str,
    method: str | None = None,
    config: str | None = None,
    assignments: Sequence[str] = (),
    train: Mapping[str, Any] | None = None,
) -> Plan:
    """Combine a recipe, run or model with a YAML file, assignments and training settings; the later ones win.

    Args:
        model: Recipe, YAML file or run folder, whose settings are taken; or a model.
        method: Name of the method; that of the recipe or run by default.
        config: YAML file with sections `method`, `train` and `evaluate`.
        assignments: Settings as `section.key=value`.
        train: Training settings.

    Raises:
        ConfigError: If a setting is wrong, or is chosen from examples, which an estimate does not read.
    """
    is_recipe = model in recipe_names() or model.endswith((".yaml", ".yml")) or is_run(model)
    base = load_recipe(model) if is_recipe else RunConfig(model)
    plain: dict[str, Any] = {
        "method": dict(base.method or {}),
        "train": {} if base.train is None else _given(base.train),
        "evaluate": {} if base.evaluate is None else _given(base.evaluate),
    }
    if method is not None and plain["method"].get("name") != method:
        plain["method"] = {"name": method}
    given = parse_assignments(assignments)
    if unknown := sorted(set(given) - set(plain)):
        raise ConfigError(
            f"Found a setting in section {unknown[0]!r}. Expected {', '.join(plain)}, as in train.bf16=true."
        )
    plain = merge(
        plain, {} if config is None else _sections(read_yaml(Path(config))), given, {"train": dict(train or {})}
    )
    entry: dict[str, Any] = plain["method"]
    if entry and "name" not in entry:
        raise ConfigError(f"Found settings of a method ({next(iter(entry))}) and no method. Name it after the model.")
    methods = (build_method(entry),) if entry else ()
    for each in methods:
        if isinstance(each, Calibrates) and each.needs_calibration:
            raise ConfigError(
                f"A setting of {each.name} is chosen from examples, which an estimate does not read. Give a number."
            )
    return Plan(
        base.model,
        methods,
        build(TrainingSettings, plain["train"], where="training settings"),
        build(EvaluationSettings, plain["evaluate"], where="evaluation settings"),
        base.dtype,
        _labels(base),
    )


def _sections(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("method", "train", "evaluate") if values.get(name) is not None}


def _given(settings: Any) -> dict[str, Any]:
    """Settings that differ from their defaults."""
    default = type(settings)()
    names = settings.__dataclass_fields__
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != getattr(default, name)}


def _labels(config: RunConfig) -> tuple[str, ...] | None:
    """Class labels of the recipe's tasks; None if their files are necessary and missing."""
    try:
        return labels_of(config)
    except Exception:
        return None
