"""One step of meta-training: time and memory with one graph of all passages, and with chunks of them.

    python benchmarks/regrad_meta_step.py --threads 1           # all, auto, and 1, 2 and 4 passages at a time
    python benchmarks/regrad_meta_step.py --order 1 --json

Memory is the growth of the process's high-water mark over one step after a first one, in a fresh process for each
candidate. Times are CPU seconds of whole meta-gradients, in turns; the median is printed. Every
candidate's gradient is compared with that of one graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

QUESTIONS, PASSAGES, TOKENS, ANSWER = 4, 3, 150, 32
CANDIDATES = ("all", "auto", "1", "2", "4")


def model_of(options: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from graftwork.grafting.conversion import convert
    from graftwork.methods.regrad import ReGrad

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    model = convert(LlamaForCausalLM(config), ReGrad(rank=8, b_std=0.02, initial_step_size=0.1)).model
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(options.checkpointing)


def batch_of() -> dict[str, Tensor]:
    """Random questions of 32 tokens with three passages of 150 tokens each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 8000, (QUESTIONS, ANSWER), generator=generator)
    documents = torch.randint(3, 8000, (QUESTIONS * PASSAGES, TOKENS), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "document_ids": documents,
        "document_mask": torch.ones_like(documents),
        "document_task": torch.arange(QUESTIONS).repeat_interleave(PASSAGES),
    }


class Step:
    """One step of a candidate."""

    def __init__(self, model: Any, name: str, order: int) -> None:
        from graftwork.methods.regrad.meta_training.chunks import Chunks

        self.model, self.order = model, order
        self.chunks = Chunks(name if name in ("all", "auto") else int(name), order)  # type: ignore[arg-type]

    def __call__(self) -> Tensor:
        """Return the gradient of the adapter."""
        from graftwork.methods.regrad.meta_training.learning import meta_gradients

        batch = batch_of()
        parts = self.chunks.of(self.model, batch)
        return meta_gradients(self.model, batch, order=self.order, chunks=parts).adapter


def growth(name: str, options: argparse.Namespace) -> int:
    """Bytes by which a step raises the high-water mark of this process."""
    from graftwork.metrics.cost import peak_memory

    step = Step(model_of(options), name, options.order)
    step()
    with peak_memory() as record:
        step()
    return record.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--order", type=int, choices=(1, 2), default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each candidate, in turns")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        print(growth(options.case, options))
        return
    model = model_of(options)
    steps = {name: Step(model, name, options.order) for name in CANDIDATES}
    results = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(options.rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    rows: list[dict[str, Any]] = []
    for name in CANDIDATES:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--case", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        ratios = [each / base for each, base in zip(seconds[name], seconds["all"], strict=True)]
        rows.append(
            {
                "meta_chunk": name,
                "seconds": statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "bytes": int(done.stdout.splitlines()[-1]),
                "difference": float((results[name] - results["all"]).norm() / results["all"].norm()),
            }
        )
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| meta_chunk | CPU seconds | of one graph | MB above the model | difference |\n|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row['seconds']:.2f} | {row['ratio']:.2f} | {row['bytes'] / 1e6:.0f} | {row['difference']:.1e}"
        print(f"| {row['meta_chunk']} | {numbers} |")


if __name__ == "__main__":
    main()
