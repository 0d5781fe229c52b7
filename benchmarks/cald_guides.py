"""Guides on a real encoder: accuracy and distance to the fine-tuned teacher, over seeds, with equal budgets.

For each seed the dense encoder is fine-tuned once, with five snapshots; then it is converted and trained with each
guide and initialisation for the same number of updates. The control is unguided and starts from the fine-tuned weights,
as the guide target does. The distance is the layer loss of `cald`, masked, summed over embeddings and layers, on the
whole dev split, to the dense model of the same seed. Results in the output file are not computed again, and an
interrupted run resumes from its last checkpoint.

    python benchmarks/cald_guides.py MODEL --data GLUE --output results.json --rank 12 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graftwork as gw
from graftwork.core.files import read_json, write_json
from graftwork.methods.cald import Cald, CaldConfig
from graftwork.tasks import get_task
from graftwork.training.encoding import PadBatch, encode, padding_id

GUIDES = ("dense", "unguided", "control", "target", "trajectory", "waypoint", "hybrid")


def settings(guide: str, initialization: str, dense: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of a guide, including those that all guides share."""
    if guide == "dense":
        return {"guide": guide}
    own: dict[str, dict[str, Any]] = {
        "control": {"guide": "unguided", "student_init": "target", "teacher": str(dense)},
        "target": {"teacher": str(dense)},
        "waypoint": {"snapshots": str(dense / "train" / "distill" / "checkpoint-*")},
        "hybrid": {"teacher": str(dense), "distill_steps": options.updates // 3},
    }
    weight = {} if guide in ("unguided", "control") else {"layer_weight": options.layer_weight}
    mixer = {name: getattr(options, name) for name in ("rank", "positions", "share")}
    return {"guide": guide, "initialization": initialization, **mixer, **weight, **own.get(guide, {})}


def train_one(
    guide: str, initialization: str, seed: int, folder: Path, dense: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train one run and score it.

    Args:
        guide: Guide of the run.
        initialization: Initialisation of the compression matrices.
        seed: Seed of the head and of the training.
        folder: Folder of the run.
        dense: Folder of the dense run of the same seed.
        options: Command-line options.
    """
    task = get_task(options.task)
    model, tokenizer = gw.load_model(options.model, labels=task.labels, seed=seed)
    converted = gw.convert(model, Cald(**settings(guide, initialization, dense, options)), tokenizer=tokenizer)
    training = gw.TrainingSettings(
        tasks=(options.task,),
        max_steps=options.updates,
        learning_rate=options.learning_rate,
        warmup_ratio=0.06,
        per_device_train_batch_size=options.batch,
        train_sampling_strategy="group_by_length",
        max_grad_norm=None,
        max_input_tokens=options.tokens,
        save_total_limit=None if guide == "dense" else 1,
        save_steps=max(1, options.updates // 5),
    )
    started = time.perf_counter()
    trained = gw.train(converted, training, data=options.data, run=folder, seed=seed)
    seconds = time.perf_counter() - started
    results = gw.evaluate(
        trained.converted,
        [options.task],
        data=options.data,
        settings=gw.EvaluationSettings(max_input_tokens=options.tokens, batch_size=64),
    )
    accuracy = next(iter(results.rows[0].scores.values()))
    distance = distance_to(dense, trained.converted, options)
    return {
        "guide": guide,
        "initialization": initialization,
        "seed": seed,
        "accuracy": accuracy,
        "distance": distance,
        "seconds": round(seconds, 1),
    }


def distance_to(dense: Path, converted: gw.Converted, options: argparse.Namespace) -> float:
    """Mean over the batches of the dev split, weighted by their numbers of tokens."""
    rows = get_task(options.task).load(Path(options.data), "dev").rows
    encoded = encode(rows, converted.tokenizer, converted.model, max_input_tokens=options.tokens, max_target_tokens=1)
    collate, method = PadBatch(padding_id(converted.tokenizer)), Cald(guide="dense", teacher=str(dense))
    total, tokens = 0.0, 0
    for start in range(0, len(rows), 100):
        batch = collate([encoded[index] for index in range(start, min(start + 100, len(rows)))])
        weight = int(batch["attention_mask"].sum())
        total += weight * method.measure(converted.model, batch)["distance"]
        tokens += weight
    return total / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an encoder")
    parser.add_argument("--data", required=True, help="folder of the task's files")
    parser.add_argument("--output", type=Path, default=Path("cald_guides.json"))
    parser.add_argument(
        "--runs", type=Path, default=Path("cald_guides_runs"), help="folder for runs; deleted after each seed"
    )
    parser.add_argument("--task", default="glue/sst2")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--positions", type=int, default=48)
    parser.add_argument("--share", default="none")
    parser.add_argument("--initializations", nargs="+", default=[CaldConfig().effective_initialization])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=75)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--layer-weight", type=float, default=10.0)
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=GUIDES)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = read_json(options.output)["rows"] if options.output.exists() else []
    for seed in options.seeds:
        dense = options.runs / f"seed{seed}" / "dense"
        guides = [guide for guide in options.guides if guide != "dense"]
        runs = [("dense", ""), *((guide, start) for start in options.initializations for guide in guides)]
        for guide, start in runs:
            if any((row["guide"], row["initialization"], row["seed"]) == (guide, start, seed) for row in rows):
                continue
            folder = dense if guide == "dense" else options.runs / f"seed{seed}" / f"{guide}-{start}"
            rows.append(train_one(guide, start, seed, folder, dense, options))
            plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
            machine = f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
            write_json(options.output, {"kind": "measured", "machine": machine, **plain, "rows": rows})
            print(json.dumps(rows[-1]), flush=True)
            if guide != "dense":
                shutil.rmtree(folder)
        shutil.rmtree(dense, ignore_errors=True)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    table = Table(title="accuracy and distance to the dense model, mean ± standard deviation over seeds")
    for heading in ("guide", "initialisation", "seeds", "accuracy", "distance", "seconds"):
        table.add_column(heading)
    for guide, start in dict.fromkeys((row["guide"], row["initialization"]) for row in rows):
        own = [row for row in rows if (row["guide"], row["initialization"]) == (guide, start)]
        cells = []
        for name in ("accuracy", "distance", "seconds"):
            values = [row[name] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} ± {spread:.2g}")
        table.add_row(guide, start, str(len(own)), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
