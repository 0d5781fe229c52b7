"""Random Llamas with adapters, random passages, and inputs of the reference implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork.grafting.conversion import convert, restore
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.modules import adapters, layout


def random_llama(
    *,
    layers: int = 5,
    intermediate: int = 172,
    vocabulary: int = 128,
    std: float = 0.1,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    seed: int = 0,
) -> Any:
    """Return a random Llama of hidden size 64 without dropout, in evaluation mode.

    Args:
        layers: Number of layers.
        intermediate: Width of the feed-forward layers.
        vocabulary: Number of tokens.
        std: Standard deviation of the initial weights.
        dtype: Type of the weights.
        attention: Attention implementation of transformers.
        seed: Seed of the weights.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=std,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted_llama(*, b_std: float = 0.02, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return the tiny model of the specification: five layers, rank-4 adapters in the last three."""
    chosen = {"rank": 4, "lora_alpha": 8.0, "layers": "2-4", "b_std": b_std, **(settings or {})}
    return convert(random_llama(**options), ReGrad(**chosen)).model


def plain_copy(model: Any) -> Any:
    """Return a copy of a converted model without any method."""
    import copy

    dense = copy.deepcopy(model)
    restore(dense)
    return dense


def passages(count: int, *, shortest: int = 5, longest: int = 40, vocabulary: int = 128, seed: int = 1) -> list[Tensor]:
    """Return random token sequences of different lengths.

    Args:
        count: Number of sequences.
        shortest: Minimum length.
        longest: Maximum length.
        vocabulary: Number of tokens.
        seed: Seed of lengths and tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask [rows tokens], padded on the right."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return ids, mask


def theta_of(model: Any) -> dict[str, Tensor]:
    """Return the adapter parameters in the format of the reference implementation."""
    return {
        f"{path}.{name}": getattr(adapter, name).detach().clone().requires_grad_()
        for path, adapter in adapters(model).items()
        for name in ("lora_A", "lora_B")
    }


def flat(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Concatenate named tensors in the order of the layout."""
    return torch.cat([tensors[name].flatten() for name, _ in layout(model).tensors])


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error ‖found − expected‖ / ‖expected‖ of found [*] against expected [*]."""
    return float(((found - expected).norm() / expected.norm()).detach())
