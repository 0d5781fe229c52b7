"""Whole models at real size: a training step or a prefill, dense beside each method, by number of tokens.

Weights are random, since costs do not depend on them; dropout is the model's own. Every measurement is a process of
its own: model, one step to warm up, one timed step. Processes of the variants take turns. Seconds are processor time,
summed over threads; memory is the peak resident size of the process, weights and imports included.

    python benchmarks/whole_models.py                       # all shapes
    python benchmarks/whole_models.py --only roberta-base --tokens 1024
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Method = Callable[[Any], Any]


def _roberta() -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    # room for the longest input, beside the two positions that RoBERTa reserves
    return RobertaForMaskedLM(RobertaConfig(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def topk(**settings: Any) -> Method:
    def method(gw: Any) -> Any:
        return gw.TopK(**settings)

    return method


def cald(**settings: Any) -> Method:
    def method(gw: Any) -> Any:
        return gw.Cald(**settings)

    return method


def sparsefinder(**settings: Any) -> Method:
    def method(gw: Any) -> Any:
        return gw.Sparsefinder(**settings)

    return method


DENSE = "dense"
SHAPES: dict[str, tuple[Callable[[], Any], bool, tuple[int, ...], Mapping[str, Method | None]]] = {
    "roberta-base": (
        _roberta,
        True,
        (128, 512, 1024),
        {
            DENSE: None,
            "top-64 attention": topk(attention_k=64),
            "top-256 feed-forward": topk(feed_forward_k=256),
            "cald, rank 256": cald(),
            "cald, rank 64": cald(rank=64),
            "entmax over all scores": sparsefinder(alpha=1.5),
        },
    ),
    "t5-base": (
        _t5,
        True,
        (128, 512, 1024),
        {DENSE: None, "top-64 attention": topk(attention_k=64), "top-256 feed-forward": topk(feed_forward_k=256)},
    ),
    "llama-1b": (
        _llama,
        False,
        (512, 2048),
        {
            DENSE: None,
            "top-64 attention": topk(attention_k=64),
            "top-512 feed-forward": topk(feed_forward_k=512),
            "cald, linear, window 64": cald(mixer="linear", window=64),
        },
    ),
}
"""Shape → builder, training step or prefill, numbers of tokens, variants."""


def measured(shape: str, variant: str, tokens: int, rows: int) -> dict[str, float]:
    """Cost of one step in this process."""
    import torch

    import graftwork as gw

    build, trains, _, variants = SHAPES[shape]
    torch.manual_seed(0)
    model: Any = build()
    make = variants[variant]
    if make is not None:
        model = gw.convert(model, make(gw)).model
    ids = torch.randint(5, 30000, (rows, tokens))
    model.train(trains)

    def step() -> None:
        if not trains:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            return
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    step()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return {
        "seconds": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(shape: str, variant: str, tokens: int, rows: int) -> dict[str, float]:
    """Cost of one step in a fresh process."""
    words = [sys.executable, __file__, "--case", shape, variant, str(tokens), str(rows)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shape}, {variant}, {tokens} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens; those of each shape by default")
    options.add_argument("--rows", type=int, default=1, help="rows of a batch")
    options.add_argument("--rounds", type=int, default=2, help="processes of each variant; medians are printed")
    options.add_argument("--json", action="store_true")
    options.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.case:
        shape, variant, tokens, rows = chosen.case
        print(json.dumps(measured(shape, variant, int(tokens), int(rows))))
        return
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    if not chosen.json:
        print(f"measured on {platform.machine()}, {threads} threads, {chosen.rows} rows, float32")
    table = []
    for shape in chosen.only:
        _, trains, lengths, variants = SHAPES[shape]
        for tokens in chosen.tokens or lengths:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
            for _ in range(chosen.rounds):
                for name in variants:
                    found[name].append(in_process(shape, name, tokens, chosen.rows))
            medians = {
                name: {key: statistics.median(one[key] for one in costs) for key in costs[0]}
                for name, costs in found.items()
            }
            for name, cost in medians.items():
                ratio = cost["seconds"] / medians[DENSE]["seconds"]
                row = {"shape": shape, "step": "training" if trains else "prefill", "tokens": tokens, "variant": name}
                table.append({**row, **cost, "ratio": ratio})
                if not chosen.json:
                    print(
                        f"{shape}, {row['step']}, {tokens} tokens: {name}: {cost['seconds']:.2f} s ({ratio:.2f}×), "
                        f"{cost['peak_mb']:,.0f} MB",
                        flush=True,
                    )
    if chosen.json:
        print(json.dumps({"kind": "measured", "threads": threads, "rows": table}))


if __name__ == "__main__":
    main()
