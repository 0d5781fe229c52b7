"""Predictions for a user's own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.core.example import Example
from graftwork.core.files import write_records
from graftwork.core.processes import is_main_process
from graftwork.core.progress import Progress
from graftwork.core.run_folder import DETAILS_SUFFIX
from graftwork.errors import ConfigError
from graftwork.evaluation.prediction import predict_records
from graftwork.grafting.capabilities import Examines
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.pipeline.evaluation import resolve
from graftwork.pipeline.lengths import report_cuts, with_lengths
from graftwork.pipeline.start import run_of, with_input_fields, with_text_fields
from graftwork.pipeline.workers import answering_pool
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks.chat import use_chat_template
from graftwork.tasks.inputs import input_rows, read_inputs
from graftwork.tasks.naming import task_named


def predict(
    model: Converted | nn.Module | str | Path,
    inputs: Sequence[str | Example] | Path,
    settings: EvaluationSettings | None = None,
    *,
    output: str | Path | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Predict an answer for each input, with what the model's methods derive from it.

    Args:
        model: Result of `convert`, `train` or `load`; an untouched model; or a run folder, model folder or hub id.
        inputs: Texts or examples; or a file, as `graftwork predict --input` reads it.
        settings: Lengths, batch size, decoding; `prompt`, `explain` and `lowercase` apply to texts and files.
        output: JSON-lines file that receives each answer as it is generated; a stopped prediction resumes from it. What
            methods derive goes into a second file with the suffix `.details.jsonl`.
        device: As in `evaluate`.

    Returns:
        One JSON object for each input: `id`, `input`, `prediction`, and further fields by method, such as label,
        probabilities and spans.

    Raises:
        ConfigError: If the model has no tokenizer or cannot answer, or if `output` is the input file.
        DataError: If the file holds no input.

    Example:
        >>> predict("runs/first", ["what is the pet of gavis rairtow?"])[0]["prediction"]
        'a hamster'
    """
    target = None if output is None else Path(output)
    rows, found, details = _predicted(model, inputs, settings or EvaluationSettings(), target, device)
    nothing: Mapping[str, Any] = {}
    return [
        {"id": row.key, "input": row.input, **record, **more}
        for row, record, more in zip(rows, found, details or [nothing] * len(rows), strict=True)
    ]


def predict_to_file(
    model: Converted | nn.Module | str | Path,
    inputs: Sequence[str | Example] | Path,
    output: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    device: str | None = None,
) -> int:
    """Predict as `predict` does, and leave the answers in the file, so that memory does not grow with the inputs.

    Args:
        model: As for `predict`.
        inputs: As for `predict`.
        output: JSON-lines file that receives each answer as it is generated; a stopped prediction resumes from it.
        settings: As for `predict`.
        device: As for `predict`.

    Returns:
        Number of answers.

    Raises:
        ConfigError: As `predict`.
        DataError: As `predict`.
    """
    rows, _, _ = _predicted(model, inputs, settings or EvaluationSettings(), Path(output), device)
    return len(rows)


def _predicted(
    model: Converted | nn.Module | str | Path,
    inputs: Sequence[str | Example] | Path,
    settings: EvaluationSettings,
    target: Path | None,
    device: str | None,
) -> tuple[Sequence[Example], Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """Inputs, their answers, and what methods derive from them; the last is empty if no method does."""
    rows: Sequence[Example]
    if isinstance(inputs, str):
        raise ConfigError(f"Found the text {inputs!r} as inputs. Expected a list of texts, or the Path of a file.")
    if isinstance(inputs, Path):
        if target is not None and target.exists() and target.resolve() == inputs.resolve():
            raise ConfigError(f"Found {target} as input and as output. Give another file for the answers.")
        settings = with_input_fields(settings, model, inputs)
        rows = read_inputs(inputs, settings)
    else:
        settings = with_text_fields(settings, model)
        texts = iter(input_rows([row for row in inputs if isinstance(row, str)], settings))
        numbered = [(str(number), row) for number, row in enumerate(inputs, 1)]
        rows = [row if isinstance(row, Example) else replace(next(texts), key=key) for key, row in numbered]
    converted, _ = resolve(model, None, device)
    use_chat_template(converted.tokenizer, settings.chat_template)
    task = None if settings.prompt is None else task_named(settings.prompt)
    settings = with_lengths(converted, settings, task, run_of(model))
    report_cuts(converted, "prediction", rows, settings)
    with Progress("predict", total=len(rows)) as progress:
        pool = answering_pool(converted, rows, settings)
        found = predict_records(converted, rows, settings, output=target, advance=progress.advance, pool=pool)
    details = _details(converted, rows, found, settings)
    if target is not None and is_main_process() and any(details):
        write_records(target.with_suffix(DETAILS_SUFFIX), details)
    return rows, found, details


def _details(
    converted: Converted, rows: Sequence[Example], found: Sequence[Mapping[str, Any]], settings: EvaluationSettings
) -> list[Mapping[str, Any]]:
    """Fields that the methods derive from each answer; an empty list if no method derives any."""
    if not any(isinstance(method, Examines) for method in converted.methods):
        return []
    details: list[Mapping[str, Any]] = [{} for _ in rows]
    task = None if settings.prompt is None else task_named(settings.prompt)
    for method in converted.methods:
        if isinstance(method, Examines):
            own = method.examine(converted.model, required_tokenizer(converted), task, rows, found, settings).rows
            details = [{**one, **more} for one, more in zip(details, own or details, strict=True)]
    return details
