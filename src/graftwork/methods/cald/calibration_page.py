"""`graftwork calibrate`: which mixer, rank, initialisation and guide pay for a model and data, before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.files import write_json, write_text
from graftwork.errors import ConfigError, DataError
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.methods.cald.comparison import MixerChoice, MixerComparison, compare_mixers
from graftwork.methods.cald.config import CaldConfig, Initialization
from graftwork.methods.cald.method import Cald
from graftwork.reporting.overview import Overview
from graftwork.reporting.pages import render
from graftwork.reporting.plots import per_layer
from graftwork.reporting.render import Section
from graftwork.settings.fields import DataFields
from graftwork.surgery.sites import family_of, pretrained
from graftwork.tasks.loading import load_tasks
from graftwork.tasks.naming import NO_FIELDS
from graftwork.training.encoding import PadBatch, padding_id
from graftwork.training.running_text import positions_of, text_data
from graftwork.training.samples import BATCH

AUTOMATIC = "auto:0.95"
"""Automatic rank beside the given ones."""
FEATURE_MAPS = ("elu", "softmax", "gated")
INITIALIZATIONS: tuple[Initialization, ...] = ("segment_mean", "gaussian", "svd")
WINDOWS = (16, 64)
"""Default windows of decoders."""
GAIN = 0.1
"""Share of the error that the guided updates must remove for a guide to pay."""
PAGE = "calibration.html"
RECORD = "calibration.json"


@dataclass(frozen=True)
class CalibrationReport:
    """Comparison of mixers for one model and data."""

    comparison: MixerComparison
    table: tuple[Mapping[str, Any], ...]
    """One row per choice."""
    findings: tuple[str, ...]
    """Sentences about the closest choice, the ranks of the layers and the guides."""
    page: Path
    """The page."""


def calibrate(
    converted: Converted,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    split: str = "train",
    samples: int = 64,
    max_input_tokens: int = 512,
    ranks: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    layers: str | None = None,
    guided_updates: int = 20,
    output: str | Path = "calibration",
    fields: DataFields = NO_FIELDS,
) -> CalibrationReport:
    """Compare the mixers for a dense model on examples of a task, and write a table, a picture and a page.

    Args:
        converted: Dense encoder or decoder, such as the run of a fine-tuned teacher.
        tasks: Tasks of the examples.
        data: Folder of the tasks' files.
        split: Split of the tasks.
        samples: Number of examples or chunks; the first half trains the guided updates, the second is measured.
        max_input_tokens: Maximum number of tokens of an example or chunk.
        ranks: Ranks of an encoder; an eighth, a quarter and half of the longest example by default.
        windows: Windows of a decoder; `WINDOWS` by default.
        layers: Layers to convert, as the setting `layers`.
        guided_updates: Number of guided updates of the mixers alone; 0 skips them.
        output: Folder of the page and of the numbers.
        fields: Mapping of the columns of own data.

    Raises:
        ConfigError: If the model is converted already, or an option has no effect on it.
        DataError: If there are fewer than two examples.
        UnsupportedModelError: If the attention of the model cannot be replaced.
    """
    changed = [method.name for method in converted.methods if method.changes_model]
    if changed:
        raise ConfigError(
            f"Found a model with {', '.join(changed)}. Expected a dense one, with which mixers are compared. Give the "
            "model from which it was converted."
        )
    model = converted.model
    decoder = family_of(model).default_stack == "decoder"
    for name, value in (("ranks", ranks),) if decoder else (("windows", windows),):
        if value is not None:
            raise ConfigError(
                f"{name} is set, and {type(pretrained(model)).__name__} is "
                f"{'a decoder, whose mixers have no rank' if decoder else 'an encoder, whose mixers have no window'}. "
                f"Omit {name}."
            )
    rows = [row for _, loaded in load_tasks(tasks, data, split, 0, fields=fields) for row in loaded.rows]
    tokenizer = required_tokenizer(converted)
    limit = min(max_input_tokens, positions_of(pretrained(model)))
    base = CaldConfig(layers=layers)
    if decoder:
        chunks, collate = text_data(rows, model, tokenizer, max_tokens=limit)
        encoded: list[Any] = [chunks[index] for index in range(min(samples, len(chunks)))]
    else:
        call: Any = tokenizer
        encoded = [call(row.input, row.pair, truncation=True, max_length=limit) for row in rows[:samples]]
        collate = PadBatch(padding_id(tokenizer))
    if len(encoded) < 2:
        raise DataError(f"Found {len(encoded)} examples. Expected at least two: one to train on, one to measure.")
    longest = max(len(each["input_ids"]) for each in encoded)
    if decoder:
        methods = _decoder_methods(base, windows or [each for each in WINDOWS if each < longest] or [longest // 2 or 1])
    else:
        chosen = ranks or sorted({max(1, longest // part) for part in (8, 4, 2)})
        methods = _encoder_methods(replace(base, positions=longest), chosen)
        automatic = Cald(replace(base, positions=longest, rank=AUTOMATIC))
        methods[f"segment_mean, rank {AUTOMATIC}"] = automatic.calibrate(model, tokenizer, rows[:samples])
    half = len(encoded) // 2
    fitted, held_out = (
        [_unlabelled(collate(part[at : at + BATCH])) for at in range(0, len(part), BATCH)]
        for part in (encoded[:half], encoded[half:])
    )
    comparison = compare_mixers(model, methods, fitted, held_out, guided_updates=guided_updates)
    table = tuple(_row(choice) for choice in comparison.choices)
    findings = tuple(_findings(comparison, methods))
    report = CalibrationReport(comparison, table, findings, Path(output) / PAGE)
    _write(report, f"{len(encoded) - half} of {len(encoded)} examples of up to {longest} tokens")
    return report


def _encoder_methods(base: CaldConfig, ranks: Sequence[int]) -> dict[str, Cald]:
    """Every initialisation with every rank, and feature maps without a rank, by name."""
    found = {
        f"{start}, rank {rank}": Cald(replace(base, initialization=start, rank=rank))
        for rank in ranks
        for start in INITIALIZATIONS
    }
    return {**found, "feature_map": Cald(replace(base, mixer="feature_map", positions=None))}


def _decoder_methods(base: CaldConfig, windows: Sequence[int]) -> dict[str, Cald]:
    """Every feature map with every window, by name."""
    return {
        f"{name}, window {window}": Cald(replace(base, mixer="linear", feature_map=name, window=window))
        for window in windows
        for name in FEATURE_MAPS
    }


def _unlabelled(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _row(choice: MixerChoice) -> dict[str, Any]:
    return {
        "choice": choice.name,
        "attention error": _number(choice.error),
        "after guided updates": _number(choice.guided_error) if choice.guided_errors else "–",
        "distance": _number(choice.distance),
        "time / dense": f"{choice.time_ratio:.2f}",
    }


def _number(value: float) -> str:
    return f"{value:.3g}"


def _findings(comparison: MixerComparison, methods: Mapping[str, Cald]) -> list[str]:
    """Sentences about the closest choice, ranks, time and guides."""
    choices, updates = comparison.choices, comparison.guided_updates
    start = min(choices, key=lambda choice: choice.error)
    closest = min(choices, key=lambda choice: choice.guided_error)
    found = [f"Closest before training: {start.name}, with an attention error of {_number(start.error)}."]
    if updates:
        found.append(
            f"Closest after {updates} guided updates of the mixers alone: {closest.name}, with "
            f"{_number(closest.guided_error)}."
        )
    faster = [choice for choice in choices if choice.time_ratio < 1]
    if faster:
        best = min(faster, key=lambda choice: choice.guided_error)
        found.append(
            f"Closest of those faster than the dense model here: {best.name}, {best.time_ratio:.2f} of its time."
        )
    else:
        found.append(
            "No choice is faster than the dense model at this length: stay dense, or calibrate on longer inputs."
        )
    for choice in choices:
        ranks = methods[choice.name].config.ranks
        if choice.name.endswith(AUTOMATIC):
            found.append(f"Ranks that keep 95 % of the attention maps, by layer: {', '.join(map(str, ranks))}.")
    if closest.guided_errors:
        gain = 1 - closest.guided_error / closest.error
        cost = "; ".join(f"{name} {ratio:.2f}" for name, ratio in comparison.update_ratios.items())
        verdict = "a guide pays" if gain >= GAIN else "a guide adds little to this start"
        found.append(
            f"Guided updates remove {gain:.0%} of the error of {closest.name}: {verdict}. Time of an update relative "
            f"to one without a guide, without optimizers: {cost}."
        )
    found.append(f"Settings: {_flags(methods[closest.name].config)}")
    return found


def _flags(config: CaldConfig) -> str:
    """Options of `graftwork convert cald` for a choice; positions of the sample are left out."""
    names = ("mixer", "rank", "initialization", "feature_map", "window", "layers")
    rank = config.rank
    values = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(CaldConfig, name)}
    if isinstance(rank, tuple):
        values["rank"] = AUTOMATIC
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items()) or "the defaults"


def _write(report: CalibrationReport, sample: str) -> None:
    """Write `calibration.json`, the picture and the page."""
    folder, comparison = report.page.parent, report.comparison
    intro = (
        f"Measured on {sample}, before any training. The attention error is that of one converted layer at a time, "
        "‖y − ŷ‖² / ‖y‖² between dense attention outputs y and those of the mixer; the second column is the same after "
        f"{comparison.guided_updates} updates of the mixers alone on the other examples. The distance is that of all "
        "hidden states if every layer is converted, summed over layers: the layer loss of training. It says nothing "
        "about accuracy after training."
    )
    errors = {
        choice.name: dict(zip(comparison.layers, choice.guided_errors or choice.errors, strict=True))
        for choice in comparison.choices
    }
    per_choice = [
        {
            "choice": choice.name,
            **{f"layer {number}": _number(value) for number, value in enumerate(choice.errors)},
        }
        for choice in comparison.choices
    ]
    tables = {
        "Choices (measured)": [{name: str(value) for name, value in row.items()} for row in report.table],
        "Attention error of each layer before training": per_choice,
    }
    pictures = {
        "Attention error of each layer after the guided updates": per_layer(errors, "relative error", ordered=False)
    }
    section = Section((), facts=report.findings, overview=Overview(tables, pictures))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"sample": sample, "findings": report.findings, **to_plain(comparison)})
    title = "Mixers before training"
    write_text(report.page, render("report.html", title=title, intro=intro, sections=[section]))
