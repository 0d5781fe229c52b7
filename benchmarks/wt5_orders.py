"""Three orders of label and explanation on real data: the same model, rows and steps for each of them.

The rows are those of cuts of CoS-E v1.11 and e-SNLI. The model is trained by `train` and scored by `evaluate` of the
library, with constrained generation; `separate` is asked for explanations, which costs a second generation. Results are
written after each training, and a repeated command goes on after them.

    python benchmarks/wt5_orders.py --data DATA --model MODEL --output FILE
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import graftwork as gw
from common import parser, prepare
from graftwork.settings.fields import DataFields
from graftwork.tasks import get_task
from graftwork.tasks.esnli import LABELS
from graftwork.tasks.sources import read_json_lines, subset_order, write_json_lines
from graftwork.tasks.spans import find_text

ORDERS = ("label_first", "reason_first", "separate")
SCORES = (
    "accuracy",
    "bleu",
    "token_f1",
    "chance_token_f1",
    "comprehensiveness",
    "random_comprehensiveness",
    "sufficiency",
    "random_sufficiency",
    "faithfulness_n",
    "consistency",
    "las",
    "las_n",
)
FIELDS = {
    "CoS-E, free text": {"explanation_field": "why", "choices_field": "choices"},
    "CoS-E, spans": {"spans_field": "quote", "choices_field": "choices"},
    "e-SNLI, free text": {"explanation_field": "why", "labels": LABELS},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    options.add_argument("--model", required=True, help="folder or hub id of an encoder–decoder or a decoder")
    options.add_argument("--output", type=Path, required=True, help="JSON lines, one for each training")
    options.add_argument("--train", type=int, default=400, help="training rows")
    options.add_argument("--rows", type=int, default=150, help="evaluated rows")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--seeds", type=int, default=1)
    chosen = options.parse_args()
    prepare(chosen)
    found = [row for _, row in read_json_lines(chosen.output)] if chosen.output.exists() else []
    known = {(row["data"], row["order"], row["seed"]) for row in found}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seeds):
            for name in FIELDS:
                for order in ORDERS:
                    if (name, order, seed) in known or name not in (chosen.only or FIELDS):
                        continue
                    found.append(measured(chosen, Path(folder) / f"{seed} {name} {order}", name, order, seed))
                    write_json_lines(chosen.output, found)
    print(json.dumps(found)) if chosen.json else show(found)


def measured(options: Any, folder: Path, name: str, order: str, seed: int) -> dict[str, Any]:
    """Scores of one training."""
    folder.mkdir(parents=True)
    every = list(rows_of(options.data, name))
    order_of = subset_order([str(row["id"]) for row in every], split=name, seed=0)
    held = [every[place] for place in order_of[: options.rows]]
    trained = [every[place] for place in order_of[options.rows : options.rows + options.train]]
    for kind, rows in (("train", trained), ("held", held)):
        write_json_lines(folder / f"{kind}.jsonl", rows)
    spans = "spans_field" in FIELDS[name]
    fields: dict[str, Any] = {**FIELDS[name], "text_field": "text", "label_field": "label"}
    method = gw.WT5(
        explanation_order=order,
        constrained=True,
        faithfulness=spans,
        consistency=order != "separate",
        simulatability="choices_field" not in fields,
    )
    started = time.process_time()
    converted = gw.convert(gw.load(options.model, dtype="float32"), method)
    settings = gw.TrainingSettings(
        tasks=(str(folder / "train.jsonl"),),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length",
        save_steps=10**6,
        **fields,
    )
    trained_run = gw.train(converted, settings, run=folder / "run", seed=seed, estimate=False)
    training = time.process_time() - started
    evaluation = gw.EvaluationSettings(
        tasks=(str(folder / "held.jsonl"),),
        explain=True if order == "separate" else None,
        max_new_tokens=64,
        **DataFields(**fields).given,
    )
    row = gw.evaluate(trained_run.converted, settings=evaluation).rows[0]
    return {
        "data": name,
        "order": order,
        "seed": seed,
        "train": len(trained),
        "size": row.size,
        "scores": {key: value for key, value in row.scores.items() if value == value},
        "training_seconds": round(training, 1),
        "seconds": round(time.process_time() - started, 1),
    }


def rows_of(data: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set as own data; of e-SNLI the training rows, of CoS-E the cut that has questions."""
    if name.startswith("e-SNLI"):
        for record in get_task("esnli_v010").source(data, "train").rows:
            own = record.fields
            text = f"premise: {own['premise']} hypothesis: {own['hypothesis']}"
            yield {"id": record.key, "text": text, "label": LABELS[own["label"]], "why": own["explanation_1"]}
        return
    for record in get_task("cos_e_v001").source(data, "validation").rows:
        own = record.fields
        quote = own["extractive_explanation"]
        if len(set(own["choices"])) < len(own["choices"]):
            continue
        # some selections are no literal part of the question
        quote = quote if find_text(own["question"], quote)[0] else ""
        yield {
            "id": record.key,
            "text": own["question"],
            "choices": list(own["choices"]),
            "label": own["answer"],
            "why": own["abstractive_explanation"],
            "quote": quote,
        }


def show(found: list[dict[str, Any]]) -> None:
    """Print one line for each training."""
    used = [name for name in SCORES if any(name in row["scores"] for row in found)]
    table = Table(title="Orders of label and explanation")
    for name in ("data", "order", "seed", "n", *used, "seconds"):
        table.add_column(name.replace("_", " "))
    for row in found:
        values = [f"{row['scores'][name]:.2f}" if name in row["scores"] else "–" for name in used]
        table.add_row(row["data"], row["order"], str(row["seed"]), str(row["size"]), *values, str(row["seconds"]))
    Console(width=240).print(table)


if __name__ == "__main__":
    main()
