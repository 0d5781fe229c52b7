"""Generation in batches of similar length, compared with unsorted batches and single inputs.

Greedy `predict` of the library on the same inputs, interleaved in one process. The model is untrained, so every answer
has the same number of tokens; the candidates differ in input padding and in the number of forward passes.

    python benchmarks/wt5_generation.py --data DATA --tokenizer google-t5/t5-base --task esnli_eval_v010
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from common import parser, prepare
from graftwork.evaluation.prediction import predict_texts as predict
from graftwork.grafting.converted import Converted
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks import get_task
from wt5_packing import measured, model_of


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the task's files")
    options.add_argument("--tokenizer", required=True, help="folder or hub id of a T5 tokenizer")
    options.add_argument("--task", default="esnli_eval_v010")
    options.add_argument("--split", default="validation")
    options.add_argument("--examples", type=int, default=96)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--max-input-tokens", type=int, default=512)
    options.add_argument("--max-new-tokens", type=int, default=24)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--width", type=int, default=256)
    chosen = options.parse_args()
    prepare(chosen)
    tokenizer: Any = AutoTokenizer.from_pretrained(chosen.tokenizer)
    rows = list(get_task(chosen.task).load(chosen.data, chosen.split, take=chosen.examples).rows)
    random.Random(chosen.seed).shuffle(rows)
    converted = Converted(model_of(chosen, len(tokenizer)).eval(), tokenizer=tokenizer)

    def settings(batch: int) -> EvaluationSettings:
        return EvaluationSettings(
            max_input_tokens=chosen.max_input_tokens, max_new_tokens=chosen.max_new_tokens, batch_size=batch
        )

    def run(name: str) -> float:
        started = time.perf_counter()
        if name == "unsorted batches":
            # one call per batch prevents sorting across batches
            for start in range(0, len(rows), chosen.batch):
                predict(converted, rows[start : start + chosen.batch], settings(chosen.batch))
        else:
            predict(converted, rows, settings(1 if name == "one by one" else chosen.batch))
        return time.perf_counter() - started

    seconds = measured(run, ["one by one", "unsorted batches", "sorted batches"], chosen.rounds)
    ratios = {name: seconds["one by one"] / own for name, own in seconds.items()}
    title = f"{chosen.task}: {len(rows)} inputs, measured on {chosen.device}, {chosen.dtype}, torch {torch.__version__}"
    if chosen.json:
        print(json.dumps({"title": title, "kind": "measured", "seconds": seconds, "speed_up": ratios}))
        return
    table = Table("candidate", "seconds", "× one by one", title=title)
    for name, own in seconds.items():
        table.add_row(name, f"{own:.2f}", f"{ratios[name]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
