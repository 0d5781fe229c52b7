"""ReGrad: an adapter trained so that one gradient step on a passage teaches its content to the model."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.capabilities import Answering, Drift
from graftwork.grafting.method import Change, Method
from graftwork.methods.regrad.about import ABOUT
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.functional import norms
from graftwork.methods.regrad.modules import (
    ADAPTER,
    AdaptedForward,
    LowRankAdapter,
    flat_adapter,
    layout,
    step_sizes,
    updated,
)
from graftwork.methods.regrad.phases import Meta
from graftwork.surgery.layers import parse_layers
from graftwork.surgery.modules import add_module, override
from graftwork.surgery.sites import FeedForwardSite, family_of, feed_forward_sites, pretrained
from graftwork.training.batching import PASSAGES
from graftwork.training.phases import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.core.example import Example
    from graftwork.settings.evaluation import EvaluationSettings


class ReGrad(Method[ReGradConfig], about=ABOUT):
    """Learn an adapter and step sizes once, store gradients of passages, answer after one temporary gradient step.

    A question with passages D is answered with adapter θ* − γ · α ⊙ Σ_{d ∈ D} g_d, where g_d = ∇_θ L_LM(d; θ*) is the
    stored gradient of passage d, α are the learned step sizes and γ is the strength.

    Source: Su et al. 2026, "Retrievable Gradients: Continual Post-Training Without Cumulative Weight Drift";
    `oneal2000/ReGrad`.
    Differs from it: gradients belong to passages instead of questions, one document template is used in training and
    encoding, updates are arguments of a batch and never written to weights, float32 throughout; the card lists all
    differences.
    """

    places: ClassVar[frozenset[str]] = frozenset({"bank", "index"})

    def apply(self, model: nn.Module) -> Sequence[Change]:
        """Add an adapter to each selected projection; all checks precede the first change."""
        generator = torch.Generator().manual_seed(self.config.seed)
        changes: list[Change] = []
        first: LowRankAdapter | None = None
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
        """Return the meta-training phase."""
        return (Meta(self.config),)

    @property
    def chunk_setting(self) -> str | None:
        """`meta_chunk`; None if it is a number, or has no effect."""
        return "meta_chunk" if self.config.outer_loss and self.config.meta_chunk == "auto" else None

    def chunked(self, size: int, rows: int) -> ReGrad:
        """Return the method with chunks of `size` passages; `all` if that is the whole batch."""
        chunk: int | Literal["all"] = "all" if size >= self.largest_chunk(rows) else size
        return ReGrad(replace(self.config, meta_chunk=chunk))

    def largest_chunk(self, rows: int) -> int:
        """Return the number of passages of `rows` questions."""
        return rows * (self.config.passages or PASSAGES)

    def answering(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        settings: EvaluationSettings,
    ) -> AbstractContextManager[Answering]:
        """Open the bank and the index, and answer every question after one gradient step on its passages."""
        from graftwork.methods.regrad.answering.open_answering import open_answering

        return open_answering(model, tokenizer, self.config, rows, settings)

    def passage_bytes(self, model: nn.Module) -> Mapping[str, int]:
        """Return the bytes of one gradient in the bank in its default precision, and of one passage in the index."""
        from graftwork.methods.regrad.bank.layout import stride
        from graftwork.retrieval.sizes import bytes_per_passage

        return {"bank": stride(layout(model).size, "bfloat16"), "index": bytes_per_passage()}

    @contextmanager
    def applied(self, model: nn.Module, rows: int) -> Generator[None]:
        """Apply an update of zeros to every question."""
        delta = flat_adapter(model).new_zeros(rows, layout(model).size)
        with updated(model, delta):
            yield

    def measure(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, float]:
        """Return statistics of the trained adapter.

        Returns:
            `adapter_norm`, `step_size_mean`, and `negative_step_sizes`, the share of numbers with a negative step size,
            along which the step ascends.
        """
        with torch.no_grad():
            sizes = step_sizes(model)
            return {
                "adapter_norm": float(norms(flat_adapter(model))),
                "step_size_mean": float(sizes.mean()),
                "negative_step_sizes": float((sizes < 0).float().mean()),
            }

    def drift(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: int) -> Drift:
        """Answer questions from the bank of the settings, in both modes, and compare all weights with those before.

        Raises:
            ConfigError: If the settings name no bank, or it is empty.
            FingerprintMismatchError: If the bank was encoded with another model.
        """
        from graftwork.methods.regrad.answering.drift import check_drift
        from graftwork.methods.regrad.bank.gradient_bank import GradientBank

        if self.config.bank is None:
            raise ConfigError("Found no gradient bank to answer from. Name it with --set method.bank=FOLDER.")
        with GradientBank(self.config.bank) as bank:
            found = check_drift(model, tokenizer, self.config, bank, questions)
        return Drift(found.same, str(found))

    def _projections(self, model: nn.Module) -> dict[str, nn.Module]:
        """The selected feed-forward projections by their paths."""
        if family_of(model).default_stack != "decoder":
            raise UnsupportedModelError(
                f"regrad cannot change {type(pretrained(model)).__name__}: a gradient stores a passage through the "
                "loss of its next tokens. Expected a decoder-only language model. Nothing was changed."
            )
        sites = [site for site in feed_forward_sites(model, ("layer",)) if site.layout.gated]
        if not sites:
            raise UnsupportedModelError(
                f"regrad found no gated feed-forward layers in {type(pretrained(model)).__name__}. Expected gate, up "
                "and down projections that are modules, as in Llama; layers without a gate and experts with 3-D "
                "parameters are not supported. Nothing was changed."
            )
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
    names = {"gate": layout.input, "up": layout.input if layout.fused else str(layout.up), "down": layout.output}
    if layout.fused and ("gate" in config.projections) != ("up" in config.projections):
        raise ConfigError(
            f"projections is {', '.join(config.projections)}, but gate and up are one matrix in "
            f"{type(site.module).__name__} ({site.path}.{layout.input}). Name both or neither. Nothing was changed."
        )
    return list(dict.fromkeys(names[part] for part in ("gate", "up", "down") if part in config.projections))


def _widths(projection: Any) -> tuple[int, int]:
    return int(projection.in_features), int(projection.out_features)


def _device(projection: nn.Module) -> torch.device:
    device = next(projection.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
