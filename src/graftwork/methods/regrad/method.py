"""ReGrad: an adapter at which one gradient step on a passage makes a model know what the passage says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.capabilities import Answering, Drift
from graftwork.grafting.method import Change, Method, Paper
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.modules import ADAPTER, AdaptedForward, LowRankAdapter, flat_adapter, step_sizes
from graftwork.methods.regrad.phases import Meta
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import add_module, override
from graftwork.surgery.sites import FeedForwardSite, feed_forward_sites, pretrained
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example
    from graftwork.settings.evaluation import EvaluationSettings


class ReGrad(Method[ReGradConfig]):
    """Learn an adapter and step sizes once; store passages' gradients; answer after one temporary gradient step.

    Source: Su et al. 2026, "Retrievable Gradients: Continual Post-Training Without Cumulative Weight Drift";
    `oneal2000/ReGrad`.
    Differs from it: gradients belong to passages and not to questions, one wording of passages everywhere, updates are
    data of a batch and never written to weights, 32 bits throughout; the card lists everything.
    """

    name: ClassVar[str] = "regrad"
    title: ClassVar[str] = "Documents recalled as gradients at question time"
    summary: ClassVar[str] = (
        "new documents retrieved as stored gradients at inference time; the weights are never overwritten"
    )
    paper: ClassVar[Paper] = Paper(
        "Retrievable Gradients: Continual Post-Training Without Cumulative Weight Drift",
        "arXiv:2606.15734",
        2026,
        "oneal2000/ReGrad",
    )
    config_class: ClassVar[type[Any]] = ReGradConfig
    families: ClassVar[frozenset[str]] = frozenset({"llama", "mistral", "qwen2"})
    places: ClassVar[frozenset[str]] = frozenset({"bank", "index"})

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Hang an adapter on each chosen projection. Checks everything before it changes anything."""
        generator = torch.Generator().manual_seed(self.config.seed)
        changes, first = [], None
        for path, projection in self._projections(model).items():
            adapter = LowRankAdapter(
                self.config,
                *_widths(projection),
                device=_device(projection),
                generator=generator,
                owner=first if self.config.step_size_mode == "same" else None,
            )
            first = first or adapter
            changes.append(Change(path, type(projection).__name__, f"{type(projection).__name__} + {adapter!r}"))
            add_module(model, self.name, projection, ADAPTER, adapter)
            override(model, self.name, projection, "forward", AdaptedForward(projection, adapter))
        return changes

    def phases(self, model: nn.Module) -> Sequence[Phase]:
        """Meta-training."""
        return (Meta(self.config),)

    def answering(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> AbstractContextManager[Answering]:
        """Answer every question after the step that its passages' gradients make."""
        from graftwork.methods.regrad.answering.open_answering import open_answering

        return open_answering(model, tokenizer, self.config, rows, settings)

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """What meta-training made of the adapter: its norm, and the step sizes.

        Returns:
            `adapter_norm`, `step_size_mean`, and `negative_step_sizes`, the share of numbers that one goes uphill on.
        """
        with torch.no_grad():
            sizes = step_sizes(model)
            return {
                "adapter_norm": float(flat_adapter(model).norm()),
                "step_size_mean": float(sizes.mean()),
                "negative_step_sizes": float((sizes < 0).float().mean()),
            }

    def drift(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: int) -> Drift:
        """Answer questions from the bank of the settings, in both modes, and compare all weights with those before.

        Raises:
            ConfigError: If the settings name no bank, or it is empty.
            FingerprintMismatchError: If the bank is another model's.
        """
        from graftwork.methods.regrad.answering.drift import check_drift
        from graftwork.methods.regrad.bank.gradient_bank import GradientBank

        if self.config.bank is None:
            raise ConfigError("Found no gradient bank to ask with. Name it with --set method.bank=FOLDER.")
        with GradientBank(self.config.bank) as bank:
            found = check_drift(model, tokenizer, self.config, bank, questions)
        return Drift(found.same, str(found))

    def _projections(self, model: nn.Module) -> dict[str, nn.Module]:
        sites = [site for site in feed_forward_sites(model) if site.layout.up is not None]
        count = 1 + max((site.layer for site in sites), default=-1)
        layers = parse_layers(self.config.layers, "layers")
        chosen = frozenset(range(count // 2, count)) if layers is None else layers
        found = {
            f"{site.path}.{part}": site.module.get_submodule(part)
            for site in sites
            if site.layer in chosen
            for part in _parts(site, self.config)
        }
        if not found or not chosen <= {site.layer for site in sites}:
            raise UnsupportedModelError(
                f"regrad found {count} layers with gated feed-forward projections of their own in "
                f"{type(pretrained(model)).__name__}, and the settings ask for layers {sorted(chosen)}. Expected "
                f"numbers below {count}; check layers. Nothing was changed."
            )
        return found


def _parts(site: FeedForwardSite, config: ReGradConfig) -> list[str]:
    layout = site.layout
    names = {"gate": layout.input, "up": str(layout.up), "down": layout.output}
    return [names[part] for part in ("gate", "up", "down") if part in config.projections]


def _widths(projection: Any) -> tuple[int, int]:
    return int(projection.in_features), int(projection.out_features)


def _device(projection: nn.Module) -> torch.device:
    device = next(projection.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
