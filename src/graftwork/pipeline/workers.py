"""Answers of several Ray actors, each with a model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from graftwork.core.devices import ACCELERATOR
from graftwork.core.example import Example
from graftwork.core.processes import process_count
from graftwork.core.ray_cluster import check_cpus, check_gpus, open_ray
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.evaluation.prediction import Pool, batch_predictor
from graftwork.grafting.converted import Converted
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.method import Method
from graftwork.grafting.saving import plain_methods
from graftwork.pipeline.loading import load
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks.chat import use_chat_template

RESTARTS = 3
"""Number of times that an actor is started again, and its batch repeated, after its process has ended."""


def answering_pool(converted: Converted, rows: Sequence[Example], settings: EvaluationSettings) -> Pool | None:
    """Return a pool of actors that answer batches of rows; None if the settings ask for no workers.

    Args:
        converted: The model, whose checkpoint the actors load.
        rows: Rows by number.
        settings: `workers` and `gpus_per_worker`; lengths and decoding.

    Raises:
        ConfigError: If the model was not loaded from a checkpoint, there are several processes already, or the CPUs or
            GPUs do not exist.
        MissingExtraError: If Ray is not installed.
    """
    if settings.workers is None:
        return None
    if process_count() > 1:
        raise ConfigError(
            f"Found workers {settings.workers} in one of {process_count()} processes of torchrun. Use one of the two."
        )
    if converted.origin is None:
        raise ConfigError(
            "Found workers for a model that was built in Python; each worker loads a checkpoint. Save the model to a "
            "run, and give its path."
        )
    ray = open_ray()
    check_cpus(ray, settings.workers, 1.0, readers=0)
    check_gpus(ray, settings.workers, settings.gpus_per_worker)
    return partial(_answers, ray, converted, rows, settings)


class AnsweringActor:
    """Actor of the pool.

    Args:
        model: Run folder, model folder or hub id.
        methods: Methods on the model.
        settings: Lengths and decoding.
        dtype: As in `load`.
        device: As in `load`.
    """

    def __init__(
        self,
        model: str,
        methods: Sequence[Method[Any]],
        settings: EvaluationSettings,
        dtype: str | None,
        device: str | None,
    ) -> None:
        recorded = load(model, dtype=dtype, device=device)
        same = plain_methods(recorded.methods) == plain_methods(methods)
        self.converted = recorded if same else load(model, methods=methods, dtype=dtype, device=device)
        self.settings = settings
        use_chat_template(self.converted.tokenizer, settings.chat_template)

    def digest(self) -> str:
        """Digest of the weights."""
        return weights_digest(self.converted.model)

    def answer(self, rows: Sequence[Example]) -> list[Mapping[str, Any]]:
        """Answers to one batch."""
        with ExitStack() as opened:
            answer_batch, _ = batch_predictor(self.converted, rows, self.settings, opened)
            return list(answer_batch(rows))


def _answers(
    ray: Any,
    converted: Converted,
    rows: Sequence[Example],
    settings: EvaluationSettings,
    batches: Sequence[Sequence[int]],
) -> Iterator[tuple[Sequence[int], Sequence[Mapping[str, Any]]]]:
    """Yield batches of row numbers with their answers, in the order in which they are ready."""
    origin = converted.origin
    if not batches or origin is None:
        return
    count = min(settings.workers or 1, len(batches))
    device = ACCELERATOR if settings.gpus_per_worker else "cpu"
    actor = ray.remote(AnsweringActor).options(
        num_cpus=1,
        num_gpus=settings.gpus_per_worker,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    made = [actor.remote(origin.model, converted.methods, settings, origin.dtype, device) for _ in range(count)]
    try:
        expected = weights_digest(converted.model)
        if any(found != expected for found in ray.get([each.digest.remote() for each in made])):
            raise CheckpointMismatchError(
                f"The weights in {origin.model} are not those of the model that was given. Save the model to a run "
                "first, and give its path."
            )
        rest = iter(batches)
        waiting = {_sent(each, rows, chosen): (each, chosen) for each, chosen in zip(made, rest, strict=False)}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            each, chosen = waiting.pop(ready)
            answers = ray.get(ready)
            following = next(rest, None)
            if following is not None:
                waiting[_sent(each, rows, following)] = (each, following)
            yield chosen, answers
    finally:
        for each in made:
            ray.kill(each)


def _sent(actor: Any, rows: Sequence[Example], chosen: Sequence[int]) -> Any:
    return actor.answer.remote([rows[index] for index in chosen])
