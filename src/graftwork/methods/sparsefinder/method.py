"""Sparsefinder: entmax attention along a graph that is predicted before any score is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.method import Change, Method
from graftwork.methods.sparsefinder.about import ABOUT
from graftwork.methods.sparsefinder.config import BLOCKWISE, LOOKS_AHEAD, SparsefinderConfig
from graftwork.methods.sparsefinder.effects import check_effects
from graftwork.methods.sparsefinder.executors import per_head
from graftwork.methods.sparsefinder.extraction import has_labelled_decoder, real_queries
from graftwork.methods.sparsefinder.graphs import gold_edges
from graftwork.methods.sparsefinder.key_cache import remember_cache
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    SparsefinderAttention,
    observe_calls,
    sparsefinder_modules,
)
from graftwork.metrics.sparsity import graph_counts
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import add_pre_hook
from graftwork.surgery.sites import (
    AttentionSite,
    attention_sites,
    check_interface_use,
    family_of,
    head_shape,
    pretrained,
)
from graftwork.training.phases import Phase

PLACED = frozenset({"window", "random", "bigbird", "longformer", "openai_sparse", "reformer", "routing"})
"""Groupings that need queries and keys of one sequence."""

MEASURES = frozenset({"sparsity", "gold_sparsity", "recall", "exact", "empty_rows"})
"""Names of the measures of modules with a predicted graph."""


class Sparsefinder(Method[SparsefinderConfig], about=ABOUT):
    """α-entmax attention along a graph predicted from low-dimensional projections of queries and keys.

    Source: Treviso et al. 2022, "Predicting Attention Sparsity in Transformers"; `deep-spin/sparsefinder`.
    Differs from it: one pipeline, decoders and cross-attention, executors that skip work, empty rows that stay empty.
    The card lists all differences.
    """

    def check_settings(self) -> None:
        """Refuse settings without effect; called for new conversions, not for recorded ones."""
        check_effects(self.config)

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Replace attention by entmax attention in the selected modules, after checking all of them."""
        sites = self._sites(model)
        grafts: dict[str, nn.Module] = {}
        for number, site in enumerate(sites):
            heads, width = head_shape(site.module)
            graft = SparsefinderAttention(
                self.config, heads, width, causal=site.causal, cross=site.kind == "cross", number=number
            )
            device = next(iter(site.module.parameters())).device
            grafts[site.path] = graft if device.type == "meta" else graft.to(device)
        graft_attention(model, self.name, grafts)
        if self.config.projects:
            for site in sites:
                if site.causal:
                    add_pre_hook(model, self.name, site.module, remember_cache)
        return [
            Change(site.path, type(site.module).__name__, f"SparsefinderAttention({grafts[site.path].extra_repr()})")
            for site in sites
        ]

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """Phases entmax → project → cluster, as far as the settings require them."""
        from graftwork.methods.sparsefinder.phases import ClusterPhase, EntmaxPhase, ProjectPhase

        phases: list[Phase] = [EntmaxPhase()] if self.config.finetune else []
        if self.config.projects:
            if not self.config.skip_projectors:
                phases.append(ProjectPhase(self.config))
            phases.append(ClusterPhase(self.config))
        if not phases:
            raise ConfigError(
                "Found nothing to train: finetune is off, and the grouping has no learned state. Evaluate the model "
                "without training, or set finetune."
            )
        return phases

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Sparsity, gold sparsity, recall, share of exact rows and share of empty rows per module on one batch.

        Returns:
            Macro averages over sentences and heads under `<measure>/<path>`; the gold sparsity alone without a graph.
        """
        measured: dict[str, float] = {}
        paths = {id(graft): path for path, graft in sparsefinder_modules(model).items()}
        labelled = has_labelled_decoder(model)

        def observer(graft: SparsefinderAttention, call: AttentionCall) -> None:
            path = paths[id(graft)]
            real = real_queries(path, call, batch, graft.cross, labelled=labelled)
            allowed = call.mask.dense(call.query.device) & real[:, None, :, None]
            gold = gold_edges(
                call.query,
                call.key,
                call.mask,
                scale=call.scale,
                alpha=per_head(call.alpha),
                bias=call.bias,
                query_real=real,
            )
            graph = gold
            if graft.predicts:
                graph = graft.current_graph(call, real).dense(call.query.device)
            counts = graph_counts(graph, gold, allowed[:, :1])
            kept = MEASURES if graft.predicts else {"gold_sparsity"}
            for name, value in counts.ratios().items():
                if name in kept:
                    measured[f"{name}/{path}"] = float(value.mean())

        with observe_calls(model, observer), torch.no_grad():
            model(**batch)
        return measured

    def _sites(self, model: nn.Module) -> list[AttentionSite]:
        """Attention modules selected by the settings."""
        check_interface_use(model, self.name)
        config = self.config
        layers = parse_layers(config.layers, "layers")
        sites = [
            site
            for site in attention_sites(model)
            if site.stack in config.stacks
            and site.kind in config.attention_kinds
            and (layers is None or site.layer in layers)
        ]
        if not sites:
            raise UnsupportedModelError(
                f"sparsefinder found no attention to change in {type(pretrained(model)).__name__} (stacks "
                f"{', '.join(config.stacks)}; layers {config.layers or 'all'}; kinds "
                f"{', '.join(config.attention_kinds)}). Check stacks, layers and attention_kinds. Nothing was changed."
            )
        self._check_causal([site for site in sites if site.causal])
        self._check_cross([site for site in sites if site.kind == "cross"])
        if (config.projects or config.grouping in BLOCKWISE) and family_of(model).position_bias:
            raise UnsupportedModelError(
                f"sparsefinder cannot learn a graph for {type(pretrained(model)).__name__}: its scores have a position "
                "bias, which queries and keys do not contain. Use a grouping by position (window, bigbird, …), or none."
                " Nothing was changed."
            )
        return sites

    def _check_causal(self, sites: Sequence[AttentionSite]) -> None:
        config = self.config
        if not sites:
            return
        reasons = {
            f"grouping {config.grouping}": config.grouping in LOOKS_AHEAD,
            "add_last_mask": config.add_last_mask,
            f"block_size {config.block_size}": config.block_size > 1 and config.grouping not in BLOCKWISE,
            "grouping reformer": config.grouping == "reformer",
            "concat_q_and_k": config.concat_q_and_k,
        }
        for name, applies in reasons.items():
            if applies:
                raise ConfigError(
                    f"{name} cannot be used in {sites[0].path}, which decodes: the graph of a token would depend on "
                    "later tokens, or on queries that are not cached. Choose another, or set stacks to encoder."
                )

    def _check_cross(self, sites: Sequence[AttentionSite]) -> None:
        config = self.config
        if sites and (config.grouping in PLACED or config.concat_q_and_k):
            what = "concat_q_and_k" if config.concat_q_and_k else f"grouping {config.grouping}"
            raise ConfigError(
                f"{what} cannot be used in {sites[0].path}: it needs queries and keys of the same positions, which "
                "cross-attention does not have. Set attention_kinds to self."
            )
