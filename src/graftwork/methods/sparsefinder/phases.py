"""Training phases of Sparsefinder: entmax → project → cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]
from torch.utils.data import Dataset

from graftwork.core import faults
from graftwork.core.digests import file_digest
from graftwork.core.files import apply_umask, write_record
from graftwork.core.processes import is_main_process, main_process_first, process_count
from graftwork.core.run_folder import RunFolder
from graftwork.core.storage import writing
from graftwork.errors import DataError
from graftwork.methods.sparsefinder import buckets
from graftwork.methods.sparsefinder.baselines import generator_for
from graftwork.methods.sparsefinder.block_graphs import block_estimates, block_rows
from graftwork.methods.sparsefinder.block_scores import gate_loss, pool_keys, pool_queries
from graftwork.methods.sparsefinder.clustering import fit, projected_points, projection_hash
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.extraction import HeadBatch, QueriesKeys, SiteData, extract, plain_numbers
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, blocks_of
from graftwork.methods.sparsefinder.losses import fast_sum_hinge, projection_loss
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    SparsefinderAttention,
    observe_calls,
    sparsefinder_modules,
)
from graftwork.methods.sparsefinder.tensors import integers, unflatten
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.precision import attention_scores
from graftwork.training.batching import BatchSize, sample_batch
from graftwork.training.phases import Finetune, ParameterGroup, Phase

QUERIES_KEYS = "queries_keys"
"""Folder of the extracted queries and keys, below `artifacts/`."""
HELD_OUT = "held_out"
"""Folder of the held-out queries and keys for the comparison of predictors, below `artifacts/`."""
CENTROIDS_FILE = "centroids.safetensors"
"""Fitted values of all modules, below `artifacts/`."""
CENTROIDS_NOTES = "centroids.json"
"""Notes on the fitted values, with the digests of the weights and of the text that they were fitted on."""


class EntmaxPhase(Finetune):
    """Fine-tune the model with entmax attention; with `anneal_steps`, α increases from 1 (softmax)."""

    name: ClassVar[str] = "entmax"
    needs_labels: ClassVar[bool] = False

    def __init__(self) -> None:
        self.passes = 1

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """Keep the settings of the run, and store its number of passes per optimiser step."""
        self.passes = settings.gradient_accumulation_steps
        return settings

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Advance α, then compute the model's loss.

        Raises:
            DataError: If the batch has no labels and therefore no loss.
        """
        if "labels" not in batch:
            raise DataError(
                "Found examples without labels, or a model without a language-model head. Expected both for the loss "
                "of the entmax phase. Set finetune to false, or choose a task that fits the model."
            )
        for graft in sparsefinder_modules(model).values():
            if graft.config.anneal_steps is not None and model.training:
                # stored in the checkpoint with the weights, so that a resumed run continues at the same α
                graft.progress.add_(1.0 / (graft.config.anneal_steps * self.passes))
        return super().step(model, batch)


class StoredBatches(Dataset[dict[str, Any]]):
    """Data set of all batches of all epochs: queries and keys of every module, shuffled in each epoch.

    Several processes receive the items of a data set in turns, so each batch is repeated for every process. All of them
    then make the same steps, and their mean gradient, and the trained projections, are those of a single process.

    Args:
        stored: Stored sentences.
        config: Batch size, number of epochs and seed.
    """

    def __init__(self, stored: QueriesKeys, config: SparsefinderConfig) -> None:
        self.stored = stored
        self.processes = process_count()
        count, size = len(stored), config.projection_batch_size
        self.batches: list[list[int]] = []
        for epoch in range(config.projection_epochs):
            order = integers(torch.randperm(count, generator=generator_for(config.seed, epoch)))
            self.batches += [order[start : start + size] for start in range(0, count, size)]

    def __len__(self) -> int:
        return len(self.batches) * self.processes

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index // self.processes
        sentences = self.batches[number]
        heads = [self.stored.batch(sentences, site) for site in range(len(self.stored.sites))]
        return {"heads": heads, "number": number}


def one_batch(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the only item of a batch, which is a batch itself."""
    (item,) = items
    return item


class _StoredPhase(Phase):
    """Phase on stored queries and keys."""

    needs_labels: ClassVar[bool] = False
    collects: ClassVar[tuple[str, ...]] = (QUERIES_KEYS,)
    invalidates: ClassVar[tuple[str, ...]] = (HELD_OUT,)

    def __init__(self, config: SparsefinderConfig) -> None:
        self.config = config
        self.stored: QueriesKeys | None = None
        self.folder: Path | None = None

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """Replace the settings of the run with those of the projections."""
        config = self.config
        return replace(
            settings,
            max_steps=-1,
            # the data set contains the batches of all epochs in order
            num_train_epochs=1.0,
            learning_rate=config.projection_learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            optim="adamw_torch",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            train_sampling_strategy="sequential",
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            lora=None,
            arguments={},
        )

    def examples(self, model: nn.Module, dataset: Any, collate: Any, run: RunFolder) -> tuple[Any, Any]:
        """Extract the queries and keys of the run's data, or resume an extraction, and use them as examples."""
        self.folder = run.artifacts
        # the main process writes the extraction, the others read it
        with main_process_first():
            self.stored = extract(
                model,
                dataset,
                collate,
                run.artifacts / QUERIES_KEYS,
                samples=self.config.samples,
                half_precision=self.config.half_precision,
            )
        return self.provide(self.stored)

    def provide(self, stored: QueriesKeys) -> tuple[Any, Any]:
        """Examples of the phase and their collator."""
        return StoredBatches(stored, self.config), one_batch

    def sample_batch(self, model: nn.Module, size: BatchSize) -> dict[str, Any]:
        """Return queries and keys of the sentences of one step, in the shapes of a forward pass of one sentence."""
        rows, found = self.config.projection_batch_size, list[HeadBatch]()

        def observe(graft: SparsefinderAttention, call: AttentionCall) -> None:
            query, key = (tensor.detach().float().repeat(rows, 1, 1, 1) for tensor in (call.query, call.key))
            query_real, key_real = (query.new_ones(rows, each.shape[2], dtype=torch.bool) for each in (query, key))
            site = SiteData("", query.shape[1], plain_numbers(call.scale), graft.causal, graft.cross)
            found.append(HeadBatch(query, key, query_real, key_real, site))

        batch = sample_batch(model, replace(size, rows=1))
        with torch.no_grad(), observe_calls(model, observe):
            model(**batch)
        return {"heads": found, "number": 0}


class ProjectPhase(_StoredPhase):
    """Train the projections of every module on stored queries and keys, all modules in one step.

    Source: section 3.5 of the specification. Differs from the authors' code: examples are shuffled, the optimiser
    receives every parameter once, and the gradient is clipped over all modules together, although they are independent.
    """

    name: ClassVar[str] = "project"

    def settings(self, settings: TrainingSettings) -> TrainingSettings:
        """Replace the settings of the run, with gradients clipped to norm 1."""
        return replace(super().settings(settings), max_grad_norm=1.0)

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """Parameters of all projections, each once."""
        found = [
            parameter
            for graft in sparsefinder_modules(model).values()
            for projection in (graft.query_projection, graft.key_projection)
            if projection is not None
            for parameter in projection.parameters()
        ]
        return (ParameterGroup(found),)

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Mean projection loss over the modules, plus l2/2 · Σ w²."""
        losses: list[Tensor] = []
        for site, (graft, data) in enumerate(zip(sparsefinder_modules(model).values(), batch["heads"], strict=True)):
            device = next(graft.parameters()).device
            data = data.to(device)
            # negatives depend on seed, batch and module only
            seed = generator_for(self.config.seed, batch["number"], site).initial_seed()
            if self.config.grouping == "gate":
                losses.append(cast(Tensor, checkpoint(_gate_loss, graft, data, use_reentrant=False)))
                continue
            gold, allowed = gold_and_allowed(graft, data)
            if self.config.loss == "sum_hinge" and self.config.train_distance == "l2":
                query, key, *_ = projected_points(graft, data)
                generator = torch.Generator().manual_seed(seed)
                losses.append(fast_sum_hinge(query, key, gold, allowed, margin=self.config.margin, generator=generator))
            else:
                # recomputed in the backward pass, so that the distances of one module are in memory at a time
                losses.append(
                    cast(Tensor, checkpoint(_module_loss, graft, data, gold, allowed, seed, use_reentrant=False))
                )
        # modules of a model on several devices
        loss = torch.stack([each.to(losses[0].device) for each in losses]).mean()
        if self.config.l2:
            squares = [p.square().sum().to(loss.device) for group in self.parameters(model) for p in group.parameters]
            loss = loss + self.config.l2 / 2 * torch.stack(squares).sum()
        return {"loss": loss}


class ClusterPhase(_StoredPhase):
    """Fit centroids, bins and thresholds on the stored queries and keys, and activate the graphs."""

    name: ClassVar[str] = "cluster"
    collects: ClassVar[tuple[str, ...]] = (QUERIES_KEYS, CENTROIDS_FILE, CENTROIDS_NOTES)

    def __init__(self, config: SparsefinderConfig) -> None:
        super().__init__(config)
        self.collected: list[list[HeadBatch]] = []

    def provide(self, stored: QueriesKeys) -> tuple[Any, Any]:
        """Numbers of the sentences, and empty batches: `finish` reads the sentences module by module."""

        def nothing(numbers: Sequence[int]) -> dict[str, Any]:
            return {}

        return range(len(stored)), nothing

    def parameters(self, model: nn.Module) -> Sequence[ParameterGroup]:
        """Return no parameters: the phase fits without gradients."""
        return ()

    def step(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return no loss: `finish` fits the modules one after another."""
        return {}

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Fit every module, and write the fitted values to `artifacts/`."""
        if self.stored is None or self.folder is None:
            raise DataError("Found no stored queries and keys to fit on. Run the phase through graftwork.train.")
        tensors: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any]] = {}
        size = self.config.projection_batch_size
        for number, (path, graft) in enumerate(sparsefinder_modules(model).items()):
            device = graft.active.device
            count = len(self.stored)
            parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
            batches = [self.stored.batch(part, number).to(device) for part in parts]
            notes[path] = {"projections": projection_hash(graft), **fit(graft, batches)}
            for name, value in graft.named_buffers():
                tensors[f"{path}.{name}"] = value.detach().cpu().contiguous()
        if not is_main_process():
            # fitted in every process from the same queries and keys, with the same result
            return
        target = self.folder / CENTROIDS_FILE
        with writing(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / ".centroids.safetensors.part"
            save_file(tensors, temporary)
            apply_umask(temporary)
            faults.point("centroids.written", target)
            temporary.replace(target)
            faults.point("centroids.replaced", target)
        made_from = {**self.stored.identity, "centroids": file_digest(target)}
        write_record(self.folder / CENTROIDS_NOTES, {"modules": notes, "made_from": made_from})


def gold_and_allowed(
    graft: SparsefinderAttention, data: HeadBatch
) -> tuple[Bool[Tensor, "batch heads rows columns"], Bool[Tensor, "batch heads rows columns"]]:
    """Gold pairs, under the α at the time of extraction, and allowed pairs of the projection loss.

    With `concat_q_and_k` the gold graph is made symmetric, with `exclude_fixed` pairs of the fixed patterns are
    excluded, and with `block_size` both are graphs of blocks.
    """
    config = graft.config
    gold, allowed = data.gold(plain_numbers(graft.current_alpha())), data.allowed
    if config.concat_q_and_k:
        gold = (gold | gold.mT) & allowed
    if config.exclude_fixed:
        pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask)
        fixed = Graph(1, data.mask, pattern=pattern, unit=config.block_size, query_real=data.query_real)
        allowed = allowed & ~fixed.dense(data.query.device)
    if config.block_size > 1:
        gold, allowed = blocks_of(gold, config.block_size), blocks_of(allowed, config.block_size)
    return gold, allowed.expand_as(gold)


def _gate_loss(graft: SparsefinderAttention, data: HeadBatch) -> Tensor:
    """Distillation loss of the gate of one module: its distribution over past blocks against the attention mass."""
    config, mask = graft.config, data.mask
    unit, gate = config.block_size, graft.gate()
    if gate is None:
        raise DataError("Found no projections of the gate. Convert the model again with grouping gate.")
    pooled = pool_keys(data.key, data.key_real, unit)
    per_token = mask.causal or graft.cross
    rows = data.query if per_token else pool_queries(data.query, data.query_real, unit)
    start = mask.starts().to(data.query.device)
    limits = block_rows(replace(config, window_size=None), mask, pooled.real, rows.shape[2], start, cross=graft.cross)
    known = plain_numbers(graft.current_alpha()) if data.site.alpha is None else data.site.alpha
    alpha = data.query.new_tensor(known)[:, None, None] if isinstance(known, tuple) else known
    with torch.no_grad():
        scores = attention_scores(data.query, data.key, data.scale, centred=True)
        weights = entmax(scores.masked_fill(~data.allowed, -torch.inf), alpha)  # [batch heads queries keys]
        columns = unflatten(nn.functional.pad(weights, (0, -weights.shape[3] % unit)), 3, (-1, unit)).sum(4)
        if not per_token:
            columns = unflatten(nn.functional.pad(columns, (0, 0, 0, -columns.shape[2] % unit)), 2, (-1, unit)).sum(
                3
            )  # [batch heads rows blocks]
    return gate_loss(block_estimates(config, rows, pooled, gate), columns, limits.allowed & ~limits.forced)


def _module_loss(graft: SparsefinderAttention, data: HeadBatch, gold: Tensor, allowed: Tensor, seed: int) -> Tensor:
    query, key, *_ = projected_points(graft, data)
    distance = buckets.distances(query, key, graft.config.train_distance)
    generator = torch.Generator().manual_seed(seed)
    return projection_loss(
        distance, gold, allowed, loss=graft.config.loss, margin=graft.config.margin, generator=generator
    )
