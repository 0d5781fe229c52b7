"""Extension of learned position embeddings beyond the length of the pretraining."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.errors import UnsupportedModelError
from graftwork.grafting.method import Change
from graftwork.methods.cald.config import Extension
from graftwork.surgery.modules import override, replace_module
from graftwork.surgery.sites import named_modules, pretrained

TABLE = "embeddings.position_embeddings"
"""Path of the table in the base model of every encoder with learned positions."""


EARLIER = "graftwork_pretrained_positions"
"""Entry of a model's configuration with the number of rows before they were extended."""


class ExtendedPositions(nn.Embedding):
    """Position embeddings with further rows, which stores how they were made.

    Args:
        weight: Rows of all positions [rows width].
        extension: Rule by which the further rows were made.
        padding_idx: Row of padding; None if there is none.
    """

    def __init__(self, weight: Float[Tensor, "rows width"], extension: Extension, padding_idx: int | None) -> None:
        # the device of an embedding is untyped
        super().__init__(*weight.shape, padding_idx=padding_idx, _weight=weight)  # pyright: ignore[reportUnknownMemberType]
        self.extension: Extension = extension


def extended(
    table: Float[Tensor, "rows width"], rows: int, reserved: int, extension: Extension
) -> Float[Tensor, "new_rows width"]:
    """Return a position table with more rows.

    tile repeats the rows from the first on, as Longformer does (Beltagy et al. 2020, section 5), so that short inputs
    are computed as before. interpolate stretches them: row i of N is the old row at i·(n − 1)/(N − 1), between its
    neighbours, which keeps the order of all positions and changes short inputs.

    Args:
        table: Learned rows.
        rows: New number of rows.
        reserved: Number of rows at the front that belong to no position (RoBERTa's padding), which stay.
        extension: Rule for the others.
    """
    front, learned = table[:reserved], table[reserved:]
    count, wanted = len(learned), rows - reserved
    if extension == "tile":
        return torch.cat([front, learned[torch.arange(wanted, device=table.device) % count]])
    place = torch.arange(wanted, device=table.device, dtype=torch.float64) * ((count - 1) / (wanted - 1))  # [wanted]
    low = place.floor().long().clamp_max(count - 1)
    share = (place - low)[:, None]  # [wanted, 1]
    wide = learned.double()
    between = wide[low] + share * (wide[(low + 1).clamp_max(count - 1)] - wide[low])  # [wanted, width]
    return torch.cat([front, between.to(table.dtype)])


def reserved_rows(model: nn.Module) -> int:
    """Number of rows of the position table before the first position: RoBERTa counts from the padding index."""
    inner: Any = pretrained(model)
    table = position_table(model)
    return 0 if table is None or table.padding_idx is None else int(inner.config.pad_token_id) + 1


def position_table(model: nn.Module) -> nn.Embedding | None:
    """Learned position embeddings of an encoder; None if it has none, as with rotary positions."""
    base: Any = pretrained(model).base_model
    try:
        found = base.get_submodule(TABLE)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Embedding) else None


def extend_positions(model: nn.Module, method: str, positions: int, extension: Extension) -> Change:
    """Extend the position embeddings, and the configuration, of an encoder in place; see `extended`.

    Args:
        model: Encoder.
        method: Name of the method, for `undo`.
        positions: New number of positions.
        extension: Rule for the new rows.

    Raises:
        UnsupportedModelError: If the encoder has no learned position embeddings.
    """
    inner = pretrained(model)
    old = position_table(model)
    if old is None:
        raise UnsupportedModelError(
            f"positions is {positions}, and {type(inner).__name__} has {inner.config.max_position_embeddings} without "
            "a table of learned position embeddings that could be extended (rotary or relative positions). "
            "Set positions to at most that number, or max_position_embeddings of the model's config to the longest "
            "input. Nothing was changed."
        )
    rows, base = positions + reserved_rows(model), inner.base_model
    weight = extended(old.weight.detach(), rows, reserved_rows(model), extension)
    new = ExtendedPositions(weight, extension, old.padding_idx).requires_grad_(old.weight.requires_grad)
    replace_module(model, method, _path(model), new)
    config = cast(Any, inner.config)
    override(model, method, config, EARLIER, len(old.weight))
    override(model, method, config, "max_position_embeddings", rows)
    embeddings: Any = base.get_submodule("embeddings")
    for name, buffer in list(embeddings.named_buffers(recurse=False)):
        # numbers and types of the positions of a batch; longer ones contain the shorter ones
        if buffer.ndim == 2 and buffer.shape[1] == len(old.weight):
            longer = torch.arange(rows, device=buffer.device)[None] if name == "position_ids" else None
            whole = buffer.new_zeros((1, rows)) if longer is None else longer.to(buffer.dtype)
            embeddings.register_buffer(name, whole, persistent=False)
    return change_of(model, extension)


def change_of(model: nn.Module, extension: Extension) -> Change:
    """Record of extended position embeddings, also of a model that was saved with them."""
    config: Any = pretrained(model).config
    table = cast(nn.Embedding, position_table(model))
    width = table.embedding_dim
    after = f"Embedding({len(table.weight)}, {width}), {extension}"
    return Change(_path(model), f"Embedding({getattr(config, EARLIER)}, {width})", after)


def is_extended(model: nn.Module) -> bool:
    """True if the position embeddings of a model were extended, here or before it was saved."""
    return getattr(pretrained(model).config, EARLIER, None) is not None and position_table(model) is not None


def _path(model: nn.Module) -> str:
    base = pretrained(model).base_model
    prefix = next((f"{name}." for name, module in named_modules(model) if module is base and name), "")
    return f"{prefix}{TABLE}"
