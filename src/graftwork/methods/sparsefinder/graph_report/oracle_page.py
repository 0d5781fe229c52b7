"""Page of `graftwork graphs --oracle`: table and heat maps of the attention that a budget of key blocks can keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.files import write_json, write_text
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import Converted
from graftwork.methods.sparsefinder.graph_report.oracle import (
    BEST,
    BLOCK,
    BUDGETS,
    GOLD,
    WINDOW,
    Choice,
    measure_choices,
)
from graftwork.methods.sparsefinder.graph_report.plots import choice_maps
from graftwork.methods.sparsefinder.method import Sparsefinder
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from graftwork.reporting.overview import Overview
from graftwork.reporting.pages import render
from graftwork.reporting.render import Section
from graftwork.settings.fields import DataFields
from graftwork.settings.recipe import recorded_fields
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_tasks
from graftwork.training.data import training_data

ENOUGH = 0.9
"""Share of the attention mass below which a budget of blocks is called too small."""
CLOSE = 0.05
"""Difference in mass below which one choice is called as good as another."""
PAGE = "oracle.html"
SAMPLES = 4
"""Default number of sequences of the forward pass."""
TOKENS = 512
"""Default number of tokens of a sequence."""


@dataclass(frozen=True)
class OracleReport:
    """Attention that a budget of key blocks can keep, by choice of the blocks."""

    choices: tuple[Choice, ...]
    """Every choice in every module, by head."""
    table: tuple[dict[str, Any], ...]
    """Averages over modules and heads."""
    findings: tuple[str, ...]
    """Sentences about the best possible choice."""
    page: Path
    """The page."""


def oracle_page(
    converted: Converted,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    split: str = "dev",
    samples: int = SAMPLES,
    max_input_tokens: int = TOKENS,
    budgets: Sequence[float] = BUDGETS,
    block_size: int = BLOCK,
    output: str | Path | None = None,
) -> OracleReport:
    """Measure in one forward pass how much attention any predictor could keep in a budget of key blocks.

    A model without Sparsefinder is measured with its own softmax, whose gold graph is the smallest set of keys with
    95 % of the mass of each query.

    Args:
        converted: Any model whose attention can be converted, with or without a predicted graph.
        tasks: Tasks of the text.
        data: Folder of the tasks' files.
        split: Split of the tasks.
        samples: Number of sequences of the forward pass.
        max_input_tokens: Maximal number of tokens of a sequence.
        budgets: Shares of the allowed key blocks.
        block_size: Tokens per block.
        output: Output folder; `RUN/graphs` if omitted.

    Raises:
        ConfigError: If there is no run folder and no output folder, or a budget is no share.
    """
    folder = converted.folder
    if output is not None:
        target = Path(output)
    elif folder is not None:
        target = folder.graphs
    else:
        raise ConfigError("Found a model outside a run folder. Expected a folder for the page. Give --output (-o).")
    fields = DataFields() if folder is None else recorded_fields(folder)
    examples = [loaded for _, loaded in load_tasks(tasks, data, split, 0, fields=fields)]
    settings = TrainingSettings(tasks=tuple(tasks), max_input_tokens=max_input_tokens)
    dataset, collate = training_data(converted.model, converted.tokenizer, examples, settings, unlabelled=True)
    batch = collate([dataset[index] for index in range(min(samples, len(dataset)))])
    device = next(converted.model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    own = bool(sparsefinder_modules(converted.model))
    measured = converted if own else convert(converted, Sparsefinder(alpha=1.0), copy=bool(converted.methods))
    try:
        choices = measure_choices(measured.model, inputs, budgets=budgets, block_size=block_size)
    finally:
        if not own and not converted.methods:
            restore(converted)
    alpha = sparsefinder_modules(measured.model) if own else {}
    softmax = not alpha or next(iter(alpha.values())).config.alpha == 1.0
    shape = tuple(inputs["input_ids"].shape)
    table, findings = choice_table(choices), choice_findings(choices)
    report = OracleReport(tuple(choices), tuple(table), tuple(findings), target / PAGE)
    _write(report, shape, block_size, softmax)
    return report


def choice_table(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Average every choice over modules and heads: one row per budget and choice."""
    rows: list[dict[str, Any]] = []
    for budget, name in dict.fromkeys((choice.budget, choice.name) for choice in choices):
        own = [choice for choice in choices if (choice.budget, choice.name) == (budget, name)]
        rows.append(
            {
                "budget": budget,
                "choice": name,
                "recall": _mean([choice.recall for choice in own]),
                "mass": _mean([choice.mass for choice in own]),
                "kept": _mean([choice.kept for choice in own]),
            }
        )
    return rows


def choice_findings(choices: Sequence[Choice]) -> list[str]:
    """Sentences that compare the best possible choice with the window and with the predictors, by budget."""
    table = choice_table(choices)
    found: list[str] = []
    for budget in dict.fromkeys(row["budget"] for row in table if row["budget"] is not None):
        mass = {row["choice"]: row["mass"] for row in table if row["budget"] == budget}
        best, window = mass[BEST], mass[WINDOW]
        others = {name: value for name, value in mass.items() if name not in (BEST, WINDOW)}
        name, other = max(others.items(), key=lambda item: item[1])
        text = f"With {budget:.1%} of the blocks, the best possible choice keeps {best:.2f} of the attention mass"
        if best < ENOUGH:
            text += ": no predictor can do better, and this budget is too small for the model."
        elif window >= best - CLOSE:
            text += f", and a window keeps {window:.2f}: a predictor cannot add much."
        else:
            verdict = "The best one here" if other > window else "None here beats the window; the best"
            text += f" and a window {window:.2f}: a predictor can help. {verdict}, {name}, keeps {other:.2f}."
        found.append(text)
    heads = [value for choice in choices if choice.name == GOLD for value in choice.kept]
    few = sum(value <= 0.5 for value in heads)
    found.append(f"In {few} of {len(heads)} heads, the gold graph needs at most half of the blocks.")
    return found


def _write(report: OracleReport, shape: tuple[int, ...], block_size: int, softmax: bool) -> None:
    """Write `oracle.json`, the heat maps and the page."""
    gold = (
        "the smallest set of keys with 95 % of each query's softmax mass"
        if softmax
        else "the keys with a positive entmax probability"
    )
    intro = (
        f"One forward pass over {shape[0]} sequences of {shape[1]} tokens (measured). Key blocks of {block_size} "
        f"tokens are kept up to a budget of each head. Gold pairs are {gold}; recall is the share of gold pairs in the "
        "kept blocks, mass the attention probability in them. The best possible recall and mass belong to two choices "
        "that know all scores. Pooled queries include all tokens of a block, also later ones of a decoder."
    )
    folder = report.page.parent
    modules = list(dict.fromkeys(choice.module for choice in report.choices))
    pictures = {
        ("Gold graph" if budget is None else f"{budget:.1%} of the blocks") + ", by layer and head": choice_maps(
            [choice for choice in report.choices if choice.budget == budget], modules
        )
        for budget in dict.fromkeys(choice.budget for choice in report.choices)
    }
    rows = [
        {
            "blocks": "as many as needed" if row["budget"] is None else f"{row['budget']:.1%}",
            "choice": row["choice"],
            **{name: f"{row[name]:.3f}" for name in ("recall", "mass", "kept")},
        }
        for row in report.table
    ]
    overview = Overview({"Mean over layers and heads": rows}, pictures)
    section = Section((), facts=report.findings, overview=overview)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "oracle.json",
        {"tokens": list(shape), "block_size": block_size, "choices": [to_plain(choice) for choice in report.choices]},
    )
    title = "Attention that key blocks can keep"
    write_text(report.page, render("report.html", title=title, intro=intro, sections=[section]))


def _mean(heads: Sequence[Sequence[float]]) -> float:
    """Mean over modules of the mean over heads."""
    return sum(sum(own) / len(own) for own in heads) / len(heads)
