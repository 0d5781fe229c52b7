"""Time and memory of whole models by sequence length; variants of one model interleaved in one process."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.progress import Progress
from graftwork.metrics.cost import Candidate, compare_costs, interleaved_times
from graftwork.metrics.results import CostRow
from graftwork.surgery.sites import pretrained

logger = logging.getLogger(__name__)

ROUNDS = 3
FORWARD_ROUNDS = 7


def sharing_copy(model: nn.Module) -> Any:
    """Copy the modules of a model around the same parameters and buffers, to be converted separately without memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def measure_costs(variants: Mapping[str, nn.Module], lengths: Sequence[int]) -> tuple[CostRow, ...]:
    """Time and memory of one forward and backward pass in training mode, and latency, for sequences of random tokens.

    Args:
        variants: Versions of one model by label, the one to compare with first.
        lengths: Tokens of the sequence; an encoder–decoder gets as many on both sides. Lengths that the model has no
            positions for are left out with a warning.

    Returns:
        One row for each label and length, measured in turns.
    """
    if not lengths:
        return ()
    rows: list[CostRow] = []
    first = next(iter(variants))
    modes = {name: model.training for name, model in variants.items()}
    limit = getattr(pretrained(variants[first]).config, "max_position_embeddings", None)
    with Progress("cost", total=len(lengths)) as progress:
        for length in lengths:
            if limit is not None and length > limit:
                logger.warning("The model has %d positions, so length %d is left out of the cost.", limit, length)
                continue
            candidates = {name: _candidate(model, length) for name, model in variants.items()}
            parameters = list(variants[first].parameters())
            device = str(pretrained(variants[first]).device)
            costs = compare_costs(candidates, first, rounds=ROUNDS, ignore=parameters, device=device)
            latencies = _latencies(variants, candidates, device)
            rows += [
                CostRow(
                    name,
                    length,
                    cost.seconds,
                    cost.saved_bytes,
                    cost.peak_bytes,
                    device,
                    statistics.median(latencies[name]),
                    (min(latencies[name]), max(latencies[name])),
                    FORWARD_ROUNDS,
                )
                for name, cost in costs.items()
            ]
            progress.advance(1)
    for name, model in variants.items():
        model.train(modes[name])
    return tuple(rows)


@torch.no_grad()
def _latencies(
    variants: Mapping[str, nn.Module], candidates: Mapping[str, Candidate], device: str
) -> dict[str, list[float]]:
    """Seconds of every forward pass in evaluation mode, in turns."""
    for model in variants.values():
        model.eval()
    for candidate in candidates.values():
        candidate.forward()
    return interleaved_times({name: each.forward for name, each in candidates.items()}, FORWARD_ROUNDS, device)


def _candidate(model: nn.Module, length: int) -> Candidate:
    inner = pretrained(model)
    config: Any = inner.config
    vocabulary = int(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(inner.device)
    batch = {"input_ids": ids}
    if inner.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    model.train()

    def forward() -> Tensor:
        return model(**batch, use_cache=False)[0] if inner.can_generate() else model(**batch)[0]

    with torch.no_grad():
        upstream = torch.ones_like(forward())
    return Candidate(forward, upstream / upstream.numel(), list(model.parameters()))
