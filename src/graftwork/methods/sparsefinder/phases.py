"""The phases of Sparsefinder: entmax → project → cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from graftwork.core.files import write_json
from graftwork.core.run_folder import RunFolder
from graftwork.errors import DataError
from graftwork.methods.sparsefinder import buckets
from graftwork.methods.sparsefinder.clustering import fit, projected_points, projection_hash
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import HeadBatch, QueriesKeys, extract, pad_heads
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of, gold_edges
from graftwork.methods.sparsefinder.losses import fast_sum_hinge, projection_loss
from graftwork.methods.sparsefinder.modules import SparsefinderAttention, sparsefinder_modules
from graftwork.settings.training import TrainingSettings
from graftwork.training.phases import Finetune, ParameterGroup, Phase

QUERIES_KEYS = "queries_keys"
"""Folder of the extracted queries and keys, below `artifacts/`."""
HELD_OUT = "held_out"
"""Folder of the queries and keys that predictors are compared on, below `artifacts/`."""


class EntmaxPhase(Finetune):
    """Fine-tune the model with entmax attention, α rising from softmax if the settings say so."""

    name: ClassVar[str] = "entmax"
    needs_labels: ClassVar[bool] = False

    def __init__(self) -> None:
        self.passes = 1

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """The run's own, looked at for the passes that make a step."""
        self.passes = settings.gradient_accumulation_steps
        return settings

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The model's loss; α takes its next value first.

        Raises:
            DataError: If the batch has no labels, so that there is no loss.
        """
        if "labels" not in batch:
            raise DataError(
                "Found examples without labels, or a model without a language-model head: there is no loss for the "
                "entmax phase. Set finetune to false, or give a task and a model that belong together."
            )
        for graft in sparsefinder_modules(model).values():
            if graft.config.anneal_steps is not None and model.training:
                # in the checkpoint with the weights, so that a resumed run goes on at the same α
                graft.progress.add_(1.0 / (graft.config.anneal_steps * self.passes))
        return super().step(model, batch)


class StoredSentences(Dataset[list[tuple[Tensor, Tensor]]]):
    """Stored sentences, each with the queries and keys of every module."""

    def __init__(self, stored: QueriesKeys) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> list[tuple[Tensor, Tensor]]:
        return [self.stored.read(index, site) for site in range(len(self.stored.sites))]


class _StoredPhase(Phase):
    """A phase on stored queries and keys."""

    needs_labels: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = (QUERIES_KEYS, HELD_OUT)

    def __init__(self, config: SparsefinderConfig) -> None:
        self.config = config
        self.stored: QueriesKeys | None = None
        self.folder: Path | None = None

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """The method's own: projections are no language model."""
        config = self.config
        return replace(
            settings,
            max_steps=-1,
            num_train_epochs=float(config.projection_epochs),
            learning_rate=config.projection_learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            optim="adamw_torch",
            per_device_train_batch_size=config.projection_batch_size,
            gradient_accumulation_steps=1,
            train_sampling_strategy="random",
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            lora=None,
            arguments={},
        )

    def examples(self, model: nn.Module, dataset: Any, collate: Any, run: RunFolder) -> tuple[Any, Any]:
        """Extract queries and keys of the run's data, or take those that are there, and step on them."""
        self.folder = run.artifacts
        self.stored = extract(
            model,
            dataset,
            collate,
            run.artifacts / QUERIES_KEYS,
            samples=self.config.samples,
            half_precision=self.config.half_precision,
        )
        sites = self.stored.sites

        def together(rows: Sequence[list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
            return {"heads": [pad_heads([row[site] for row in rows], data) for site, data in enumerate(sites)]}

        return StoredSentences(self.stored), together


class ProjectPhase(_StoredPhase):
    """Train the projections of every module on stored queries and keys, all modules in one step.

    Source: section 3.5 of the specification. Differs from the authors' code: examples are shuffled, every parameter is
    handed to the optimiser once, and the gradient is clipped over all modules together, which are independent.
    """

    name: ClassVar[str] = "project"

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """The method's own; clipping leaves each module about the authors' norm of 1."""
        return replace(super().settings(settings), max_grad_norm=1.0)

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """The projections, each once."""
        found = [
            parameter
            for graft in sparsefinder_modules(model).values()
            for projection in (graft.query_projection, graft.key_projection)
            if projection is not None
            for parameter in projection.parameters()
        ]
        return (ParameterGroup(found),)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The mean over modules of the projection loss."""
        losses = []
        for graft, data in zip(sparsefinder_modules(model).values(), batch["heads"], strict=True):
            data = _on(data, next(graft.parameters()).device)
            gold, allowed = gold_and_allowed(graft, data)
            if self.config.loss == "sum_hinge" and self.config.train_distance == "l2":
                query, key, *_ = projected_points(graft, data)
                losses.append(fast_sum_hinge(query, key, gold, allowed, margin=self.config.margin))
            else:
                # computed once more in the backward pass, so that one module's distances exist at a time
                losses.append(checkpoint(_module_loss, graft, data, gold, allowed, use_reentrant=False))
        loss = torch.stack(losses).mean()  # type: ignore[arg-type]
        if self.config.l2:
            squares = [p.square().sum() for group in self.parameters(model) for p in group.parameters]
            loss = loss + self.config.l2 / 2 * torch.stack(squares).sum()
        return {"loss": loss}


class ClusterPhase(_StoredPhase):
    """Fit centroids, bins and thresholds on the stored queries and keys, and switch the graphs on."""

    name: ClassVar[str] = "cluster"

    def __init__(self, config: SparsefinderConfig) -> None:
        super().__init__(config)
        self.collected: list[list[HeadBatch]] = []

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """None: this only collects."""
        return ()

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Nothing to compute: modules are fitted one after another at the end, reading what they need."""
        return {}

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Fit every module, and write what was fitted into `artifacts/`."""
        if self.stored is None or self.folder is None:
            raise DataError("Found no stored queries and keys to fit on. Run the phase through graftwork.train.")
        tensors, notes = {}, {}
        size = self.config.projection_batch_size
        for number, (path, graft) in enumerate(sparsefinder_modules(model).items()):
            device = graft.active.device
            count = len(self.stored)
            parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
            batches = [_on(self.stored.batch(part, number), device) for part in parts]
            notes[path] = {"projections": projection_hash(graft), **fit(graft, batches)}
            for name, value in graft.named_buffers():
                tensors[f"{path}.{name}"] = value.detach().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".centroids.safetensors.part"
        save_file(tensors, temporary)
        temporary.replace(self.folder / "centroids.safetensors")
        write_json(self.folder / "centroids.json", notes)


def gold_and_allowed(graft: SparsefinderAttention, data: HeadBatch) -> tuple[Tensor, Tensor]:
    """The graph that a projection is trained on, and the pairs it may look at: blocks, symmetric, without patterns."""
    config = graft.config
    gold = gold_edges(
        data.query,
        data.key,
        data.mask,
        scale=data.site.scale,
        alpha=config.alpha if config.alpha > 1 else 1.5,
        query_real=data.query_real,
    )
    allowed = data.allowed
    if config.concat_q_and_k:
        gold = (gold | gold.mT) & allowed
    if config.exclude_fixed:
        pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask)
        fixed = Graph(1, data.mask, pattern=pattern, unit=config.block_size, query_real=data.query_real)
        allowed = allowed & ~fixed.dense(data.query.device)
    if config.block_size > 1:
        gold, allowed = blocks_of(gold, config.block_size), blocks_of(allowed, config.block_size)
    return gold, allowed.expand_as(gold)


def _module_loss(graft: SparsefinderAttention, data: HeadBatch, gold: Tensor, allowed: Tensor) -> Tensor:
    query, key, *_ = projected_points(graft, data)
    distance = buckets.distances(query, key, graft.config.train_distance)
    return projection_loss(distance, gold, allowed, loss=graft.config.loss, margin=graft.config.margin)


def _on(data: HeadBatch, device: torch.device) -> HeadBatch:
    moved: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)  # noqa: E731
    return HeadBatch(moved(data.query), moved(data.key), moved(data.query_real), moved(data.key_real), data.site)
