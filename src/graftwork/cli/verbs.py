"""Verbs after option parsing: combine settings, call the stage, format its result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from graftwork.cli.output import results_only
from graftwork.cli.records import records_of
from graftwork.core.config import build, merge, parse_assignments, parse_sweep, read_yaml
from graftwork.core.devices import Placing
from graftwork.core.messages import aligned, json_text, printable, say
from graftwork.core.processes import is_main_process
from graftwork.core.run_folder import DETAILS_SUFFIX, RUN_FILE, RunFolder, absolute, is_run
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.results import Results
from graftwork.pipeline.answers import predict, predict_to_file
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.harness.tasks import check_lm_eval
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import evaluate_checkpoints, run_recipe
from graftwork.pipeline.start import (
    build_method,
    convert_checkpoint,
    load_varied,
    run_of,
    varied_method,
    with_input_fields,
    with_run_fields,
)
from graftwork.pipeline.sweeps import sweep
from graftwork.pipeline.training import loading_device, train
from graftwork.reporting.render import report
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.recipe import RunConfig, load_recipe
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.inputs import input_rows, read_inputs
from graftwork.tasks.loading import check_tasks, training_tasks


def convert_model(
    method: str,
    model: str,
    *,
    output: str | None,
    dry_run: bool,
    overwrite: bool,
    tasks: Sequence[str],
    data: str | None,
    seed: int,
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    random_weights: bool,
    fields: Mapping[str, Any],
    by_reference: bool,
    **placing: Unpack[Placing],
) -> list[dict[str, str]]:
    """Run `graftwork convert`; return the changed modules. See `graftwork.pipeline.start.convert_checkpoint`."""
    given = sections(assignments, "method")
    chosen = build_method({"name": method, **given.get("method", {}), **flags})
    if output is None and not dry_run:
        raise ConfigError("Found no run folder to write to. Give one with -o, or --dry-run to only list the changes.")
    _check_folder(output)
    converted = convert_checkpoint(
        model,
        chosen,
        tasks=tasks,
        data=data,
        seed=seed,
        random_weights=random_weights,
        fields=build(DataFields, fields, where="the columns of --task"),
        **placing,
    )
    if not dry_run and output is not None:
        converted.save(output, overwrite=overwrite, base_by_reference=by_reference or None)
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
    estimate: bool = True,
    **placing: Unpack[Placing],
) -> list[dict[str, Any]]:
    """Run `graftwork train`; return the closing numbers of each phase. See `graftwork.pipeline.training.train`."""
    RunFolder(run).require(RunFolder(run).run_file, "convert")
    given = sections(assignments, "train")
    from_file = {} if config is None else read_yaml(Path(config))
    plain = merge(from_file.get("train", from_file), given.get("train", {}), flags)
    if tasks:
        plain = {**plain, "tasks": list(tasks)}
    settings = build(TrainingSettings, plain, where=config or "training settings")
    check_tasks(training_tasks(settings), data, settings, split=settings.split)
    with results_only():
        device = placing.get("device")
        device_map, dtype = placing.get("device_map"), placing.get("dtype")
        place = loading_device(settings, device)
        loaded = dtype is not None or device_map is not None
        model = load(run, device=place, device_map=device_map, dtype=dtype) if loaded else run
        trained = train(model, settings, data=data, seed=seed, overwrite=overwrite, estimate=estimate, device=device)
    say(f"Trained; wrote {RunFolder(run).model}")
    return aligned([{"phase": name, **numbers} for name, numbers in trained.phases.items()])


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
    random_weights: bool,
    report_too: bool = False,
    **placing: Unpack[Placing],
) -> list[dict[str, Any]]:
    """Run `graftwork evaluate`; return one record for each task and setting. See `graftwork.pipeline.evaluation`."""
    given = sections(assignments, "method", "evaluate")
    plain = merge(given.get("evaluate", {}), flags)
    if tasks:
        plain = {**plain, "tasks": list(tasks)}
    settings = build(EvaluationSettings, plain, where="evaluation settings")
    settings = with_run_fields(settings, run_of(model))
    check_tasks(settings.tasks, data, settings, split=settings.split)
    check_lm_eval(settings)
    _check_folder(output)
    run = output or (model if is_run(model) else None)
    if report_too and run is None:
        raise ConfigError(f"Found --report for {model}, which is no run folder. Give one for the results with -o.")
    results = _evaluated(
        model,
        settings,
        given,
        data=data,
        output=output,
        over=over,
        checkpoints=checkpoints,
        strict=strict,
        random_weights=random_weights,
        **placing,
    )
    if report_too and run is not None and is_main_process():
        for path in report([run]):
            say(f"Wrote {path}")
    return records_of(results)


def _evaluated(
    model: str,
    settings: EvaluationSettings,
    given: Mapping[str, Any],
    *,
    data: str | None,
    output: str | None,
    over: Sequence[str],
    checkpoints: str | None,
    strict: bool,
    random_weights: bool,
    **placing: Unpack[Placing],
) -> Results:
    """Results of a model, of the checkpoints of its training, or of a sweep of settings."""
    if checkpoints is not None:
        if over or given.get("method") or random_weights or not is_run(model):
            raise ConfigError(
                "--checkpoints evaluates those of a run, as it was trained: leave out --over, --set method and "
                "--random-weights."
            )
        return evaluate_checkpoints(model, checkpoints, settings, data=data, output=output or model, **placing)
    run = output or (model if is_run(model) else None)
    if over:
        points = RunConfig(model, over={key: tuple(values) for key, values in parse_sweep(over).items()}).points()
        converted = load(model, strict=strict, random_weights=random_weights, **placing)
        varied = varied_method(converted, given["method"], model) if "method" in given else None
        return sweep(converted, points, settings, method=varied, data=data, run=run)
    converted = load_varied(model, given.get("method"), strict=strict, random_weights=random_weights, **placing)
    return evaluate(converted, settings=settings, data=data, run=run)


def predict_inputs(
    model: str,
    texts: Sequence[str],
    *,
    input: str | None,
    output: str | None,
    assignments: Sequence[str],
    flags: Mapping[str, Any],
    strict: bool,
    random_weights: bool,
    as_json: bool,
    **placing: Unpack[Placing],
) -> None:
    """Run `graftwork predict`; print the answers, or write them to a file. See `graftwork.pipeline.answers.predict`."""
    given = sections(assignments, "method", "evaluate")
    settings = build(EvaluationSettings, merge(given.get("evaluate", {}), flags), where="prediction settings")
    inputs = _inputs(texts, input)
    # errors in the inputs are cheaper to find before the model is loaded
    if isinstance(inputs, Path):
        settings = with_input_fields(settings, model, inputs)
        read_inputs(inputs, settings)
    else:
        input_rows(inputs, settings)
    converted = load_varied(model, given.get("method"), strict=strict, random_weights=random_weights, **placing)
    if output is not None:
        with results_only():
            predict_to_file(converted, inputs, output, settings)
        say(f"Wrote {output}")
        details = Path(output).with_suffix(DETAILS_SUFFIX)
        if details.exists():
            say(f"Wrote {details}")
        return
    with results_only():
        answers = predict(converted, inputs, settings)
    for answer in answers if is_main_process() else ():
        print(_answer(answer, of_file=isinstance(inputs, Path), several=len(answers) > 1, as_json=as_json))


def _inputs(texts: Sequence[str], file: str | None) -> Path | list[str]:
    """Inputs of a prediction: the texts of the command line, the lines of stdin for "-", or a file."""
    if texts and file is not None:
        raise ConfigError(f"Found the text {texts[0]!r} and --input {file}. Give one of the two.")
    if file is not None and file != "-":
        return Path(file)
    if not texts and file is None:
        raise ConfigError(
            'Found no input. Give a text (graftwork predict RUN "text"), - for the lines of stdin, or a file with '
            "--input."
        )
    if "-" in texts and len(texts) > 1:
        raise ConfigError(f"Found - for stdin beside {len(texts) - 1} further texts. Give one of the two.")
    given = texts if texts and "-" not in texts else _stdin_lines()
    found = [text for text in given if text.strip()]
    if len(found) < len(texts) or not found:
        raise ConfigError("Found an empty text as input. Expected at least one character that is not white space.")
    return found


def _stdin_lines() -> list[str]:
    """Lines of stdin, decoded as UTF-8 in any locale.

    Raises:
        DataError: If they are not UTF-8.
    """
    raw: Any = getattr(sys.stdin, "buffer", sys.stdin)
    content = raw.read()
    try:
        text = content if isinstance(content, str) else bytes(content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8 (byte {error.start}). Convert the text to UTF-8.") from None
    return text.splitlines()


def _answer(answer: Mapping[str, Any], *, of_file: bool, several: bool, as_json: bool) -> str:
    """Output for one answer: JSON, input and answer for lines of a file, or one line with the answer for each text."""
    if as_json or (of_file and not sys.stdout.isatty()):
        return json_text(answer)
    if of_file:
        return printable(f"{answer['input']}\n  → {answer['prediction']}")
    text = printable(str(answer["prediction"]))
    return text.replace("\n", "\\n") if several else text


def run_whole(
    recipe: str,
    *,
    output: str | None,
    data: str | None,
    over: Sequence[str],
    seeds: int | None,
    assignments: Sequence[str],
    overwrite: bool,
    **placing: Unpack[Placing],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run `graftwork run`; return records and the paths of the report. See `graftwork.pipeline.runner.run_recipe`."""
    given = {name: value for name, value in placing.items() if value is not None}
    overrides = {**parse_assignments(assignments), **given}
    config = load_recipe(recipe, overrides)
    if over:
        config = replace(config, over={key: tuple(values) for key, values in parse_sweep(over).items()})
    config = replace(config, data=config.data if data is None else absolute(data), seeds=seeds or config.seeds)
    path = Path(recipe)
    again = path if path.is_dir() else path.parent if path.name == RUN_FILE else None
    target = Path(output) if output is not None else again or Path("runs") / path.name.removesuffix(".yaml")
    _check_folder(str(target))
    with results_only():
        results = run_recipe(config, target, overwrite=overwrite)
    written = report([target]) if results.rows else []
    return records_of(results), [str(file) for file in written]


def _check_folder(path: str | None) -> None:
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"Found a file at {path}. Expected a run folder to write to; give another name with -o.")


def sections(assignments: Sequence[str], *known: str) -> Mapping[str, Any]:
    """Parse `--set section.key=value` options into one mapping for each section.

    Raises:
        ConfigError: If a section is not one of `known`.
    """
    given = parse_assignments(assignments)
    for key, value in given.items():
        if key not in known or not isinstance(value, Mapping):
            raise ConfigError(f"Found --set {key}. Expected section.key=value with section {' or '.join(known)}.")
    return given
