"""Evaluation of one model under several settings of its method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core.config import build, to_plain
from graftwork.errors import ConfigError, NothingConvertedError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.grafting.conversion import convert_recorded, restore
from graftwork.grafting.converted import Converted
from graftwork.grafting.method import Method
from graftwork.metrics.results import Results, update_results
from graftwork.pipeline.evaluation import Evaluation, open_harness, record_evaluation, resolve
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import label

logger = logging.getLogger(__name__)


def sweep(
    model: Converted | str | Path,
    points: Sequence[Mapping[str, Any]],
    settings: EvaluationSettings,
    *,
    method: Method[Any] | None = None,
    data: str | Path | None = None,
    run: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Results:
    """Evaluate one model under several settings of its method; its weights are loaded once.

    Args:
        model: Result of `convert`, `train` or `load`; or a run folder, model folder or hub id.
        points: Dotted settings to values, such as {"method.feed_forward_k": 256}. A point that switches everything off
            is the dense model.
        settings: Tasks and generation.
        method: Method whose settings are varied; the model's own by default.
        data: Folder of the tasks' files.
        run: Run folder for results; given a path of a run as `model`, that run by default.
        seed: Seed of the run, for the record.
        device: As in `evaluate`.

    Raises:
        ConfigError: If a setting is not one of the method.
    """
    converted, folder = resolve(model, run, device)
    base = method or (converted.methods[-1] if converted.methods else None)
    if base is None:
        raise ConfigError(
            "Found no method on this model whose settings could be varied. Name one with --set method.name=topk, or "
            "convert the model first."
        )
    methods = [_method_at(base, point) for point in points]
    digest = converted.digest()
    results: Results | None = None
    variants: dict[str, nn.Module] = {}
    inner = replace(settings, baseline=False, cost_lengths=())
    harness = open_harness(inner)
    for point, changed in zip(points, methods, strict=True):
        current = _exchanged(converted, changed, point)
        variants[label(point)] = current.model
        part = Evaluation(inner, label(point), folder, point, seed, digest).run(current, data, harness)
        results = part if results is None else results.merged(part)
    if results is None:
        raise ConfigError("Found no point to evaluate. Give at least one value.")
    cost = measure_costs(variants, settings.cost_lengths)
    if folder is not None:
        record_evaluation(folder, converted, settings, data)
    if cost and folder is not None:
        update_results(folder, lambda recorded: replace(recorded or results, cost=cost))
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
            current = convert_recorded(current, method)
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
