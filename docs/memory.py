"""Recompute the figures of the memory guide: `python docs/memory.py` writes docs/memory.json for generate.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("memory.json")
TRAIN: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_input_tokens": 512,
    "max_target_tokens": 64,
    "bf16": True,
    "gradient_checkpointing": True,
}
EVALUATE: dict[str, Any] = {"batch_size": 8, "max_input_tokens": 512, "max_new_tokens": 64}
MODELS = {"roberta-base": "125M", "llama-3.2-1b": "1B", "llama-3.2-3b": "3B", "llama-3.1-8b": "8B"}
ENCODER: dict[str, dict[str, Any]] = {
    "dense": {},
    "lora": {},
    "topk": {"attention_k": 64, "feed_forward_k": 256},
    "cald": {"rank": 256, "guide": "trajectory"},
    "sparsefinder": {"alpha": 1.5},
}
DECODER: dict[str, dict[str, Any]] = {
    "dense": {},
    "lora": {},
    "topk": {"attention_k": 64, "feed_forward_k": 256},
    "sparsefinder": {"alpha": 1.5},
    "regrad": {"rank": 16},
}


def cell(model: str, name: str) -> dict[str, int]:
    """Return the peaks of training and inference in bytes of one cell of the table."""
    from dataclasses import replace

    from graftwork.methods import NAMES
    from graftwork.pipeline.estimation.estimate import DENSE_LORA, Estimator, Shape
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.training import TrainingSettings

    settings = (ENCODER if model == "roberta-base" else DECODER)[name]
    methods = [] if name in ("dense", "lora") else [NAMES.get(name)(**settings)]
    train = TrainingSettings(**TRAIN)
    if name == "lora":
        train = replace(train, lora=DENSE_LORA)
    labels = ("no", "yes") if name == "cald" else None
    estimator = Estimator(model, Shape("cuda", labels=labels))
    memory = estimator.training(methods, train)[2]
    inference = estimator.inference(methods, EvaluationSettings(**EVALUATE))[1]
    return {"training": 0 if memory is None else memory.peak, "inference": inference.peak}


def main() -> None:
    """Compute all cells, or those of the models that are named."""
    chosen = sys.argv[1:] or list(MODELS)
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    for model in chosen:
        figures[model] = {}
        for name in ENCODER if model == "roberta-base" else DECODER:
            figures[model][name] = cell(model, name)
            print(model, name, figures[model][name], flush=True)
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
