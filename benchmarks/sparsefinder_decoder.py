"""Causal decoder on long text along graphs of key blocks: perplexity, and time of attention, prediction included.

The queries, keys and values are those of a real text in a pretrained decoder, of one forward pass at each length. Every
candidate computes the attention of all layers from them, interleaved in one process: SDPA (softmax), dense entmax, and
block graphs within a budget, whose estimates and choices are part of the measured processor time. Blocks are chosen by
each query, or kept whole for all queries of a block (exact_blocks off). The perplexity is that of the whole model on
the same kind of text with the candidate's attention in every layer.

    python benchmarks/sparsefinder_decoder.py --model MODEL --text FILE --lengths 4096 8192 --threads 1

MODEL needs positions for the longest text. `--extend 8192` prepares one from a model with fewer positions: linear RoPE
scaling and a short training on the first 85 % of the text, written to `--extended FOLDER`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import graftwork as gw
from common import parser, prepare, processor_times
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.executors import masked_attention, sparse_attention
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    Rule,
    observe_calls,
    override_rules,
    sparsefinder_modules,
)
from graftwork.methods.sparsefinder.predictor import Learned

TRAINED = 0.85
"""Share of the text for the extension of the positions; the rest is scored."""
SDPA = "SDPA (softmax)"


def extend(source: str, folder: Path, text: str, positions: int, seed: int) -> None:
    """Train a decoder with linearly scaled rotary positions on text, and write it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(source)
    factor = positions / config.max_position_embeddings
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = positions
    model: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokens = torch.tensor(tokenizer(text[: int(TRAINED * len(text))], verbose=False)["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    # short rows at random positions, then whole rows
    plan = [(1024, 2)] * 150 + [(4096, 1)] * 10
    for step, (length, rows) in enumerate(plan):
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        starts = torch.randint(0, len(tokens) - length, (rows,), generator=generator)
        ids = torch.stack([tokens[start : start + length] for start in starts])
        offset = int(torch.randint(0, positions - length, (1,), generator=generator)) if length < 4096 else 0
        model(input_ids=ids, labels=ids, position_ids=(torch.arange(length) + offset)[None]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Attention:
    """Attention of one candidate."""

    alpha: float
    rule: SparsefinderConfig | None = None
    """Choice of key blocks; None for all scores."""
    whole: bool = False
    """True to keep whole gathered blocks for every query of a block, False for the choice of each query."""


def perplexity(model: Any, chunks: list[Tensor], attention: Attention | None = None, size: int = 64) -> float:
    """Perplexity on chunks [1 tokens] with one attention in every module, or of an untouched model."""
    rules: dict[str, Rule] = {}
    for path, graft in sparsefinder_modules(model).items():
        if attention is None:
            continue
        # all scores in gathered blocks, so that no tensor of queries × keys is built
        rule = attention.rule or SparsefinderConfig(grouping="mean_pooled", block_size=64, block_budget=1.0)
        rules[path] = Rule(rule, Learned())
        graft.config = replace(
            graft.config,
            alpha=attention.alpha,
            executor="blocks",
            attention_block_size=size,
            exact_blocks=not attention.whole,
        )
    with torch.no_grad(), override_rules(model, rules):
        losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in chunks]
    return math.exp(sum(losses) / len(losses))


def calls_of(model: Any, ids: Tensor) -> list[tuple[AttentionCall, Tensor]]:
    """Queries, keys and values of every attention layer on one text."""
    calls: list[AttentionCall] = []
    values: list[Tensor] = []
    hooks = [
        graft.register_forward_pre_hook(lambda module, inputs: values.append(inputs[3]))
        for graft in sparsefinder_modules(model).values()
    ]
    # every block is kept, so that no tensor of queries × keys is built
    whole = Rule(SparsefinderConfig(alpha=1.0, grouping="mean_pooled", block_size=64, block_budget=1.0), Learned())
    rules = dict.fromkeys(sparsefinder_modules(model), whole)
    observed = observe_calls(model, lambda graft, call: calls.append(call))
    with torch.no_grad(), override_rules(model, rules), observed:
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return list(zip(calls, values, strict=True))


def main() -> None:
    """Measure perplexity and time at every length."""
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--text", required=True)
    options.add_argument("--extend", type=int, help="positions of the extended model")
    options.add_argument("--extended", default="extended", help="folder of the extended model")
    options.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    options.add_argument("--budgets", type=float, nargs="+", default=[0.03, 0.06, 0.125])
    options.add_argument("--groupings", nargs="+", default=["mean_pooled"])
    options.add_argument("--block-size", type=int, default=64)
    options.add_argument("--gathered-size", type=int, default=64, help="tokens per gathered block")
    options.add_argument("--window", type=int, help="band within the budget")
    options.add_argument("--chunks", type=int, default=4, help="scored chunks at each length")
    options.add_argument("--entmax-chunks", type=int, default=1, help="scored chunks with entmax, which is slow")
    options.add_argument("--no-dense", action="store_true", help="leave out the time and perplexity of dense entmax")
    chosen = options.parse_args()
    prepare(chosen)
    text = Path(chosen.text).read_text(encoding="utf-8")
    if chosen.extend:
        extend(chosen.model, Path(chosen.extended), text, chosen.extend, chosen.seed)
        chosen.model = chosen.extended
    loaded = gw.load(chosen.model, dtype="float32")
    tokenizer: Any = loaded.tokenizer
    tokens = tokenizer(text[int(TRAINED * len(text)) :], verbose=False, return_tensors="pt")["input_ids"]
    # the untouched model, with SDPA
    dense = {n: perplexity(loaded.model.eval(), split(tokens, n, chosen.chunks)) for n in chosen.lengths}
    model = gw.convert(loaded, gw.Sparsefinder(alpha=1.0)).model.eval()
    for length in chosen.lengths:
        measure_length(model, tokens, length, chosen, dense[length])


def split(tokens: Tensor, length: int, chunks: int) -> list[Tensor]:
    """First chunks of a text, each [1 length]."""
    count = min(chunks, tokens.shape[1] // length)
    return [tokens[:, number * length : (number + 1) * length] for number in range(count)]


def candidates_of(chosen: argparse.Namespace, length: int) -> dict[str, Attention]:
    """Attention along graphs of key blocks, and along a band as wide as the smallest budget, for both functions."""
    rules: dict[str, SparsefinderConfig] = {}
    if chosen.window:
        # what a user would pick instead
        width = 2 * max(chosen.window, round(min(chosen.budgets) * length)) - 1
        rules[f"window of {width // 2 + 1} past tokens"] = SparsefinderConfig(
            grouping="window", window_size=width, add_cls_mask=True
        )
    for grouping in chosen.groupings:
        for budget in chosen.budgets:
            rules[f"{grouping}, {budget:g}"] = SparsefinderConfig(
                grouping=grouping,
                block_size=chosen.block_size,
                block_budget=budget,
                window_size=chosen.window,
                add_cls_mask=True,
            )
    return {
        f"{name}, {'whole blocks' if whole else 'each query'}, {function}": Attention(alpha, rule, whole)
        for name, rule in rules.items()
        for whole in (False, True)
        for function, alpha in (("softmax", 1.0), ("entmax", 1.5))
    }


def measure_length(model: Any, tokens: Tensor, length: int, chosen: argparse.Namespace, dense: float) -> None:
    """Print time and perplexity of every candidate; `dense` is the perplexity of the untouched model."""
    few = split(tokens, length, chosen.entmax_chunks)
    chunks = split(tokens, length, chosen.chunks)
    layers = calls_of(model, chunks[0])
    size = chosen.gathered_size

    def attend(attention: Attention) -> None:
        for graft, (call, value) in zip(sparsefinder_modules(model).values(), layers, strict=True):
            if attention.rule is None:
                for head in range(call.query.shape[1]):
                    # head by head, because scores of all heads take gigabytes
                    group = head * call.key.shape[1] // call.query.shape[1]
                    parts = (call.query[:, head], call.key[:, group], value[:, group])
                    query, key, own = (x[:, None] for x in parts)
                    allowed = call.mask.block(0, length)
                    masked_attention(query, key, own, None, scale=call.scale, allowed=allowed, alpha=attention.alpha)
                continue
            graft.override = Rule(attention.rule, Learned())
            graph = graft.graph(call.query, call.key, call.mask)
            graft.override = None
            sparse_attention(
                call.query,
                call.key,
                value,
                graph,
                scale=call.scale,
                alpha=attention.alpha,
                executor="blocks",
                block_size=size,
                exact=not attention.whole,
            )

    def sdpa() -> None:
        for call, value in layers:
            key, own = (x.repeat_interleave(call.query.shape[1] // x.shape[1], 1) for x in (call.key, value))
            F.scaled_dot_product_attention(call.query, key, own, is_causal=True, scale=call.scale)

    candidates = candidates_of(chosen, length)
    calls: dict[str, Callable[[], None]] = {SDPA: sdpa}
    calls |= {name: partial(attend, attention) for name, attention in candidates.items()}
    seconds = processor_times(calls, chosen.rounds)
    base = seconds[SDPA]
    print(f"{length} tokens, {len(layers)} layers, {chosen.rounds} rounds, processor time, prediction included")
    print(f"{length} tokens: {SDPA}: {base:.3f} s, perplexity {dense:.3f} of {len(chunks)} chunks", flush=True)
    entmax = Attention(1.5)
    whole: dict[float, float] = {1.0: dense}
    if not chosen.no_dense:
        start = time.process_time()
        attend(entmax)
        measured = time.process_time() - start
        whole[1.5] = perplexity(model, few, entmax, size)
        print(
            f"{length} tokens: dense entmax: {measured:.3f} s ({measured / base:.2f} of SDPA, measured once), "
            f"perplexity {whole[1.5]:.3f} of {len(few)} chunks",
            flush=True,
        )
    for name, attention in candidates.items():
        scored = chunks if attention.alpha == 1.0 else few
        found = perplexity(model, scored, attention, size)
        loss = f" ({found / whole[attention.alpha] - 1:+.2%})" if attention.alpha in whole else ""
        graphs = graphs_of(model, layers, attention.rule)
        kept = sum(float(graph.coarse(size).sum() / graph.allowed_blocks(size).sum()) / graph.heads for graph in graphs)
        print(
            f"{length} tokens: {name}: {seconds[name]:.3f} s ({seconds[name] / base:.2f} of SDPA), perplexity "
            f"{found:.3f}{loss} of {len(scored)} chunks, {kept / len(graphs):.3f} of the blocks gathered",
            flush=True,
        )


def graphs_of(model: Any, layers: list[tuple[AttentionCall, Tensor]], config: Any) -> list[Any]:
    """Graphs of every layer by one rule."""
    found: list[Any] = []
    for graft, (call, _) in zip(sparsefinder_modules(model).values(), layers, strict=True):
        graft.override = Rule(config, Learned())
        found.append(graft.graph(call.query, call.key, call.mask))
        graft.override = None
    return found


if __name__ == "__main__":
    main()
