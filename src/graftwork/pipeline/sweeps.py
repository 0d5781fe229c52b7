"""Evaluation of one model under several settings of its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core.config import build, to_plain
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, NothingConvertedError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import Converted
from graftwork.grafting.method import Method
from graftwork.metrics.results import Results
from graftwork.pipeline.evaluation import evaluate, logger
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import label


def sweep(
    converted: Converted,
    points: Sequence[Mapping[str, Any]],
    settings: EvaluationSettings,
    *,
    method: Method[Any] | None = None,
    data: str | Path | None = None,
    run: str | Path | None = None,
    seed: int = 0,
) -> Results:
    """Evaluate one model under several settings of its method; its weights are loaded once.

    Args:
        converted: The model.
        points: Dotted settings to values, such as {"method.feed_forward_k": 256}. A point that switches everything off
            is the dense model.
        settings: Tasks and how to generate.
        method: The method whose settings are varied; the model's own if left out.
        data: Folder that holds the tasks' files.
        run: Run folder.
        seed: Seed of the run, for the record.

    Raises:
        ConfigError: If a setting is not one of the method.
    """
    base = method or (converted.methods[-1] if converted.methods else None)
    if base is None:
        raise ConfigError(
            "Found no method on this model whose settings could be varied. Name one with --set method.name=topk, or "
            "convert the model first."
        )
    methods = [_method_at(base, point) for point in points]
    results: Results | None = None
    variants: dict[str, nn.Module] = {}
    inner = replace(settings, baseline=False, cost_lengths=())
    for point, changed in zip(points, methods, strict=True):
        current = _exchanged(converted, changed, point)
        variants[label(point)] = current.model
        part = evaluate(current, settings=inner, data=data, run=run, name=label(point), point=point, seed=seed)
        results = part if results is None else results.merged(part)
    if results is None:
        raise ConfigError("Found no point to evaluate. Give at least one value.")
    cost = measure_costs(variants, settings.cost_lengths)
    if cost and run is not None:
        folder = RunFolder(run)
        replace(Results.read(folder.results_file), cost=cost).write(folder.results_file)
    return replace(results, cost=cost)


def _method_at(base: Method[Any], point: Mapping[str, Any]) -> Method[Any]:
    varied = {key.removeprefix("method."): value for key, value in point.items() if key.startswith("method.")}
    if len(varied) < len(point):
        others = ", ".join(sorted(key for key in point if not key.startswith("method.")))
        raise ConfigError(f"Cannot vary {others} on a loaded model. Use `graftwork run`, which starts anew.")
    plain = {**to_plain(base.config), **varied}
    return type(base)(build(base.config_class, plain, where=f"the settings at {label(point)}"))


def _exchanged(converted: Converted, changed: Method[Any], point: Mapping[str, Any]) -> Converted:
    """The model with one method exchanged, around the same weights; the one passed in is left alone."""
    current = replace(converted, model=sharing_copy(converted.model), methods=(), changes=())
    restore(current)
    for method in (*(other for other in converted.methods if other.name != changed.name), changed):
        try:
            current = convert(current, method)
        except NothingConvertedError:
            logger.info("%s switches %s off; measuring the dense model.", label(point), method.name)
    _carry_over(converted.model, current.model)
    return current


@torch.no_grad()
def _carry_over(source: nn.Module, target: nn.Module) -> None:
    """Give a model that was converted anew what the methods had learned, where it has the same place for it."""
    learned = source.state_dict()
    for name, tensor in target.state_dict().items():
        before = learned.get(name)
        if before is not None and before.shape == tensor.shape and before.data_ptr() != tensor.data_ptr():
            tensor.copy_(before)
