"""Top-k feed-forward and attention layers: only the k largest scores of each row contribute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.method import Change, Method
from graftwork.methods.topk import functional
from graftwork.methods.topk.about import ABOUT
from graftwork.methods.topk.calibration import calibrated, real_tokens
from graftwork.methods.topk.config import TopKConfig
from graftwork.methods.topk.forms import ExpertsEntry, TopKActivation
from graftwork.methods.topk.modules import LayerEntry, TopKAttention, TopKFeedForward, activation_name
from graftwork.methods.topk.schedule import check_layers, kept_share
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import add_module, override, replace_module
from graftwork.surgery.sites import (
    AttentionSite,
    FeedForwardSite,
    attention_sites,
    check_interface_use,
    feed_forward_sites,
    pretrained,
    unproven_feed_forwards,
)
from graftwork.surgery.structure import widths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example


class TopK(Method[TopKConfig], about=ABOUT):
    """Keep the k largest scores per query in attention and per token in feed-forward layers.

    Source: Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention"; `ag1988/top_k_attention`.
    Differs from it: attention of pretrained models, gated and biased feed-forward layers, parameters shared instead of
    copied, correct gradients under dropout with chunks. The card lists all differences.
    """

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Replace the selected layers, after all of them have been checked."""
        config = self.config
        if config.is_automatic:
            raise ConfigError(
                f"attention_k is {config.attention_k!r} and feed_forward_k is {config.feed_forward_k!r}; auto is "
                "calibrated from examples. Call calibrate(model, tokenizer, examples) of the method first, or "
                "graftwork convert with --task and --data. Nothing was changed."
            )
        feed_forwards = self._feed_forward_sites(model) if config.changes_feed_forward else []
        attentions = self._attention_sites(model) if config.changes_attention else []
        prepared = [(site, self._prepared(site)) for site in feed_forwards]
        changes: list[Change] = []
        if attentions:
            grafts = {
                site.path: TopKAttention(
                    config.keys(site.layer),
                    config.attention_chunk_size,
                    first=config.attention_sinks or 0,
                    recent=config.attention_window or 0,
                )
                for site in attentions
            }
            graft_attention(model, self.name, grafts)
            changes += [Change(site.path, type(site.module).__name__, repr(grafts[site.path])) for site in attentions]
        for site, new in prepared:
            changes.append(_change(site, new))
            self._install(model, site, new)
        return changes

    def _install(
        self, model: nn.Module, site: FeedForwardSite, new: TopKFeedForward | TopKActivation | ExpertsEntry
    ) -> None:
        """Put the new computation of one feed-forward layer in the place of the old one."""
        layout = site.layout
        if isinstance(new, ExpertsEntry):
            override(model, self.name, site.module, "forward", new)
        elif isinstance(new, TopKActivation):
            if layout.activation in dict(site.module.named_children()):
                replace_module(model, self.name, f"{site.path}.{layout.activation}", new)
            else:
                override(model, self.name, site.module, layout.activation, new)
        elif layout.entry is None:
            replace_module(model, self.name, site.path, new)
        else:
            add_module(model, self.name, site.module, "topk_feed_forward", new)
            override(model, self.name, site.module, layout.entry, LayerEntry(site.module, new))

    @property
    def needs_calibration(self) -> bool:
        """True if a k is `auto:…`, which examples decide."""
        return self.config.is_automatic

    def calibrate(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> TopK:
        """Choose the numbers of `auto:…` from the activation mass kept on the first examples."""
        if not self.needs_calibration:
            return self
        if kept_share(self.config.feed_forward_k, "feed_forward_k"):
            self._check_measurable(model)
        layers = {site.path: site.layer for site in attention_sites(model)}
        layers |= {site.path: site.layer for site in feed_forward_sites(model)}

        def apply(config: TopKConfig) -> object:
            return TopK(config).apply(model)

        def kept_mass(layer: TopKFeedForward, tokens: Tensor) -> float:
            return float(_statistics(layer, tokens).kept_mass)

        return TopK(calibrated(self.config, apply, kept_mass, layers, model, tokenizer, rows))

    def _check_measurable(self, model: nn.Module) -> None:
        """Refuse an automatic feed_forward_k for layers whose kept mass is not measured."""
        for site in self._feed_forward_sites(model):
            if site.layout.form != "layer" or activation_name(attrgetter(site.layout.activation)(site.module)) is None:
                raise ConfigError(
                    f"feed_forward_k is {self.config.feed_forward_k!r}, but the kept mass of "
                    f"{type(site.module).__name__} ({site.path}) cannot be measured. Expected a number or a share of "
                    "the width for such layers. Nothing was changed."
                )

    def matches(self, recorded: object) -> bool:
        """True if the recorded settings equal these; an automatic k equals every k."""
        if isinstance(recorded, TopKConfig):
            names = [name for name in ("attention_k", "feed_forward_k") if kept_share(getattr(self.config, name), name)]
            recorded = replace(recorded, **{name: getattr(self.config, name) for name in names})
        return recorded == self.config

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Measure kept activation mass and active units of each changed feed-forward layer on one batch.

        Returns:
            `kept_mass/<path>` in 0…1 and `active_units/<path>` in units per token, over all tokens except padding.
            Layers whose projections are not plain parameters are omitted.
        """
        measured: dict[str, float] = {}

        def measuring(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                layer = cast(TopKFeedForward, module)
                if layer.is_fusible(inputs[0]):
                    statistics = _statistics(layer, real_tokens(path, inputs[0], batch))
                    measured[f"kept_mass/{path}"] = float(statistics.kept_mass)
                    measured[f"active_units/{path}"] = float(statistics.active_units)

            return hook

        modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
        layers = {path: module for path, module in modules if isinstance(module, TopKFeedForward)}
        hooks = [layer.register_forward_pre_hook(measuring(path)) for path, layer in layers.items()]
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return measured

    def _feed_forward_sites(self, model: nn.Module) -> list[FeedForwardSite]:
        found = feed_forward_sites(model)
        check_layers(self.config.feed_forward_k, _layers(found, self.config), "feed_forward_k")
        sites = [
            site for site in found if self._chosen(site) and self.config.changes_layer("feed_forward_k", site.layer)
        ]
        unproven = unproven_feed_forwards(model)
        if unproven:
            path, reason = next(iter(unproven.items()))
            raise UnsupportedModelError(
                f"topk cannot change the feed-forward layers of {type(pretrained(model)).__name__}: {path} "
                f"({type(model.get_submodule(path)).__name__}) is no plain or gated feed-forward layer; {reason}. "
                "Leave feed_forward_k and feed_forward_chunk_size out, or register its layout with "
                "graftwork.register_family. Nothing was changed."
            )
        if not sites:
            raise UnsupportedModelError(
                f"topk found no feed-forward layer to change in {type(pretrained(model)).__name__} (stacks "
                f"{', '.join(self.config.stacks)}; layers {self.config.layers or 'all'}). Check stacks and layers. "
                "Nothing was changed."
            )
        return sites

    def _attention_sites(self, model: nn.Module) -> list[AttentionSite]:
        check_interface_use(model, self.name)
        check_layers(self.config.attention_k, _layers(attention_sites(model), self.config), "attention_k")
        sites = [
            site
            for site in attention_sites(model)
            if self._chosen(site)
            and site.kind in self.config.attention_kinds
            and self.config.changes_layer("attention_k", site.layer)
        ]
        self._check_order([site for site in sites if not site.causal])
        if not sites:
            raise UnsupportedModelError(
                f"topk found no attention to change in {type(pretrained(model)).__name__} (stacks "
                f"{', '.join(self.config.stacks)}; layers {self.config.layers or 'all'}; "
                f"kinds {', '.join(self.config.attention_kinds)}). "
                "Check stacks, layers and attention_kinds. Nothing was changed."
            )
        return sites

    def _check_order(self, sites: Sequence[AttentionSite]) -> None:
        """Refuse settings for the first and the most recent keys where there is no order in time."""
        for name in ("attention_sinks", "attention_window"):
            if sites and getattr(self.config, name):
                raise ConfigError(
                    f"{name} is {getattr(self.config, name)}, but {sites[0].path} is not causal self-attention. Set "
                    "stacks to decoder and attention_kinds to self, or leave the setting out. Nothing was changed."
                )

    def _chosen(self, site: AttentionSite | FeedForwardSite) -> bool:
        layers = parse_layers(self.config.layers, "layers")
        return site.stack in self.config.stacks and (layers is None or site.layer in layers)

    def _prepared(self, site: FeedForwardSite) -> TopKFeedForward | TopKActivation | ExpertsEntry:
        """New computation of one feed-forward layer, with all settings checked."""
        config, layout = self.config, site.layout
        rules = ("gate", "abs_act", "product") if layout.gated else ("score", "abs_act")
        if layout.form == "experts":
            rules = ("product",) if layout.gated else ("abs_act",)
        if config.selection is not None and config.selection not in rules:
            kind = f"{'gated' if layout.gated else 'not gated'}{', in experts' if layout.form == 'experts' else ''}"
            raise ConfigError(
                f"selection is {config.selection!r}, but the feed-forward layers of this model are {kind} "
                f"({site.path}). Expected one of: {', '.join(rules)}, or null for the default."
            )
        if layout.form != "layer":
            self._check_form(site)
        units = config.units(_units(site), site.layer)
        if layout.form == "experts":
            return ExpertsEntry(site.module, layout, units)
        if layout.form == "activation":
            return TopKActivation(getattr(site.module, layout.activation), k=units, selection=config.selection)
        return TopKFeedForward(
            site.module,
            layout,
            k=units,
            selection=config.selection,
            chunk_size=config.feed_forward_chunk_size,
            dropout=config.feed_forward_dropout,
        )

    def _check_form(self, site: FeedForwardSite) -> None:
        """Refuse settings that have no effect if the layer is computed by the model itself."""
        ineffective = {
            "feed_forward_chunk_size": self.config.feed_forward_chunk_size is not None,
            "feed_forward_dropout false": not self.config.feed_forward_dropout,
        }
        for name, is_set in ineffective.items():
            if is_set:
                what = "its experts are" if site.layout.form == "experts" else "its feed-forward layers are"
                raise ConfigError(
                    f"Found {name}, which has no effect on {type(site.module).__name__} ({site.path}): {what} computed "
                    "by the model, and only activations are selected. Leave the setting out. Nothing was changed."
                )


def _layers(sites: Sequence[AttentionSite | FeedForwardSite], config: TopKConfig) -> int:
    """Number of layers of the longest stack that is changed."""
    return 1 + max((site.layer for site in sites if site.stack in config.stacks), default=-1)


def _statistics(layer: TopKFeedForward, tokens: Tensor) -> functional.FeedForwardStatistics:
    """Statistics of a layer for its inputs [*tokens hidden]."""
    compute: Callable[..., functional.FeedForwardStatistics] = (
        functional.topk_gated_feed_forward_statistics if layer.layout.gated else functional.topk_feed_forward_statistics
    )
    values = {name: value for name, value in layer.arguments().items() if not name.endswith("_out")}
    return compute(tokens, **values, k=layer.k, activation=layer.activation_name, selection=layer.selection)


def _units(site: FeedForwardSite) -> int:
    """Feed-forward width of a layer, whose projections may be wrapped by LoRA."""
    layout, owner = site.layout, cast(Any, site.module)
    if layout.form == "experts":
        return int(getattr(owner, layout.output).shape[1 if owner.is_transposed else 2])
    if layout.form == "layer":
        output = attrgetter(layout.output)(owner)
        found = widths(output)
        return int(output.weight.shape[0]) if found is None else found[0]
    found = widths(getattr(owner, layout.input))
    return 0 if found is None else found[1]


def _change(site: FeedForwardSite, new: TopKFeedForward | TopKActivation | ExpertsEntry) -> Change:
    """Record of a changed layer; of the activation alone if that is a module of its own."""
    after = repr(new) if isinstance(new, ExpertsEntry) else f"{type(new).__name__}({new.extra_repr()})"
    activation = dict(site.module.named_children()).get(site.layout.activation)
    if site.layout.form == "activation" and activation is not None:
        return Change(f"{site.path}.{site.layout.activation}", type(activation).__name__, after)
    return Change(site.path, type(site.module).__name__, after, _kept_parts(site))


def _kept_parts(site: FeedForwardSite) -> tuple[str, ...]:
    """Submodules that another method may still change: projections, and the rest of a larger layer."""
    layout = site.layout
    if layout.form != "layer":
        return tuple(name for name, _ in site.module.named_children() if name != layout.activation)
    if layout.entry is None:
        return layout.projections
    parts = {path.split(".")[0] for path in layout.projections}
    return (*layout.projections, *(name for name, _ in site.module.named_children() if name not in parts))
