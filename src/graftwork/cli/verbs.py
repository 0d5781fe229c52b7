"""What the verbs do once their options are read: put settings together and call the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.checkpoint import Converted, load, save
from graftwork.cli.output import say
from graftwork.config import build, merge, parse_assignments, parse_sweep, read_yaml, to_plain
from graftwork.conversion import convert
from graftwork.errors import ConfigError, DataError
from graftwork.evaluation_settings import EvaluationSettings
from graftwork.files import append_line
from graftwork.methods import NAMES
from graftwork.pipeline import evaluate, report, sweep, train
from graftwork.prediction import predict
from graftwork.progress import Progress
from graftwork.recipe import RunConfig, load_recipe, write_run
from graftwork.reporting.results import Results
from graftwork.run_folder import RunFolder, is_run
from graftwork.runner import build_method, run_recipe
from graftwork.tasks.task import Example
from graftwork.training.settings import TrainingSettings


def prepare_files(
    tasks: Sequence[str], *, input: str, output: str, split: str, format: Any, **options: Any
) -> list[dict[str, Any]]:
    """`graftwork prepare`."""
    from graftwork.tasks.prepare import prepare

    names = [name.removeprefix("unifiedqa/").removesuffix("_t5") for name in tasks]
    prepared = prepare(names, input=Path(input), output=Path(output), split=split, format=format, **options)
    say(f"Wrote {prepared.path}" + (f" and {prepared.weighted_path}" if prepared.weighted_path else ""))
    return [to_plain(summary) for summary in prepared.summaries]


def convert_model(
    method: str,
    model: str,
    *,
    output: str | None,
    dry_run: bool,
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    dtype: str | None,
) -> list[dict[str, str]]:
    """`graftwork convert`: returns the changed modules."""
    cls = NAMES.get(method)
    given = parse_assignments(assignments)
    _known_sections(given, ("method",))
    settings = {**given.get("method", {}), **flags}
    chosen = cls(build(cls.config_class, settings, where=f"settings of {method}"))
    if output is None and not dry_run:
        raise ConfigError("Found no run folder to write to. Give one with -o, or --dry-run to look only.")
    converted = convert(load(model, dtype=dtype), chosen)
    if not dry_run and output is not None:
        save(converted, output)
        origin = _run_config(model).model if is_run(model) else model
        entry = {"name": method, **to_plain(chosen.config)}
        write_run(RunFolder(output).run_file, RunConfig(model=_absolute(origin), method=entry, dtype=dtype))
        say(f"Converted {len(converted.changes)} modules; wrote {output}")
    return [to_plain(change) for change in converted.changes]


def train_run(
    run: str,
    tasks: Sequence[str],
    *,
    data: str | None,
    config: str | None,
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    seed: int | None,
    overwrite: bool,
) -> dict[str, dict[str, float]]:
    """`graftwork train`: returns each phase's closing numbers."""
    folder = RunFolder(run)
    recorded = _run_config(run)
    given = parse_assignments(assignments)
    _known_sections(given, ("train",))
    from_file = {} if config is None else read_yaml(Path(config))
    plain = merge(from_file.get("train", from_file), given.get("train", {}), flags)
    if tasks:
        plain = {**plain, "tasks": list(tasks)}
    settings = build(TrainingSettings, plain, where=config or "training settings")
    seed = recorded.seed if seed is None else seed
    converted = load(run)
    write_run(folder.run_file, replace(recorded, train=settings, data=_absolute(data), seed=seed))
    trained = train(converted, settings, data=data, run=run, seed=seed, overwrite=overwrite)
    say(f"Trained; wrote {folder.model}")
    return {name: dict(numbers) for name, numbers in trained.phases.items()}


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    *,
    data: str | None,
    output: str | None,
    over: Sequence[str],
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    strict: bool,
    dtype: str | None,
    device_map: str | None,
) -> list[dict[str, Any]]:
    """`graftwork evaluate`: returns one record for each task and setting."""
    given = parse_assignments(assignments)
    _known_sections(given, ("method", "evaluate"))
    plain = merge(given.get("evaluate", {}), flags)
    if tasks:
        plain = {**plain, "tasks": list(tasks)}
    settings = build(EvaluationSettings, plain, where="evaluation settings")
    converted = _load(model, given.get("method"), strict, dtype, device_map)
    run = output or (model if is_run(model) else None)
    if run is not None:
        folder = RunFolder(run)
        recorded = _run_config(run) if folder.run_file.exists() else RunConfig(model=_absolute(model))
        write_run(folder.run_file, replace(recorded, evaluate=settings, data=_absolute(data) or recorded.data))
    if over:
        config = RunConfig(model=model, over={key: tuple(values) for key, values in parse_sweep(over).items()})
        results = sweep(converted, config.points(), settings, data=data, run=run)
    else:
        results = evaluate(converted, settings=settings, data=data, run=run)
    return _records(results)


def predict_file(
    model: str,
    input: str,
    *,
    output: str | None,
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    strict: bool,
    dtype: str | None,
    device_map: str | None,
    as_json: bool,
) -> None:
    """`graftwork predict`: prints answers, or writes them to a file."""
    given = parse_assignments(assignments)
    _known_sections(given, ("method", "evaluate"))
    settings = build(EvaluationSettings, merge(given.get("evaluate", {}), flags), where="prediction settings")
    rows = _questions(Path(input))
    converted = _load(model, given.get("method"), strict, dtype, device_map)
    target = None if output is None else Path(output)
    with Progress("predict", total=len(rows)) as progress:
        answers = predict(converted, rows, settings, output=target, advance=progress.advance)
    if target is not None:
        say(f"Wrote {target}")
        return
    for row, answer in zip(rows, answers, strict=True):
        record = {"id": row.key, "input": row.input, "prediction": answer}
        print(json.dumps(record, ensure_ascii=False) if as_json or not sys.stdout.isatty() else f"{row.input}\n  → {answer}")


def run_whole(
    recipe: str,
    *,
    output: str | None,
    data: str | None,
    over: Sequence[str],
    seeds: int | None,
    assignments: Sequence[str],
    overwrite: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """`graftwork run`: returns records and the report's paths."""
    overrides = parse_assignments(assignments)
    config = load_recipe(recipe, overrides)
    if over:
        config = replace(config, over={key: tuple(values) for key, values in parse_sweep(over).items()})
    config = replace(config, data=_absolute(data) or config.data, seeds=seeds or config.seeds)
    path = Path(recipe)
    default = path.parent if path.name == "run.yaml" else Path("runs") / path.with_suffix("").name
    target = Path(output) if output is not None else default
    results = run_recipe(config, target, overwrite=overwrite)
    written = report([target]) if results.rows else []
    return _records(results), [str(file) for file in written]


def _load(
    model: str, method: Mapping[str, Any] | None, strict: bool, dtype: str | None, device_map: str | None
) -> Converted:
    """A model, with settings of its recorded method exchanged where some were given."""
    if method is None:
        return load(model, dtype=dtype, device_map=device_map, strict=strict)
    recorded = load(model, dtype=dtype, device_map=device_map)
    if not recorded.methods and "name" not in method:
        raise ConfigError(f"{model} records no method, so method.{next(iter(method))} has nothing to change. Set method.name.")
    base = {} if "name" in method else {"name": recorded.methods[-1].name, **to_plain(recorded.methods[-1].config)}
    changed = build_method({**base, **method})
    others = [entry for entry in recorded.methods if entry.name != changed.name]
    return load(model, methods=[*others, changed], strict=strict, dtype=dtype, device_map=device_map)


def _questions(path: Path) -> list[Example]:
    if path.suffix in (".jsonl", ".json"):
        from graftwork.tasks.prepare import load_prepared

        return [row for examples in load_prepared(path) for row in examples.rows]
    from graftwork.tasks.sources import read_lines

    rows = [Example(key=str(n), input=line, target="") for n, line in enumerate(read_lines(path), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} holds no line of text. Write one input on each line.")
    return rows


def _run_config(run: str) -> RunConfig:
    folder = RunFolder(run)
    file = folder.require(folder.run_file, "convert")
    return build(RunConfig, read_yaml(file), where=str(file))


def _records(results: Results) -> list[dict[str, Any]]:
    records = []
    for row in results.rows:
        scores = {name: round(value, 2) for name, value in row.scores.items()}
        seed = {"seed": row.seed} if len({other.seed for other in results.rows}) > 1 else {}
        records.append({"setting": row.label, "task": row.task, "split": row.split, **seed, **scores, "size": row.size})
    # one header for all: a metric that a task does not have shows as a dash
    columns = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key, "–") for key in columns} for record in records]


def _known_sections(given: Mapping[str, Any], sections: Sequence[str]) -> None:
    for key, value in given.items():
        if key not in sections or not isinstance(value, Mapping):
            raise ConfigError(f"Found --set {key}. Expected section.key=value with section {' or '.join(sections)}.")


def _absolute(path: str | None) -> Any:
    """A path that means the same from another folder; a hub id stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
