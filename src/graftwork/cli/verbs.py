"""What the verbs do once their options are read: put settings together and call the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from graftwork.cli.output import results_only
from graftwork.core.config import build, merge, parse_assignments, parse_sweep, read_yaml, to_plain
from graftwork.core.files import write_text
from graftwork.core.messages import say
from graftwork.core.progress import Progress
from graftwork.core.run_folder import DETAILS_SUFFIX, RUN_FILE, RunFolder, is_run
from graftwork.errors import ConfigError, GraftworkError
from graftwork.evaluation.prediction import predict_records
from graftwork.grafting.capabilities import Calibrates, Examines
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, required_tokenizer, save
from graftwork.grafting.method import Method
from graftwork.methods import NAMES
from graftwork.metrics.results import Results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import build_method, evaluate_checkpoints, run_recipe, untrained
from graftwork.pipeline.sweeps import sweep
from graftwork.pipeline.training import train
from graftwork.reporting.render import report
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, load_recipe, write_run
from graftwork.settings.training import TrainingSettings
from graftwork.tasks import get_task
from graftwork.tasks.inputs import read_inputs
from graftwork.tasks.loading import check_tasks, load_tasks, training_tasks
from graftwork.tasks.naming import class_labels
from graftwork.tasks.sources import write_json_lines


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
    tasks: Sequence[str],
    data: str | None,
    seed: int,
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
    _check_folder(output)
    labels = class_labels(tasks, data)
    loaded = load(model, dtype=dtype, labels=labels, seed=seed)
    if isinstance(chosen, Calibrates) and chosen.needs_calibration and tasks:
        rows = [row for _, part in load_tasks(tasks, data, "train", seed) for row in part.rows]
        chosen = chosen.calibrate(loaded.model, required_tokenizer(loaded), rows)
    converted = convert(loaded, chosen)
    if not dry_run and output is not None:
        save(converted, output)
        entry = {"name": method, **to_plain(chosen.config)}
        write_run(RunFolder(output).run_file, RunConfig(model=_absolute(model), method=entry, dtype=dtype, seed=seed))
        say(f"Converted {len(converted.changes)} modules; wrote {output}")
    return [change.plain() for change in converted.changes]


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
) -> list[dict[str, Any]]:
    """`graftwork train`: returns one record for each phase, with its closing numbers."""
    folder = RunFolder(run)
    recorded = _run_config(run)
    given = parse_assignments(assignments)
    _known_sections(given, ("train",))
    from_file = {} if config is None else read_yaml(Path(config))
    plain = merge(from_file.get("train", from_file), given.get("train", {}), flags)
    if tasks:
        plain = {**plain, "tasks": list(tasks)}
    settings = build(TrainingSettings, plain, where=config or "training settings")
    chosen_seed = recorded.seed if seed is None else seed
    check_tasks(training_tasks(settings), data)
    converted = load(run)
    before = folder.run_file.read_text(encoding="utf-8")
    chosen = replace(recorded, train=settings, data=_absolute(data), seed=chosen_seed)
    # before training, so that a stopped one can be repeated from its run.yaml
    write_run(folder.run_file, chosen)
    # the conversion's own seed: that of the training may be another one
    begun = partial(untrained, replace(chosen, seed=recorded.seed), converted.methods)
    try:
        with results_only():
            trained = train(converted, settings, data=data, run=run, seed=chosen_seed, overwrite=overwrite, anew=begun)
    except GraftworkError:
        write_text(folder.run_file, before)
        raise
    say(f"Trained; wrote {folder.model}")
    return _aligned([{"phase": name, **numbers} for name, numbers in trained.phases.items()])


def evaluate_model(
    model: str,
    tasks: Sequence[str],
    *,
    data: str | None,
    output: str | None,
    over: Sequence[str],
    checkpoints: str | None,
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
    check_tasks(settings.tasks, data)
    _check_folder(output)
    if checkpoints is not None:
        if over or given.get("method") or not is_run(model):
            raise ConfigError(
                "--checkpoints evaluates those of a run, as it was trained: leave out --over and --set method."
            )
        kept = evaluate_checkpoints(
            model, checkpoints, settings, data=data, output=output or model, dtype=dtype, device_map=device_map
        )
        return _records(kept)
    run = output or (model if is_run(model) else None)
    recorded = _run_config(run) if run and RunFolder(run).run_file.exists() else RunConfig(model=_absolute(model))
    if over:
        config = RunConfig(model=model, over={key: tuple(values) for key, values in parse_sweep(over).items()})
        converted = load(model, dtype=dtype, device_map=device_map, strict=strict)
        varied = _method(converted, given["method"], model) if "method" in given else None
        results = sweep(converted, config.points(), settings, method=varied, data=data, run=run)
    else:
        converted = _load(model, given.get("method"), strict, dtype, device_map)
        results = evaluate(converted, settings=settings, data=data, run=run)
    if run is not None:
        updated = replace(recorded, evaluate=settings, data=_absolute(data) or recorded.data)
        write_run(RunFolder(run).run_file, updated)
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
    rows = read_inputs(Path(input), settings)
    target = None if output is None else Path(output)
    if target is not None and target.exists() and target.resolve() == Path(input).resolve():
        raise ConfigError(f"Found {output} as input and as output. Give another file for the answers.")
    converted = _load(model, given.get("method"), strict, dtype, device_map)
    with Progress("predict", total=len(rows)) as progress:
        found = predict_records(converted, rows, settings, output=target, advance=progress.advance)
    answers = [record["prediction"] for record in found]
    extra: list[Mapping[str, Any]] = [{} for _ in rows]
    task = None if settings.prompt is None else get_task(settings.prompt)
    for method in converted.methods:
        if isinstance(method, Examines):
            details = method.examine(converted.model, required_tokenizer(converted), task, rows, answers, settings).rows
            extra = [{**one, **more} for one, more in zip(extra, details or extra, strict=True)]
    if target is not None:
        say(f"Wrote {target}")
        if any(extra):
            write_json_lines(target.with_suffix(DETAILS_SUFFIX), extra)
            say(f"Wrote {target.with_suffix(DETAILS_SUFFIX)}")
        return
    for row, answer, more in zip(rows, found, extra, strict=True):
        record = {"id": row.key, "input": row.input, **answer, **more}
        print(
            json.dumps(record, ensure_ascii=False)
            if as_json or not sys.stdout.isatty()
            else f"{row.input}\n  → {answer['prediction']}"
        )


def compare_run_graphs(
    run: str, tasks: Sequence[str], *, cost_lengths: str | None, **options: Any
) -> tuple[list[dict[str, Any]], str]:
    """`graftwork graphs`: returns the table of recall at sparsity, and the folder that was written."""
    from graftwork.methods.sparsefinder.graph_report import compare_graphs

    if not tasks:
        raise ConfigError("Found no task to take held-out text from. Name at least one with --task.")
    check_tasks(tasks, options["data"])
    report = compare_graphs(load(run), tasks, cost_lengths=_lengths(cost_lengths), **options)
    return _aligned(report.table), str(report.folder)


def _lengths(text: str | None) -> list[int]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) >= 2 for part in parts):
        raise ConfigError(f"cost_lengths is {text!r}. Expected whole numbers from 2 with commas between, as 512,1024.")
    return [int(part) for part in parts]


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
    again = path if path.is_dir() else path.parent if path.name == RUN_FILE else None
    target = Path(output) if output is not None else again or Path("runs") / path.name.removesuffix(".yaml")
    _check_folder(str(target))
    with results_only():
        results = run_recipe(config, target, overwrite=overwrite)
    written = report([target]) if results.rows else []
    return _records(results), [str(file) for file in written]


def load_with(model: str, assignments: Sequence[str]) -> Converted:
    """A model, with settings of its method exchanged as `--set method.KEY=VALUE` says."""
    given = parse_assignments(assignments)
    _known_sections(given, ("method",))
    return _load(model, given.get("method"), False, None, None)


def _load(
    model: str, method: Mapping[str, Any] | None, strict: bool, dtype: str | None, device_map: str | None
) -> Converted:
    """A model, with settings of its recorded method exchanged where some were given."""
    if method is None:
        return load(model, dtype=dtype, device_map=device_map, strict=strict)
    recorded = load(model, dtype=dtype, device_map=device_map)
    changed = _method(recorded, method, model)
    others = [entry for entry in recorded.methods if entry.name != changed.name]
    return load(model, methods=[*others, changed], strict=strict, dtype=dtype, device_map=device_map)


def _method(recorded: Converted, given: Mapping[str, Any], model: str) -> Method[Any]:
    """The recorded method with the given settings, or another one if they name it."""
    if not recorded.methods and "name" not in given:
        raise ConfigError(
            f"{model} records no method, so method.{next(iter(given))} has nothing to change. Set method.name."
        )
    last = None if "name" in given else recorded.methods[-1]
    base = {} if last is None else {"name": last.name, **to_plain(last.config)}
    return build_method({**base, **given})


def _run_config(run: str) -> RunConfig:
    folder = RunFolder(run)
    file = folder.require(folder.run_file, "convert")
    return build(RunConfig, read_yaml(file), where=str(file))


def _records(results: Results) -> list[dict[str, Any]]:
    records = []
    for row in results.rows:
        # what is undefined here, such as BLEU where nobody gave a reason, shows as a dash like what was not measured
        scores = {name: round(value, 2) for name, value in row.scores.items() if value == value}
        seed = {"seed": row.seed} if len({other.seed for other in results.rows}) > 1 else {}
        records.append({"setting": row.label, "task": row.task, "split": row.split, **seed, **scores, "size": row.size})
    return _aligned(records)


def _aligned(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One header for all: a metric that a task or a phase does not have shows as a dash."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return [{key: record.get(key, "–") for key in columns} for record in records]


def _check_folder(path: str | None) -> None:
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"Found a file at {path}. Expected a run folder to write to; give another name with -o.")


def _known_sections(given: Mapping[str, Any], sections: Sequence[str]) -> None:
    for key, value in given.items():
        if key not in sections or not isinstance(value, Mapping):
            raise ConfigError(f"Found --set {key}. Expected section.key=value with section {' or '.join(sections)}.")


def _absolute(path: str | None) -> Any:
    """A path that means the same from another folder; a hub id stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
