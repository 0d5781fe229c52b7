"""Choice of k for `auto:…` settings from the activation mass that is kept on a sample of examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.topk.attention import attention_rules
from graftwork.methods.topk.attention_scores import Scores
from graftwork.methods.topk.config import TopKConfig
from graftwork.methods.topk.dropout import precise
from graftwork.methods.topk.modules import TopKAttention, TopKFeedForward
from graftwork.methods.topk.schedule import kept_share
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import undo, undo_steps
from graftwork.surgery.sites import named_modules
from graftwork.training.samples import sample_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example

MULTIPLE = 8
"""Calibrated numbers are rounded up to a multiple of this number."""
MOST_TOKENS = 1024
"""Tokens per feed-forward layer on which the kept mass is measured."""

KeptMass = Callable[[TopKFeedForward, Tensor], float]
"""Share of the activation mass that a feed-forward layer keeps of inputs [tokens hidden], with its current k."""


@torch.no_grad()
def calibrated(
    config: TopKConfig,
    apply: Callable[[TopKConfig], object],
    kept_mass: KeptMass,
    layers: Mapping[str, int],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
) -> TopKConfig:
    """Replace `auto:…` by one number per layer: the smallest that keeps the share of the mass on the sample.

    The mass is that of the attention weights, mean over heads and queries, and of the magnitudes of hidden
    activations. If a layer number occurs several times (encoder and decoder, self- and cross-attention), the largest
    number is taken.

    Args:
        config: Settings with at least one automatic k.
        apply: Converts the model with other settings; undone before this function returns.
        kept_mass: Kept mass of a feed-forward layer.
        layers: Layer number of each attention module and feed-forward layer, by path.
        model: Model before the conversion.
        tokenizer: Its tokenizer.
        rows: Examples, of which the first ones are used.

    Raises:
        ConfigError: If there is no example, or the model already has top-k layers.
    """
    if not rows:
        raise ConfigError("Found no example to calibrate k on. Expected at least one. Add training examples.")
    if any(step.method == "topk" for step in undo_steps(model)):
        raise ConfigError(
            "Found top-k layers in the model to calibrate. Expected dense ones: graftwork.restore(model)."
        )
    shares = {name: kept_share(getattr(config, name), name) for name in ("attention_k", "feed_forward_k")}
    # all keys and units are kept during the measurement
    trial = replace(
        config,
        attention_k=1 << 30 if shares["attention_k"] else None,
        attention_sinks=None,
        attention_window=None,
        attention_chunk_size=None,
        feed_forward_k=1.0 if shares["feed_forward_k"] else None,
        feed_forward_chunk_size=None,
    )
    training = model.training
    try:
        apply(trial)
        model.eval()
        found = _numbers(config, shares, kept_mass, model, tokenizer, rows)
    finally:
        undo(model, ["topk"])
        model.train(training)
    count = 1 + max(layers.values())
    lists: dict[str, Any] = {}
    for name, by_path in found.items():
        numbers = [max((k for path, k in by_path.items() if layers[path] == n), default=None) for n in range(count)]
        lists[name] = tuple(numbers)
    return replace(config, **lists)


def _numbers(
    config: TopKConfig,
    shares: Mapping[str, float | None],
    kept_mass: KeptMass,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
) -> dict[str, dict[str, int]]:
    """Number of each layer by path, for every automatic setting."""
    curves: dict[str, Curve] = {}
    tokens: dict[str, list[Tensor]] = {}
    batch: dict[str, Tensor] = {}
    hooks: list[Any] = []
    for path, module in named_modules(model):
        if isinstance(module, TopKAttention):
            owner = path.rpartition(".")[0]
            curve = curves[owner] = Curve(config.attention_sinks or 0, config.attention_window or 0)
            hooks.append(module.register_forward_pre_hook(curve.add, with_kwargs=True))
        elif isinstance(module, TopKFeedForward):
            inputs = tokens[path] = []
            hooks.append(module.register_forward_pre_hook(_collector(inputs, path, batch)))
    try:
        for given in sample_batches(model, tokenizer, rows):
            batch.clear()
            batch.update(given)
            cast(Any, model)(**given)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, dict[str, int]] = {}
    if (share := shares["attention_k"]) is not None:
        found["attention_k"] = {path: curve.smallest(share) for path, curve in curves.items()}
    if (share := shares["feed_forward_k"]) is not None:
        layers = {path: cast(TopKFeedForward, model.get_submodule(path)) for path in tokens}
        found["feed_forward_k"] = {
            path.removesuffix(".topk_feed_forward"): _units(layer, torch.cat(tokens[path]), share, kept_mass)
            for path, layer in layers.items()
        }
    return found


def _collector(
    inputs: list[Tensor], path: str, batch: Mapping[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Pre-hook that appends the inputs of real tokens [tokens hidden], up to `MOST_TOKENS` in all."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        missing = MOST_TOKENS - sum(map(len, inputs))
        if missing > 0:
            inputs.append(real_tokens(path, args[0], batch).reshape(-1, args[0].shape[-1])[:missing])

    return hook


def real_tokens(path: str, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Inputs of a layer [batch tokens hidden] without padding [real_tokens hidden]; all if the mask does not match.

    The decoder of an encoder–decoder is masked by the labels, all other stacks by the attention mask.

    Args:
        path: Path of the layer.
        hidden: Its inputs.
        batch: Inputs of the model.
    """
    is_decoder = "decoder" in path.split(".") and "labels" in batch
    mask: Tensor | None = batch["labels"] != -100 if is_decoder else batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden
    return hidden[mask.bool()]


class Curve:
    """Mean share of the attention weights on the k best keys of a layer, as a function of k.

    Args:
        first: First keys that are kept in any case.
        recent: Recent keys that are kept in any case.
    """

    def __init__(self, first: int, recent: int) -> None:
        self.first, self.recent = first, recent
        self.total = torch.zeros(0, dtype=torch.float64)
        """Sum over queries of the mass at k = 1, 2, …"""
        self.count = 0
        """Number of queries."""

    def add(self, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Add one call of `TopKAttention`; its forward pre-hook."""
        _, query, key, _, mask = args
        rules = attention_rules(query, key, mask, options["position_bias"], options.get("sinks"), self.first)
        scores_of = Scores(query, key, rules, options["scaling"], options.get("softcap"))
        for tile in scores_of.tiles(None):
            with precise(query.device):
                scores = scores_of.of(tile, scores_of.visible(tile))
            weights = torch.softmax(scores, dim=-1).nan_to_num()  # [batch, heads, rows, keys]
            always = scores_of.always(tile, weights.shape[-1], self.first, self.recent)
            held = weights.masked_fill(~always, 0.0).sum(-1, keepdim=True)  # [batch, heads, rows, 1]
            others = weights.masked_fill(always, 0.0).sort(dim=-1, descending=True).values
            mass = (held + others.cumsum(-1)).double()  # [batch, heads, rows, keys]
            self._add(mass[self._real(mask, tile, weights)])

    def smallest(self, share: float) -> int:
        """Smallest k, rounded up to a multiple of `MULTIPLE`, with at least the given mean share."""
        mean = self.total / max(1, self.count)
        needed = int((mean < share).sum()) + 1
        return -(-needed // MULTIPLE) * MULTIPLE

    def _add(self, mass: Float[Tensor, "queries keys"]) -> None:
        size = max(len(self.total), mass.shape[-1])
        new = mass.sum(0).cpu()
        # from its number of keys on, a query keeps all mass
        self.total = nn.functional.pad(self.total, (0, size - len(self.total)), value=float(self.count))
        self.total += nn.functional.pad(new, (0, size - len(new)), value=float(len(mass)))
        self.count += len(mass)

    @staticmethod
    def _real(mask: object, tile: Any, weights: Tensor) -> Tensor:
        """True for queries that are no padding and attend to a key [batch heads rows]."""
        real = weights.sum(-1) > 0
        if isinstance(mask, LazyMask) and mask.padding is not None and mask.queries == mask.keys:
            padding = mask.padding.expand(mask.batch, -1)[tile.batch, tile.rows]  # [batch rows]
            real = real & padding[:, None, :].to(real.device)
        return real


def _units(layer: TopKFeedForward, tokens: Float[Tensor, "tokens hidden"], share: float, kept_mass: KeptMass) -> int:
    """Smallest number of units, rounded up to a multiple of `MULTIPLE`, that keeps the share of the mass."""
    width = layer.k
    if width is None or not layer.is_fusible(tokens):
        raise ConfigError(
            "feed_forward_k is auto, but the projections of a layer are not plain parameters (LoRA, quantisation, "
            "off-loading). Expected plain ones. Set a number, or calibrate on the plain model."
        )
    lowest, highest = 1, width
    while lowest < highest:
        layer.k = (lowest + highest) // 2
        if kept_mass(layer, tokens) >= share:
            highest = layer.k
        else:
            lowest = layer.k + 1
    return min(width, -(-highest // MULTIPLE) * MULTIPLE)
