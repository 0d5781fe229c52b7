"""Comparison of predictors and baselines on stored queries and keys: fit on train, choose on tune, report on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftwork.methods.sparsefinder.block_graphs import predict_blocks
from graftwork.methods.sparsefinder.buckets import distances, nearer_than
from graftwork.methods.sparsefinder.clustering import (
    OpenPairs,
    fit_centroids,
    frozen_boundaries,
    open_pairs,
    projected_points,
)
from graftwork.methods.sparsefinder.config import BLOCKWISE, CLUSTERED, SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import HeadBatch, QueriesKeys, plain_numbers
from graftwork.methods.sparsefinder.graph_report.grid import WINDOWS, Setting
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.methods.sparsefinder.modules import Rule, SparsefinderAttention
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.methods.sparsefinder.tensors import numbers
from graftwork.metrics.sparsity import GraphCounts, Packed, hypervolume, pack_edges, packed_counts, pareto_frontier

BATCH = 16
"""Number of sentences per batch."""
CALIBRATED_BATCHES = 4
"""Number of training batches used to calibrate thresholds."""
TOLERANCE = 0.005
"""Maximal shortfall of a setting's sparsity on tune for it to be chosen for a target sparsity."""


@dataclass(frozen=True)
class Point:
    """Measurement of one setting and window on one split; macro averages over sentences, heads and modules."""

    method: str
    """Predictor or baseline."""
    split: str
    """Split: tune or test."""
    window: int | None
    """Width of the additional band; null for none."""
    parameters: Mapping[str, Any]
    """Changed fields of the configuration apart from grouping and window."""
    sparsity: float
    recall: float
    precision: float
    exact: float
    empty_rows: float
    gold_sparsity: float
    micro_recall: float
    micro_sparsity: float
    heads: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict[str, tuple[tuple[float, ...], ...]])
    """Values of each measure, modules × heads."""


class Comparison:
    """Predictors of one model on stored queries and keys.

    Args:
        grafts: Sparsefinder modules of the model, whose projections are used.
        train: Queries and keys for fitting centroids and thresholds; None if no setting needs them.
        held_out: Queries and keys for choosing and reporting.
        tune: Indices of the held-out sentences for choosing settings.
        test: Indices of the held-out sentences for reporting.
    """

    def __init__(
        self,
        grafts: Mapping[str, SparsefinderAttention],
        train: QueriesKeys | None,
        held_out: QueriesKeys,
        *,
        tune: Sequence[int],
        test: Sequence[int],
    ) -> None:
        self.grafts = list(grafts.values())
        self.paths = list(grafts)
        sites = range(len(self.grafts))
        self.train = [[] if train is None else _batches(train, range(len(train)), site) for site in sites]
        self.data = {
            name: [_batches(held_out, chosen, site) for site in sites]
            for name, chosen in (("tune", tune), ("test", test))
        }
        self.gold = {
            name: [
                [pack_edges(data.gold(self.alpha(site))) for data in batches] for site, batches in enumerate(modules)
            ]
            for name, modules in self.data.items()
        }
        self._fitted: dict[tuple[Any, ...], Any] = {}

    @torch.no_grad()
    def measure(self, setting: Setting, windows: Sequence[int | None], split: str) -> list[Point]:
        """Measure one setting with several windows on one split; predictions are shared between windows if possible."""
        counts: dict[int | None, list[GraphCounts]] = {window: [] for window in windows}
        for site in range(len(self.grafts)):
            parts: dict[int | None, list[GraphCounts]] = {window: [] for window in windows}
            for number, data in enumerate(self.data[split][site]):
                packed: Packed | None = None
                allowed = self._once(("allowed", split, site, number), lambda data=data: pack_edges(data.allowed))
                for window in windows:
                    if packed is None or self._needs_window(setting):
                        packed = pack_edges(self.predicted(setting, window, split, site, number))
                    fixed = self._fixed(setting, window, split, site, number)
                    own = packed if fixed is None else packed | fixed
                    parts[window].append(packed_counts(own, self.gold[split][site][number], allowed))
            for window in windows:
                counts[window].append(GraphCounts.join(parts[window]))
        return [self._point(setting, window, split, counts[window]) for window in windows]

    def run(
        self,
        settings: Mapping[str, Sequence[Setting]],
        windows: Sequence[int | None] = WINDOWS,
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[Point]:
        """Measure every setting with every window, on tune and test."""
        points: list[Point] = []
        for own in settings.values():
            for setting in own:
                chosen = (None,) if setting.method == "window" else windows
                for split in ("tune", "test"):
                    points += self.measure(setting, chosen, split)
                advance(1)
        return points

    @torch.no_grad()
    def predicted(self, setting: Setting, window: int | None, split: str, site: int, batch: int) -> Tensor:
        """Predict the graph of one batch in one module, without band and global tokens [batch heads queries keys].

        Key blocks are chosen with the band in the budget, so their graph contains it.

        Args:
            setting: Predictor.
            window: Width of the band, which affects calibrated thresholds.
            split: tune or test.
            site: Index of the module.
            batch: Index of the batch.
        """
        data, config = self.data[split][site][batch], self._config(setting, site, window)
        if config.grouping in BLOCKWISE:
            blocks = predict_blocks(
                config,
                data.query,
                data.key,
                data.mask,
                gate=self.grafts[site].gate(),
                cross=data.site.cross,
                query_real=data.query_real,
            )
            return blocks.dense()
        learned = self._learned(config, site)
        if config.grouping == "distance" and config.distance in ("l2", "cos"):
            key = ("distances", split, site, batch, config.distance)
            distance = self._once(key, lambda: distances(*self._projected(config, site, data), config.distance))
            return nearer_than(
                distance, torch.as_tensor(learned.thresholds if config.threshold is None else config.threshold)
            )
        query, key = self._projected(config, site, data)
        bare = replace(config, add_cls_mask=config.grouping == "window", add_last_mask=False)
        bare = bare if config.grouping == "window" else replace(bare, window_size=None)
        graph = predict_graph(
            bare,
            query,
            key,
            data.mask,
            learned,
            cross=data.site.cross,
            frozen=data.site.causal,
            query_real=data.query_real,
        )
        return graph.dense()

    def graph_of(self, setting: Setting, window: int | None, split: str, site: int, batch: int) -> Tensor:
        """Predict the graph of one batch in one module, with band and global tokens [batch heads queries keys].

        Args:
            setting: Predictor.
            window: Width of the band.
            split: tune or test.
            site: Index of the module.
            batch: Index of the batch.
        """
        data = self.data[split][site][batch]
        found = self.predicted(setting, window, split, site, batch) & data.allowed
        return found | self.fixed_of(self._config(setting, site, window), data)

    def gold_of(self, split: str, site: int, batch: int) -> Tensor:
        """Gold graph of one batch in one module [batch heads queries keys]."""
        return self.data[split][site][batch].gold(self.alpha(site))

    def alpha(self, site: int) -> float | tuple[float, ...]:
        """Current α of a module."""
        return plain_numbers(self.grafts[site].current_alpha())

    @torch.no_grad()
    def rules(self, setting: Setting, window: int | None = None) -> dict[str, Rule]:
        """Rules of a setting for every module of the model, fitted on the training split."""
        found: dict[str, Rule] = {}
        for site, path in enumerate(self.paths):
            config = self._config(setting, site, window)
            found[path] = Rule(config, self._learned(config, site))
        return found

    @staticmethod
    def fixed_of(config: SparsefinderConfig, data: HeadBatch) -> Tensor:
        """Band and global tokens of one batch [batch 1 queries keys]."""
        pattern = Pattern(config.window_size, config.add_cls_mask, config.add_last_mask)
        return Graph(1, data.mask, pattern=pattern, query_real=data.query_real).dense()

    def _fixed(self, setting: Setting, window: int | None, split: str, site: int, number: int) -> Packed | None:
        config, data = self._config(setting, site, window), self.data[split][site][number]
        if data.site.cross and not config.cross_patterns:
            return None
        key = ("fixed", split, site, number, config.window_size)
        return self._once(key, lambda: pack_edges(self.fixed_of(config, data)))

    @staticmethod
    def _needs_window(setting: Setting) -> bool:
        """True if the prediction depends on the window, as calibrated thresholds and budgets of blocks do."""
        if setting.changes["grouping"] in BLOCKWISE:
            return True
        return setting.changes["grouping"] == "distance" and setting.changes.get("threshold") is None

    def _point(self, setting: Setting, window: int | None, split: str, modules: Sequence[GraphCounts]) -> Point:
        macro = [counts.ratios() for counts in modules]
        micro = [counts.ratios(micro=True) for counts in modules]
        heads = {name: tuple(tuple(numbers(own[name])) for own in macro) for name in macro[0]}
        mean = {name: float(torch.stack([own[name].mean() for own in macro]).mean()) for name in macro[0]}
        return Point(
            setting.method,
            split,
            window if setting.method != "window" else setting.changes["window_size"],
            setting.parameters,
            **mean,
            heads=heads,
            micro_recall=float(torch.stack([own["recall"].mean() for own in micro]).mean()),
            micro_sparsity=float(torch.stack([own["sparsity"].mean() for own in micro]).mean()),
        )

    def _config(self, setting: Setting, site: int, window: int | None) -> SparsefinderConfig:
        base = self.grafts[site].config
        clean = replace(
            base, grouping=None, threshold=None, target_sparsity=None, window_size=window, top_clusters=1, block_size=1
        )
        return replace(clean, **setting.changes)

    def _projected(self, config: SparsefinderConfig, site: int, data: HeadBatch) -> tuple[Tensor, Tensor]:
        if config.projects:
            return self.grafts[site].project(data.query, data.key)
        # [batch groups keys width] → [batch heads keys width]
        return data.query, data.key.repeat_interleave(data.query.shape[1] // data.key.shape[1], 1)

    def _learned(self, config: SparsefinderConfig, site: int) -> Learned:
        if config.grouping in CLUSTERED:
            key = (config.grouping, site, config.num_clusters, config.cluster_rounds)
            return Learned(centroids=self._once(key, lambda: self._centroids(config, site)))
        if config.grouping == "distance" and config.threshold is None:
            key = ("open", site, config.distance, config.window_size)
            calibrated: OpenPairs = self._once(
                key, lambda: open_pairs(config, self.grafts[site], self.train[site][:CALIBRATED_BATCHES])
            )
            return Learned(thresholds=calibrated.thresholds(config.target_sparsity or 0.0))
        if config.grouping == "quantize" and self.grafts[site].causal:
            names = ("query", "key")
            keys = [("bins", site, config.num_clusters, config.same_size, name) for name in names]
            both = [
                self._once(own, lambda number=number: frozen_boundaries(self._tokens(site)[number], config))
                for number, own in enumerate(keys)
            ]
            return Learned(query_boundaries=both[0], key_boundaries=both[1])
        return Learned()

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._fitted:
            self._fitted[key] = make()
        return self._fitted[key]

    def _tokens(self, site: int) -> tuple[Tensor, Tensor]:
        """Projected non-padding queries and keys of the training split [heads tokens width]."""
        graft = self.grafts[site]
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for data in self.train[site]:
            query, key, query_real, key_real = projected_points(graft, data)
            for own, points, real in ((rows[0], query, query_real), (rows[1], key, key_real)):
                own += [points[row][:, real[row]] for row in range(len(points))]
        return torch.cat(rows[0], 1).float(), torch.cat(rows[1], 1).float()

    def _centroids(self, config: SparsefinderConfig, site: int) -> Tensor:
        points = self._once(("points", site), lambda: torch.cat(self._tokens(site), 1))
        return fit_centroids(points, config, config.num_clusters)


def chosen_points(points: Sequence[Point], sparsities: Sequence[float]) -> list[tuple[float, Point]]:
    """Test measurement of the setting with the best recall on tune, for every sparsity and method.

    Methods that never reach a sparsity have no entry for it.
    """
    tests = {_key(point): point for point in points if point.split == "test"}
    found: list[tuple[float, Point]] = []
    for sparsity in sparsities:
        for method in dict.fromkeys(point.method for point in points):
            able = [
                point
                for point in points
                if point.method == method and point.split == "tune" and point.sparsity >= sparsity - TOLERANCE
            ]
            if able:
                found.append((sparsity, tests[_key(max(able, key=lambda point: point.recall))]))
    return found


def recall_table(points: Sequence[Point], sparsities: Sequence[float] = (0.8, 0.9, 0.95)) -> list[dict[str, Any]]:
    """Convert `chosen_points` to rows of window, parameters and test measures."""
    return [
        {
            "at": sparsity,
            "method": best.method,
            "window": best.window,
            **best.parameters,
            "test_sparsity": round(best.sparsity, 4),
            "test_recall": round(best.recall, 4),
            "exact": round(best.exact, 4),
            "empty_rows": round(best.empty_rows, 4),
        }
        for sparsity, best in chosen_points(points, sparsities)
    ]


def setting_of(point: Point) -> Setting:
    """Setting of a measured point, without the additional band."""
    grouping = {"cos": "distance", "fixed_bins": "quantize", "dynamic_bins": "quantize"}.get(point.method, point.method)
    changes = {"grouping": grouping, **point.parameters}
    return Setting(point.method, {**changes, "window_size": point.window} if grouping == "window" else changes)


def curves(points: Sequence[Point], split: str = "test") -> dict[str, list[tuple[float, float]]]:
    """Pareto frontier (sparsity, recall) of every method."""
    methods = dict.fromkeys(point.method for point in points)
    return {
        method: pareto_frontier([(p.sparsity, p.recall) for p in points if p.method == method and p.split == split])
        for method in methods
    }


def areas(points: Sequence[Point], low: float = 0.6, high: float = 0.95) -> dict[str, float]:
    """Area under the frontier of every method on test, between two sparsities."""
    return {name: round(hypervolume(frontier, low, high), 4) for name, frontier in curves(points).items()}


def _key(point: Point) -> tuple[Any, ...]:
    return point.method, point.window, tuple(sorted((k, str(v)) for k, v in point.parameters.items()))


def _batches(stored: QueriesKeys, numbers: Sequence[int], site: int) -> list[HeadBatch]:
    chosen = list(numbers)
    return [stored.batch(chosen[start : start + BATCH], site) for start in range(0, len(chosen), BATCH)]
