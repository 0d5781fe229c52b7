"""Causal decoder on long text along graphs of key blocks: perplexity, and time of attention, prediction included.

The queries, keys and values are those of a real text in a pretrained decoder, of one forward pass at each length. Every
candidate computes the attention of all layers from them, interleaved in one process: SDPA (softmax), dense entmax, and
block graphs within a budget, whose estimates and choices are part of the measured time. The perplexity is that of the
whole model on the same kind of text with the candidate's attention in every layer.

    python benchmarks/sparsefinder_decoder.py --model MODEL --text FILE --lengths 4096 8192 --budgets 0.125 0.25 0.5

MODEL needs positions for the longest text. `--extend 8192` prepares one from a model with fewer positions: linear RoPE
scaling and a short training on the first 85 % of the text, written to `--extended FOLDER`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import graftwork as gw
from common import Report, parser, prepare
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
from graftwork.metrics.cost import Candidate, compare_costs

TRAINED = 0.85
"""Share of the text for the extension of the positions; the rest is scored."""
CHUNKS = 4
"""Number of scored chunks at each length."""
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


def perplexity(model: Any, chunks: list[Tensor], rule: SparsefinderConfig | None = None) -> float:
    """Perplexity on chunks [1 tokens], with one rule in every module, or of an untouched model."""
    rules = {} if rule is None else {path: Rule(rule, Learned()) for path in sparsefinder_modules(model)}
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
    options.add_argument("--budgets", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    options.add_argument("--groupings", nargs="+", default=["mean_pooled", "pages"])
    options.add_argument("--block-size", type=int, default=64)
    options.add_argument("--gathered-size", type=int, default=64, help="tokens per gathered block")
    options.add_argument("--window", type=int, help="band within the budget")
    options.add_argument("--dense-limit", type=int, default=4096, help="longest text of dense entmax")
    options.add_argument("--no-perplexity", action="store_true")
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
    dense = (
        {} if chosen.no_perplexity else {n: perplexity(loaded.model.eval(), split(tokens, n)) for n in chosen.lengths}
    )
    converted = gw.convert(loaded, gw.Sparsefinder(alpha=1.0))
    model = converted.model.eval()
    report = Report("Attention of all layers of a causal decoder on text, along graphs of key blocks", chosen, SDPA)
    for length in chosen.lengths:
        measure_length(model, tokens, length, chosen, report, dense.get(length))
    report.show()


def split(tokens: Tensor, length: int) -> list[Tensor]:
    """First chunks of a text, each [1 length]."""
    count = min(CHUNKS, tokens.shape[1] // length)
    return [tokens[:, number * length : (number + 1) * length] for number in range(count)]


def measure_length(
    model: Any, tokens: Tensor, length: int, chosen: argparse.Namespace, report: Report, dense: float | None
) -> None:
    """Measure perplexity and time at one length; `dense` is the perplexity of the untouched model."""
    chunks = split(tokens, length)
    layers = calls_of(model, chunks[0])

    def attend(config: SparsefinderConfig, alpha: float) -> list[Tensor]:
        modules = list(sparsefinder_modules(model).values())
        found: list[Tensor] = []
        for graft, (call, value) in zip(modules, layers, strict=True):
            graft.override = Rule(config, Learned())
            graph = graft.graph(call.query, call.key, call.mask)
            graft.override = None
            found.append(
                sparse_attention(
                    call.query,
                    call.key,
                    value,
                    graph,
                    scale=call.scale,
                    alpha=alpha,
                    executor="blocks",
                    block_size=chosen.gathered_size,
                )
            )
        return found

    def sdpa() -> list[Tensor]:
        repeated = [
            [x.repeat_interleave(call.query.shape[1] // x.shape[1], 1) for x in (call.key, value)]
            for call, value in layers
        ]
        return [
            F.scaled_dot_product_attention(call.query, key, value, is_causal=True, scale=call.scale)
            for (call, _), (key, value) in zip(layers, repeated, strict=True)
        ]

    def entmax() -> list[Tensor]:
        return [
            masked_attention(
                call.query, call.key, value, None, scale=call.scale, allowed=call.mask.block(0, length), alpha=1.5
            )
            for call, value in layers
        ]

    forwards: dict[str, Callable[[], list[Tensor]]] = {SDPA: sdpa}
    if length <= chosen.dense_limit:
        forwards["dense entmax"] = entmax
    rules: dict[str, SparsefinderConfig] = {}
    if chosen.window:
        # what a user would pick instead: a band alone, as wide as the blocks of the smallest budget
        width = 2 * max(chosen.window, round(min(chosen.budgets) * length)) - 1
        rules[f"window of {width // 2 + 1} past tokens"] = SparsefinderConfig(
            alpha=1.0, grouping="window", window_size=width, add_cls_mask=True, executor="blocks"
        )
    for grouping in chosen.groupings:
        for budget in chosen.budgets:
            rules[f"{grouping}, {budget:g}"] = SparsefinderConfig(
                alpha=1.0,
                grouping=grouping,
                block_size=chosen.block_size,
                block_budget=budget,
                window_size=chosen.window,
                add_cls_mask=True,
                executor="blocks",
                attention_block_size=chosen.gathered_size,
            )
    for name, config in rules.items():
        forwards[f"{name}, softmax"] = partial(attend, config, 1.0)
        forwards[f"{name}, entmax"] = partial(attend, config, 1.5)
    kept = {
        name: sum(
            float(graph.coarse(chosen.gathered_size).sum() / graph.allowed_blocks(chosen.gathered_size).sum())
            / graph.heads
            for graph in graphs_of(model, layers, config)
        )
        / len(layers)
        for name, config in rules.items()
    }
    scores = {} if dense is None else {SDPA: dense}
    if dense is not None:
        scores |= {name: perplexity(model, chunks, config) for name, config in rules.items()}
    candidates = {name: Candidate(torch.no_grad()(joined(forward))) for name, forward in forwards.items()}
    costs = compare_costs(candidates, SDPA, rounds=chosen.rounds, device=chosen.device)
    for name, score in scores.items():
        share = "" if name == SDPA else f", {kept[name]:.3f} of the blocks gathered"
        loss = f"perplexity {score:.3f} ({score / scores[SDPA] - 1:+.2%}){share}"
        print(f"{length} tokens, {len(chunks)} chunks: {name}: {loss}")
    report.add(f"{length} tokens", costs)


def graphs_of(model: Any, layers: list[tuple[AttentionCall, Tensor]], config: SparsefinderConfig) -> list[Any]:
    """Graphs of every layer by one rule."""
    found: list[Any] = []
    for graft, (call, _) in zip(sparsefinder_modules(model).values(), layers, strict=True):
        graft.override = Rule(config, Learned())
        found.append(graft.graph(call.query, call.key, call.mask))
        graft.override = None
    return found


def joined(forward: Callable[[], list[Tensor]]) -> Callable[[], Tensor]:
    """A single tensor of all layers' outputs, as measurements expect."""
    return lambda: torch.stack([output.mean() for output in forward()])


if __name__ == "__main__":
    main()
