"""`graftwork demo`: the whole line at its smallest size, on data and a model that come with the package."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from graftwork.checkpoint import load, load_model, save
from graftwork.cli.output import say
from graftwork.config import to_plain
from graftwork.conversion import convert
from graftwork.costs import measure_costs, sharing_copy
from graftwork.demo.world import build_world
from graftwork.demo.writers import write_world
from graftwork.errors import GraftworkError
from graftwork.evaluation_settings import EvaluationSettings
from graftwork.files import write_text
from graftwork.methods.topk import TopK
from graftwork.pipeline import evaluate, sweep, train
from graftwork.recipe import RunConfig, write_run
from graftwork.reporting.render import read_run, to_html, to_markdown
from graftwork.reporting.results import Results
from graftwork.run_folder import RunFolder
from graftwork.runner import run_recipe
from graftwork.training.settings import TrainingSettings

SWEEP_TASKS = ("world/facts", "world/choice")
FINETUNE_TASK = "world/keywords"
FINETUNE_K = 64
ATTENTION_K = 16
FINETUNE_STEPS = 200
COST_LENGTHS = (128, 256, 512, 1024)
MAX_NEW_TOKENS = 12
INTRO = (
    "A tiny T5, pretrained on a small invented world, answers questions about it: first as it is, then with "
    "feed-forward layers that keep only the k best of their hidden units, without any training. Below, the same layers "
    "stay on while it learns to be asked by keywords, a form of question that its pretraining never held; the "
    "people asked about in the test are not those of the fine-tuning. Everything here was computed on this machine by "
    "the code that a full-size run uses."
)


def run_demo(output: str | Path, *, steps: int | None = None) -> list[dict[str, str]]:
    """Write the world, sweep k, fine-tune with top-k, and write `report.html`.

    Called again after a stop, it goes on where it was.

    Args:
        output: Folder for everything.
        steps: Fine-tuning steps.

    Returns:
        The dense-against-k table, one record for each setting.

    Raises:
        GraftworkError: If keeping all units does not give the dense model's scores, which would be a defect.
    """
    folder = Path(output)
    started = time.perf_counter()
    say(f"1/4 writing the offline world to {folder / 'world'}")
    write_world(build_world(), folder / "world")
    data = folder / "world" / "unifiedqa"
    say("2/4 evaluating the pretrained model, dense and with top-k feed-forward layers")
    swept = _sweep(folder / "sweep", data)
    say("3/4 measuring time and memory against length")
    _cost(folder / "sweep")
    say(f"4/4 fine-tuning with feed_forward_k={FINETUNE_K} on {FINETUNE_TASK}")
    _finetune(folder / "finetune", data, steps or FINETUNE_STEPS)
    reports = [read_run(RunFolder(folder / name)) for name in ("sweep", "finetune")]
    write_text(folder / "report.html", to_html(reports, title="Graftwork demo: top-k", intro=INTRO))
    write_text(folder / "report.md", to_markdown(reports))
    say(f"Wrote {folder / 'report.html'} after {time.perf_counter() - started:.0f} s")
    _check_identity(swept)
    return _table(swept)


def shipped_model(name: str) -> str:
    """Folder of a tiny pretrained model that comes with the package.

    Args:
        name: "encoder_decoder", "encoder" or "decoder".
    """
    return str(files("graftwork") / "demo" / "models" / name)


def _sweep(folder: Path, data: Path) -> Results:
    _, width = _dense_width()
    ks: list[int | None] = [None, width]
    while (ks[-1] or 0) > 4:
        ks.append((ks[-1] or 0) // 2)
    config = RunConfig(
        model=shipped_model("encoder_decoder"),
        method={"name": "topk"},
        data=str(data.resolve()),
        evaluate=EvaluationSettings(tasks=SWEEP_TASKS, max_new_tokens=MAX_NEW_TOKENS, batch_size=64),
        over={"method.feed_forward_k": tuple(ks)},
    )
    return run_recipe(config, folder)


def _cost(folder: Path) -> None:
    run = RunFolder(folder)
    results = Results.read(run.results_file)
    if results.cost:
        return
    dense, _ = load_model(shipped_model("encoder_decoder"), dtype="float32")
    variants = {"dense": dense}
    feed_forward = TopK(feed_forward_k=FINETUNE_K)
    both = TopK(feed_forward_k=FINETUNE_K, attention_k=ATTENTION_K)
    for method in (feed_forward, both):
        settings = {key: value for key, value in to_plain(method.config).items() if key.endswith("_k") and value}
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        variants[name] = convert(sharing_copy(dense), method).model
    replace(results, cost=measure_costs(variants, COST_LENGTHS)).write(run.results_file)


def _finetune(folder: Path, data: Path, steps: int) -> None:
    run = RunFolder(folder)
    method = TopK(feed_forward_k=FINETUNE_K)
    evaluation = EvaluationSettings(tasks=(FINETUNE_TASK,), max_new_tokens=MAX_NEW_TOKENS, batch_size=64)
    training = TrainingSettings(
        tasks=(FINETUNE_TASK,), max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=32, train_sampling_strategy="group_by_length", save_steps=50, logging_steps=10,
        max_input_tokens=64, max_target_tokens=8,
    )  # fmt: skip
    write_run(
        run.run_file,
        RunConfig(
            model=shipped_model("encoder_decoder"), method={"name": "topk", "feed_forward_k": FINETUNE_K},
            data=str(data.resolve()), train=training, evaluate=evaluation,
        ),
    )  # fmt: skip
    if not run.model.exists():
        model, tokenizer = load_model(shipped_model("encoder_decoder"), dtype="float32")
        converted = convert(model, method, tokenizer=tokenizer)
        save(converted, folder)
        evaluate(converted, settings=evaluation, data=data, run=folder, name="before fine-tuning")
    trained = train(load(folder), training, data=data, run=folder)
    evaluate(trained.converted, settings=evaluation, data=data, run=folder, name="after fine-tuning")
    points = [{"method.feed_forward_k": k} for k in (None, FINETUNE_K, FINETUNE_K // 4, FINETUNE_K // 16)]
    sweep(trained.converted, points, evaluation, data=data, run=folder)
    results = Results.read(run.results_file)
    replace(results, training=trained.phases).write(run.results_file)


def _dense_width() -> tuple[str, int]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(shipped_model("encoder_decoder"))
    return config.model_type, int(config.d_ff)


def _check_identity(results: Results) -> None:
    _, width = _dense_width()
    for task in SWEEP_TASKS:
        dense, full = results.scores(task, "dense"), results.scores(task, f"feed_forward_k={width}")
        if dense != full:
            raise GraftworkError(
                f"{task}: keeping all {width} units gives {dict(full)}, the dense model {dict(dense)}. These must be "
                "equal; please report this with the output of `graftwork doctor`."
            )


def _table(results: Results) -> list[dict[str, str]]:
    labels = list(dict.fromkeys(row.label for row in results.rows))
    return [
        {"setting": label}
        | {
            f"{task.removeprefix('world/')} {metric}": f"{value:.1f}"
            for task in SWEEP_TASKS
            for metric, value in results.scores(task, label).items()
        }
        for label in labels
    ]
