"""Model card of a graft for the hub: changes, gains and costs beside the dense model, reproduction and citation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

from graftwork.core.config import to_plain, yaml_text
from graftwork.core.files import read_json, read_lines, write_text
from graftwork.core.run_folder import RunFolder, is_path, task_file
from graftwork.core.version import __version__
from graftwork.errors import GraftworkError
from graftwork.grafting.method import Method
from graftwork.metrics.answers import AnswerScore, score_answer
from graftwork.metrics.results import ResultRow, Results
from graftwork.reporting.selection import current_results
from graftwork.reporting.verdicts import Comparison, compare_costs, compare_scores
from graftwork.settings.recipe import RunConfig, read_run

CARD_FILE = "README.md"
MARK = "<!-- Written by Graftwork, which replaces this file; remove this line to keep your own text. -->"
DENSE = "dense"
_TAGS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
}
"""Pipeline tag by the end of a model's class name."""
_HUB_TASK = "hub:"
_TOLERANCE = 0.01
"""Largest difference between a recorded score and the mean of its recomputed examples, in points."""


def write_card(
    run: RunFolder, methods: Sequence[Method[Any]], *, config: RunConfig | None = None, name: str | None = None
) -> None:
    """Write the model card into the model folder of a run, unless that contains a README of someone else.

    Args:
        run: Run folder with `model/` and `conversion.json`.
        methods: Methods on the model.
        config: Configuration of the run; that of `run.yaml` by default.
        name: Name of the model; that of the run's folder by default.
    """
    file = run.model / CARD_FILE
    if not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace"):
        write_text(file, model_card(run, methods, config=config, name=name))


def model_card(
    run: RunFolder, methods: Sequence[Method[Any]], *, config: RunConfig | None = None, name: str | None = None
) -> str:
    """Return the model card of a run as Markdown with a YAML header.

    Args:
        run: Run folder with `model/` and `conversion.json`.
        methods: Methods on the model.
        config: Configuration of the run; that of `run.yaml` by default.
        name: Id of the repository; the run's name by default.
    """
    if config is None and run.run_file.exists():
        config = read_run(run)
    results = _results(run)
    base = "" if config is None else config.model
    architecture = _architecture(run)
    shown = name or "THIS MODEL"
    parts = [
        _header(methods, base, architecture, config, results, name or run.path.resolve().name),
        f"{MARK}\n",
        f"# {(name or run.path.resolve().name).rpartition('/')[2]}\n",
        _introduction(methods, base, architecture),
        "## What changed\n",
        _changes(run, methods),
        "## Cost and gain beside the dense model\n",
        _measured(run, results),
        "## Use\n",
        _use(shown, methods, architecture),
        "## Reproduce\n",
        _reproduction(config, methods),
        "## Limits\n",
        _limits(methods, results),
        "## Citation\n",
        "\n".join(_citation(method) for method in methods) or "The base model is unchanged; cite its authors.\n",
    ]
    return "\n".join(parts)


def _results(run: RunFolder) -> Results | None:
    """Results of the weights in the run; None if there are none."""
    if not run.results_file.exists():
        return None
    try:
        return current_results(run, verify=False)
    except GraftworkError:
        # results of earlier weights are not those of this model
        return None


def _architecture(run: RunFolder) -> str:
    file = run.model / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return str((config.get("architectures") or ["the model"])[0])


def is_hub_id(name: str) -> bool:
    """True if a model's name can be the id of a repository on the hub, and is no folder here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not is_path(name) and not Path(name).exists()


def _header(
    methods: Sequence[Method[Any]],
    base: str,
    architecture: str,
    config: RunConfig | None,
    results: Results | None,
    name: str,
) -> str:
    """YAML header in the format of the hub; only ids that the hub can resolve are named."""
    from huggingface_hub import EvalResult, ModelCardData

    tag = next((tag for end, tag in _TAGS.items() if architecture.endswith(end)), None)
    tasks = [*(config.train.tasks if config and config.train else ()), *(row.task for row in _own(results))]
    data = [task.removeprefix(_HUB_TASK).split(":")[0] for task in tasks if task.startswith(_HUB_TASK)]
    measured = [
        EvalResult(
            task_type=tag or "text-generation",
            dataset_type=_shown(row.task).removeprefix(_HUB_TASK).split(":")[0],
            dataset_name=_shown(row.task),
            dataset_split=row.split,
            metric_type=metric,
            metric_name=f"{metric} ({row.label}, n = {row.size})",
            metric_value=round(value, 4),
        )
        for row in _own(results)
        if row.label != DENSE
        for metric, value in row.scores.items()
        if value == value
    ]
    # the conversion to YAML is untyped
    header: Any = ModelCardData(
        library_name="graftwork",
        base_model=base if is_hub_id(base) else None,
        base_model_relation="finetune" if is_hub_id(base) else None,
        pipeline_tag=tag,
        tags=["graftwork", "transformers", *(method.name for method in methods)],
        datasets=list(dict.fromkeys(data)) or None,
        metrics=list(dict.fromkeys(one.metric_type for one in measured)) or None,
        model_name=name.rpartition("/")[2] if measured else None,
        eval_results=measured or None,
    )
    return f"---\n{header.to_yaml()}\n---\n"


def _own(results: Results | None) -> Sequence[ResultRow]:
    return () if results is None else [row for row in results.rows if row.own is not False]


def _introduction(methods: Sequence[Method[Any]], base: str, architecture: str) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{Path(base).name or 'a model'}`"
    grafts = "; ".join(f"`{method.name}`: {method.summary or method.title}" for method in methods)
    what = f"with {grafts}" if methods else "without a method"
    return f"{origin} (`{architecture}`) {what}. Written by Graftwork {__version__}.\n"


def _changes(run: RunFolder, methods: Sequence[Method[Any]]) -> str:
    lines: list[str] = []
    for method in methods:
        settings = _set(method.config)
        shown = ", ".join(f"`{name}` {value}" for name, value in settings.items()) or "defaults"
        lines += [f"`{method.name}` ({method.title}), settings: {shown}.", ""]
    found: list[dict[str, Any]] = read_json(run.conversion_file)["changes"] if run.conversion_file.exists() else []
    groups: dict[tuple[str, str, str], list[str]] = {}
    for change in found:
        numbers = re.findall(r"\d+", change["path"])
        pattern = re.sub(r"\d+", "*", change["path"], count=1)
        groups.setdefault((pattern, change["before"], change["after"]), []).append(numbers[0] if numbers else "–")
    if not groups:
        return "\n".join([*lines, "No module is changed; the method is a way to train and to decode.", ""])
    lines += ["| modules | numbers of * | before | after |", "|---|---|---|---|"]
    for (pattern, before, after), numbers in groups.items():
        lines.append(_row([f"`{pattern}`", _ranges(numbers), before, after]))
    return "\n".join([*lines, ""])


def _set(config: Any) -> dict[str, Any]:
    """Settings that differ from their defaults."""
    defaults: dict[str, Any] = {}
    for entry in fields(config):
        if entry.default is not MISSING:
            defaults[entry.name] = to_plain(entry.default)
        elif entry.default_factory is not MISSING:
            defaults[entry.name] = to_plain(entry.default_factory())
    return {name: value for name, value in to_plain(config).items() if name not in defaults or value != defaults[name]}


def _ranges(numbers: Sequence[str]) -> str:
    """Numbers with runs of consecutive ones joined: 0–3, 5."""
    if not all(number.isdecimal() for number in numbers):
        return "–"
    parts: list[list[int]] = []
    for number in sorted({int(number) for number in numbers}):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _measured(run: RunFolder, results: Results | None) -> str:
    """Tables of scores and costs, each number beside that of the dense model."""
    scores, costs = list(score_rows(run, results)), list(cost_rows(results))
    if not scores and not costs:
        return "Not measured. `graftwork evaluate RUN --task TASK --baseline` measures both models.\n"
    lines: list[str] = []
    if scores:
        lines += [_row(["task", "split", "score", "setting", "dense", "graft", "difference [95 %]", "n"])]
        lines += ["|---|---|---|---|---|---|---|---|", *map(_row, scores), ""]
        lines += ["Intervals: paired bootstrap over the same examples. A dash is a number that was not measured.", ""]
    if costs:
        lines += [_row(["cost", "dense", "graft", "ratio", "difference [range]", "n"]), "|---|---|---|---|---|---|"]
        lines += [*map(_row, costs), ""]
        device = next(iter(dict.fromkeys(row.device for row in results.cost))) if results else ""
        lines += [f"Measured on `{device}`; times depend on the machine.", ""]
    return "\n".join(lines)


def score_rows(run: RunFolder, results: Results | None) -> Iterator[list[str]]:
    """Cells of the table of scores: every score of the graft beside that of the dense model."""
    rows = _own(results)
    dense = {(row.task, row.split): row for row in rows if row.label == DENSE}
    for row in rows:
        if row.label == DENSE:
            continue
        other = dense.get((row.task, row.split))
        for metric, value in row.scores.items():
            before = None if other is None else other.scores.get(metric)
            compared = None if other is None or before is None else _compared(run, row, other, metric)
            if compared is not None:
                difference = compared.change
            else:
                difference = "–" if before is None else f"{value - before:+.2f}"
            cells = [_shown(row.task), row.split, metric, row.label, "–" if before is None else f"{before:.2f}"]
            yield [*cells, f"{value:.2f}", difference, str(row.size)]


def _compared(run: RunFolder, graft: ResultRow, dense: ResultRow, metric: str) -> Comparison | None:
    """Comparison over the examples of two prediction files; None if they do not give the recorded scores."""
    files = [run.predictions / task_file(row.task, row.label) for row in (dense, graft)]
    if not all(file.is_file() for file in files):
        return None
    try:
        dense_scores, graft_scores = (_example_scores(file) for file in files)
    except (GraftworkError, LookupError, TypeError, AttributeError):
        return None
    if not dense_scores or dense_scores.keys() != graft_scores.keys():
        return None
    for name in (field.name for field in fields(AnswerScore)):
        theirs, ours = (
            {key: 100 * float(getattr(one, name)) for key, one in part.items()} for part in (dense_scores, graft_scores)
        )
        if _is_mean(theirs, dense.scores[metric]) and _is_mean(ours, graft.scores[metric]):
            higher = graft.higher_is_better.get(metric, True)
            return compare_scores(metric, theirs, ours, "examples", higher_is_better=higher)
    return None


def _example_scores(file: Path) -> dict[str, AnswerScore]:
    """Scores of the answers in a file of predictions, by the id of the example."""
    return {str(row["id"]): score_answer(row["prediction"], row["answers"]) for row in read_lines(file)}


def _is_mean(scores: Mapping[str, float], recorded: float) -> bool:
    return abs(sum(scores.values()) / len(scores) - recorded) <= _TOLERANCE


def cost_rows(results: Results | None) -> Iterator[list[str]]:
    """Cells of the table of costs at the greatest measured length."""
    labels = list(dict.fromkeys(row.label for row in results.cost)) if results is not None else []
    if results is None or DENSE not in labels:
        return
    for label in labels:
        if label == DENSE:
            continue
        for one in compare_costs(results, DENSE, label):
            yield [
                one.name,
                f"{one.dense:.4g} {one.unit}",
                f"{one.graft:.4g} {one.unit}",
                f"{one.ratio:.2f}×",
                one.change,
                str(one.size) if one.size > 1 else one.counted,
            ]


def _use(name: str, methods: Sequence[Method[Any]], architecture: str) -> str:
    auto = next((auto for end, auto in _AUTO.items() if architecture.endswith(end)), "AutoModel")
    loader = f'\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")  # the graft, as a model\n'
    needed = "pip install graftwork" if any(method.changes_model for method in methods) else "pip install transformers"
    return (
        f"```shell\n{needed}\n```\n\n```python\nimport graftwork as gw\n\n"
        f'converted = gw.load("{name}")  # model, tokenizer and methods\n{loader}```\n'
    )


_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""Class of transformers that opens a model, by the end of the model's class name."""


def _reproduction(config: RunConfig | None, methods: Sequence[Method[Any]]) -> str:
    if config is None:
        return "The model was converted in Python; no configuration is recorded.\n"
    plain = {name: value for name, value in _set(config).items() if name not in ("versions", "notes", "published")}
    for section in ("train", "evaluate"):
        settings = getattr(config, section)
        if settings is not None:
            plain[section] = _set(settings)
    if methods and config.method is not None:
        plain["method"] = {"name": methods[-1].name, **_set(methods[-1].config)}
    return (
        "Save these settings as `recipe.yaml`, with the folders of model and data corrected where they are local:\n\n"
        f"```yaml\n{yaml_text(_without_places(plain))}```\n\n```shell\ngraftwork run recipe.yaml -o run\n```\n"
    )


def _without_places(value: Any) -> Any:
    """Plain values with the last part of every absolute path: folders of one machine mean nothing on another."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_places(item) for item in cast("list[Any]", value)]
    return _shown(value) if isinstance(value, str) else value


def _shown(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _limits(methods: Sequence[Method[Any]], results: Results | None) -> str:
    lines = ["- Abilities, biases and licence are those of the base model and of the data it was trained on."]
    if any(method.changes_model for method in methods):
        lines.append("- Programs without Graftwork refuse the model, because the dense model would answer differently.")
    sizes = sorted({row.size for row in _own(results)})
    if sizes:
        upper = f" to {sizes[-1]}" if len(sizes) > 1 else ""
        lines.append(f"- Scores are from {sizes[0]}{upper} examples of each task.")
    else:
        lines.append("- Nothing was measured on these weights; compare them with the dense model before use.")
    return "\n".join([*lines, ""])


def _citation(method: Method[Any]) -> str:
    paper = method.paper
    arxiv = paper.identifier.removeprefix("arXiv:")
    where = f"https://arxiv.org/abs/{arxiv}" if arxiv != paper.identifier else f"https://doi.org/{paper.identifier}"
    code = paper.repository.partition(",")[0]
    return (
        f"```bibtex\n@misc{{{method.name}{paper.year},\n  title = {{{paper.title}}},\n  year = {{{paper.year}}},\n"
        f"  url = {{{where}}}\n}}\n```\n\nThe authors' code: [{paper.repository}](https://github.com/{code}).\n"
    )
