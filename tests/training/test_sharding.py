"""Converted models under FSDP: sharded over two processes, they compute what they compute whole.

`accelerate launch --use_fsdp` shards on accelerators alone, so this asks torch's own `fully_shard` directly, with gloo.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = (
    ("t5", "TopK(attention_k=3, feed_forward_k=5)"),
    ("llama", "TopK(attention_k=3, feed_forward_k=5)"),
    ("roberta", "Cald(rank=4, positions=32)"),
    ("bert", "Sparsefinder(alpha=1.5)"),
)
"""Families and methods; one start of two processes for all of them, because starting takes most of the time."""
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import graftwork as gw
from graftwork.methods.cald import Cald
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from tiny_models import padded_batch, tiny_model

dist.init_process_group("gloo")
for family, method in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    whole, sharded = (gw.convert(tiny_model(family), eval(method)).model for _ in range(2))
    inner = sharded.base_model
    layers = [module for _, module in inner.named_modules() if type(module).__name__.endswith(("Block", "Layer"))]
    for layer in [layer for layer in layers if any(True for _ in layer.parameters())]:
        if not any(layer is not other and any(layer is m for m in other.modules()) for other in layers):
            fully_shard(layer)
    fully_shard(sharded)
    batch = padded_batch(family)
    batch["labels"] = batch.get("labels", batch["input_ids"])
    results = [model(**batch) for model in (whole, sharded)]
    torch.testing.assert_close(results[1].logits, results[0].logits)
    for result in results:
        result.loss.backward()
    sharded_count = 0
    for (name, one), (other_name, other) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert name == other_name
        sharded_count += isinstance(other, DTensor)
        if one.grad is None:
            assert other.grad is None, name
            continue
        place = f"{method}, {name}"
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=lambda text, place=place: f"{place}: {text}")
    assert sharded_count == len(list(whole.parameters()))
    print("equal")
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.slow
def test_sharded_and_unsharded_models_compute_equal_results(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    tests = Path(__file__).parents[1]
    outcome = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            program,
            *(word for pair in METHODS for word in pair),
        ],
        env={**os.environ, "PYTHONPATH": str(tests), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("equal") == 2 * len(METHODS)
