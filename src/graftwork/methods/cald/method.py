"""CALD: conversion of a pretrained encoder to linear-complexity attention during guided fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.method import Change, Method
from graftwork.methods.cald import weights
from graftwork.methods.cald.about import ABOUT
from graftwork.methods.cald.calibration import automatic_rank
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.decoder_proof import WINDOW, compare, observe
from graftwork.methods.cald.distances import layer_distances, layer_loss
from graftwork.methods.cald.effects import check_effects
from graftwork.methods.cald.guides import dense_copy
from graftwork.methods.cald.mixers import MIXER_SETTINGS, MIXERS, TRAINING_SETTINGS
from graftwork.methods.cald.modules import FeatureMapAttention, LinformerAttention
from graftwork.methods.cald.phases import AttentionTransfer, Distill
from graftwork.methods.cald.positions import change_of, extend_positions, is_extended, reserved_rows
from graftwork.methods.cald.recurrence import LinearAttention, bind_cache
from graftwork.surgery.attention import AttentionGraft, graft_attention
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import GRAFT, add_pre_hook, exchange_module
from graftwork.surgery.proof import MismatchError, is_computable
from graftwork.surgery.self_attention import open_hidden_states
from graftwork.surgery.sites import (
    AttentionSite,
    attention_sites,
    check_interface_use,
    family_of,
    group_count,
    head_shape,
    pretrained,
)
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example


class Cald(Method[CaldConfig], about=ABOUT):
    """Replace self-attention by a linear-complexity mixer, keep all other weights, and distil from a dense teacher.

    Source: He & Garner 2025, "Joint Fine-tuning and Conversion of Pretrained Speech and Language Models towards Linear
    Complexity"; `idiap/linearize-distill-pretrained-transformers`, part nlp.
    Differs from it: padding of any pattern; a converted checkpoint does not load as a dense model unnoticed; hidden
    states are compressed before they are projected; every guide resumes exactly. The card lists all differences.
    """

    def __init__(self, config: CaldConfig | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        # the dense guide is the baseline: it converts nothing
        self.changes_model = self.config.guide != "dense"

    @property
    def needs_calibration(self) -> bool:
        """True if the rank is `auto:…`, which examples decide."""
        config = self.config
        return config.guide != "dense" and config.mixer == "linformer" and config.kept_share is not None

    def calibrate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> Cald:
        """Choose the ranks of `rank="auto:…"` from the attention maps of the first examples."""
        if not self.needs_calibration:
            return self
        self._sites(model)
        return Cald(replace(self.config, rank=automatic_rank(model, tokenizer, rows, self.config)))

    def check_settings(self) -> None:
        """Refuse settings without effect; called for new conversions, not for recorded ones."""
        check_effects(self.config)

    def continues(self, recorded: object) -> bool:
        """True if recorded settings create the same mixers, so that their trained parameters are kept."""
        if not isinstance(recorded, CaldConfig) or "dense" in (recorded.guide, self.config.guide):
            return False
        names = (MIXER_SETTINGS | {"mixer", "layers"}) - TRAINING_SETTINGS
        return all(getattr(recorded, name) == getattr(self.config, name) for name in names)

    def matches(self, recorded: object) -> bool:
        """True if the recorded settings equal these; an automatic rank equals every rank."""
        if self.needs_calibration and isinstance(recorded, CaldConfig):
            recorded = replace(recorded, rank=self.config.rank)
        return recorded == self.config

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Replace the attention of the selected layers, after all of them have been checked."""
        if self.config.guide == "dense":
            return []
        sites = self._sites(model)
        if self.needs_calibration:
            raise ConfigError(
                f"rank is {self.config.rank!r}, which is calibrated from examples. Call calibrate(model, tokenizer, "
                "examples) of the method first, or graftwork convert with --task and --data. Nothing was changed."
            )
        longer = self._extended(model)
        grafts = self._grafts(model, sites)
        if self.config.mixer == "linear":
            self._graft_decoder(model, sites, grafts)
        else:
            graft_attention(model, self.name, grafts)
        # without registered projections, keys and values are compressed after the projections, with the same result
        registered = family_of(model).self_attention is not None
        if self.config.mixer == "linformer" and (registered or self.config.form == "compressed"):
            open_hidden_states(model, self.name, list(grafts))
        changes = [Change(site.path, type(site.module).__name__, repr(grafts[site.path])) for site in sites]
        return [*longer, *changes]

    def _extended(self, model: nn.Module) -> list[Change]:
        """Extend position embeddings if `positions` is above the model's number of positions."""
        config, limit = self.config, getattr(pretrained(model).config, "max_position_embeddings", None)
        if config.mixer == "linformer" and config.positions is not None and limit and config.positions > int(limit):
            return [extend_positions(model, self.name, config.positions, config.extend_positions or "tile")]
        if is_extended(model) and config.positions == _positions(model):
            return [change_of(model, config.extend_positions or "tile")]
        if config.extend_positions is not None:
            raise ConfigError(
                f"extend_positions is {config.extend_positions!r}, and positions is {config.positions}, not above the "
                f"{limit} of {type(pretrained(model)).__name__}, so that nothing is extended. Omit extend_positions, "
                "or set positions above that number."
            )
        return []

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """Attention transfer if it is set, then guided fine-tuning."""
        transfer = (AttentionTransfer(self.config),) if self.config.transfer_steps else ()
        return (*transfer, Distill(self.config))

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Measure the distance between hidden states of the model and of `config.teacher` on one batch.

        Returns:
            `distance/<number>` for the embeddings (0) and every layer, and `distance` for their reduction; empty if
            `teacher` is null.
        """
        if self.config.teacher is None:
            return {}
        teacher = dense_copy(model).eval()
        weights.load_dense(teacher, weights.weights_file(self.config.teacher), self.config.extend_positions)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        model.eval()
        with torch.no_grad():
            student_states, teacher_states = (
                each(**inputs, output_hidden_states=True).hidden_states for each in (model, teacher)
            )
            distances = layer_distances(student_states, teacher_states, batch["attention_mask"].bool(), self.config)
        values = {f"distance/{number}": float(distance) for number, distance in distances.items()}
        return {**values, "distance": float(layer_loss(distances, self.config))}

    def _sites(self, model: nn.Module) -> list[AttentionSite]:
        causal = MIXERS[self.config.mixer].causal
        (_refuse_encoder if causal else _refuse_decoder)(model)
        check_interface_use(model, self.name)
        layers = parse_layers(self.config.layers, "layers")
        sites = [site for site in attention_sites(model) if layers is None or site.layer in layers]
        if not sites:
            raise UnsupportedModelError(
                f"cald found no attention to change in {type(pretrained(model)).__name__} (layers "
                f"{self.config.layers or 'all'}). Check layers. Nothing was changed."
            )
        windows = {site.layer for site in sites if _sliding_window(site.module, causal=causal) is not None}
        if windows:
            whole = ",".join(str(site.layer) for site in sites if site.layer not in windows)
            advice = f"Set layers to {whole!r}" if whole else "Choose a model with full attention"
            if causal:
                advice += ", or set sliding_window of the model's config to null"
            raise UnsupportedModelError(
                f"cald cannot change layers {', '.join(map(str, sorted(windows)))} of "
                f"{type(pretrained(model)).__name__}: their attention has a sliding window, and "
                f"{'a recurrent state contains' if causal else 'compressed keys combine'} all tokens. {advice}. "
                "Nothing was changed."
            )
        for site in sites:
            if site.causal != causal or site.kind == "cross":
                what = "reads another sequence" if site.kind == "cross" else f"is {'' if site.causal else 'not '}causal"
                why = "a recurrent state contains earlier" if causal else "compressed keys combine all"
                raise UnsupportedModelError(
                    f"cald cannot change {type(pretrained(model)).__name__}: {site.path} {what}, and {why} tokens of "
                    f"one sequence. Expected {'a decoder' if causal else 'an encoder'}, or layers without such "
                    "attention. Nothing was changed."
                    f"{'' if causal or site.kind == 'cross' else ' Decoders have the mixer linear (--mixer linear).'}"
                )
        return sites

    def _graft_decoder(
        self, model: nn.Module, sites: Sequence[AttentionSite], grafts: Mapping[str, AttentionGraft]
    ) -> None:
        """Attach recurrent mixers, after mixers in whose window the dense model is computed have been compared."""
        proving = is_computable(pretrained(model))
        try:
            expected = observe(model) if proving else None
            config = replace(self.config, window=WINDOW)
            graft_attention(model, self.name, Cald(config)._grafts(model, sites) if proving else grafts)
            for site in sites:
                add_pre_hook(model, self.name, site.module, bind_cache)
            if expected is not None:
                compare(observe(model), expected)
                for site in sites:
                    exchange_module(model, site.module, GRAFT, cast(nn.Module, grafts[site.path]))
        except MismatchError as error:
            raise UnsupportedModelError(
                f"cald cannot change the attention of {type(pretrained(model)).__name__}: a comparison of softmax "
                f"attention in a window with the dense model failed ({error}). Choose another model. Nothing was "
                "changed."
            ) from None

    def _grafts(self, model: nn.Module, sites: Sequence[AttentionSite]) -> Mapping[str, AttentionGraft]:
        """Mixer of each attention module, by path."""
        if self.config.mixer == "linformer":
            return self._linformer(model, sites)
        if self.config.mixer == "feature_map":
            return {site.path: FeatureMapAttention() for site in sites}
        grafts: dict[str, AttentionGraft] = {}
        for site in sites:
            heads, width = head_shape(site.module)
            # latent attention (DeepSeek) has keys with a rotary and another part, and narrower values
            keys, values = (getattr(site.module, name, width) for name in ("qk_head_dim", "v_head_dim"))
            grafts[site.path] = LinearAttention(
                self.config, heads, group_count(site.module, heads), keys, values, like=next(site.module.parameters())
            )
        return grafts

    def _linformer(self, model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, LinformerAttention]:
        config, ranks = self.config, self.config.ranks
        if len(ranks) not in (1, len(sites)):
            raise ConfigError(
                f"rank is {list(ranks)}, {len(ranks)} numbers for {len(sites)} layers. Expected one number, or one for "
                "each converted layer. Nothing was changed."
            )
        positions = config.positions or int(pretrained(model).config.max_position_embeddings)
        heads, _ = head_shape(sites[0].module)
        generator = torch.Generator().manual_seed(config.seed)
        grafts: dict[str, LinformerAttention] = {}
        first: LinformerAttention | None = None
        for number, site in enumerate(sites):
            graft = LinformerAttention(
                config,
                ranks[number % len(ranks)],
                positions,
                heads,
                like=next(site.module.parameters()),
                generator=generator,
                owner=first if config.share == "layer" else None,
            )
            first = first or graft
            grafts[site.path] = graft
        return grafts


def _positions(model: nn.Module) -> int:
    """Number of positions of a model with a position table, which a loaded model has already extended."""
    return int(cast(Any, pretrained(model)).config.max_position_embeddings) - reserved_rows(model)


def _sliding_window(module: nn.Module, *, causal: bool) -> int | None:
    """Sliding window of an attention module, which decoders such as Mistral read from their configuration."""
    if hasattr(module, "sliding_window") or not causal:
        return getattr(module, "sliding_window", None)
    return getattr(getattr(module, "config", None), "sliding_window", None)


def _refuse_decoder(model: nn.Module) -> None:
    inner = pretrained(model)
    if getattr(inner.config, "is_decoder", False) or getattr(inner.config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"cald cannot change {type(inner).__name__}: it is configured as a decoder, and compressed keys combine "
            "all tokens, so attention cannot be causal. Expected an encoder (config.is_decoder false). Nothing was "
            "changed."
        )


def _refuse_encoder(model: nn.Module) -> None:
    inner = pretrained(model)
    if inner.config.is_encoder_decoder or family_of(model).default_stack != "decoder":
        raise UnsupportedModelError(
            f"cald cannot change {type(inner).__name__} with the mixer linear: its attention is not that of a decoder "
            "alone. Expected a causal language model, or the mixer linformer for an encoder. Nothing was changed."
        )
