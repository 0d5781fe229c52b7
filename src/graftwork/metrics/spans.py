"""Metrics of extractive explanations: predicted spans against gold spans, by token and by span."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

from graftwork.errors import DataError, MissingExtraError
from graftwork.metrics.classification import accuracy

Span = tuple[int, int]
"""Half-open interval of positions, [start, end)."""

_TARGET_KEYS = {"label", "overlap_spans", "span_array", "explanations", "unmatched", "gold_unmatched", "characters"}


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sort spans and merge overlapping ones; adjacent spans are kept separate.

    Example:
        >>> merge_spans([(5, 8), (0, 2), (1, 3), (3, 4)])
        ((0, 3), (3, 4), (5, 8))
    """
    merged: list[Span] = []
    for start, end in sorted(set(spans)):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def harmonic_mean(precision: float, recall: float) -> float:
    """F1 = 2·P·R / (P + R); 0 if either is 0."""
    return 2 * precision * recall / (precision + recall) if precision > 0 and recall > 0 else 0.0


def set_scores(gold: AbstractSet[Hashable], predicted: AbstractSet[Hashable]) -> tuple[float, float, float]:
    """Precision |G ∩ P| / |P|, recall |G ∩ P| / |G| and F1 of a predicted set; 0 for an empty denominator."""
    common = len(gold & predicted)
    precision = common / len(predicted) if predicted else 0.0
    recall = common / len(gold) if gold else 0.0
    return precision, recall, harmonic_mean(precision, recall)


def marked(array: Sequence[int]) -> set[int]:
    """Positions of the nonzero entries."""
    return {position for position, value in enumerate(array) if value}


def extractive_explanations_metric(
    targets: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    *,
    mode: Literal["fixed", "reference"] = "fixed",
) -> dict[str, float | None]:
    """Label accuracy, span F1 and token F1 of extractive explanations.

    Source: Narang et al. 2020; `partial match f1` is the token F1 of the paper's tables.

    Differs from the authors' code in fixed mode: examples without a gold rationale are excluded from the F1 means
    instead of scoring 0, empty arrays are accepted, and more numbers are returned.

    Args:
        targets: `label`, `overlap_spans`, `span_array` of each example.
        predictions: The same keys, and the generated `explanations`.
        mode: "reference" reproduces the values and keys of the authors' code.

    Raises:
        DataError: If the lists have different lengths or an entry holds an unknown key.
    """
    _check(targets, predictions)
    pairs = list(zip(targets, predictions, strict=True))
    counts = [len(prediction.get("explanations", ())) for prediction in predictions]
    result: dict[str, float | None] = {"accuracy": accuracy(_labels(targets), _labels(predictions))}
    scored = [
        (set_scores(_spans(target), _spans(prediction)), set_scores(*_marks(target, prediction)))
        for target, prediction in pairs
        if mode == "reference" or _has_gold(target)
    ]
    result["f1"] = _percent([spans[2] for spans, _ in scored])
    result["partial match f1"] = _percent([tokens[2] for _, tokens in scored])
    result["avg_explanation_count"] = sum(counts) / len(counts) if counts else 0.0
    if mode == "reference":
        return result
    unmatched = sum(prediction.get("unmatched", 0) for prediction in predictions)
    generated = unmatched + sum(counts)
    with_gold = [(target, prediction) for target, prediction in pairs if _has_gold(target)]
    gold = [_spans(target) for target, _ in with_gold]
    found = [_spans(prediction) for _, prediction in with_gold]
    return {
        **result,
        "span_f1": result["f1"],
        "token_f1": result["partial match f1"],
        "token_precision": _percent([tokens[0] for _, tokens in scored]),
        "token_recall": _percent([tokens[1] for _, tokens in scored]),
        "chance_token_f1": chance_token_f1([target for target, _ in with_gold]),
        "iou_f1": 100 * iou_scores(gold, found)["macro"]["f1"] if with_gold else None,
        "unmatched_rate": 100 * unmatched / generated if generated else None,
        "spans_found": 100 * (generated - unmatched) / generated if generated else None,
        "gold_unmatched": sum(target.get("gold_unmatched", 0) for target in targets),
        "n_without_gold": len(pairs) - len(with_gold),
    }


def chance_token_f1(targets: Sequence[Mapping[str, Any]], *, draws: int = 50, seed: int = 0) -> float | None:
    """Chance level of token F1: spans of the gold number and lengths at uniformly random positions.

    Compare token F1 with this baseline; it is high if rationales cover much of a text.

    Args:
        targets: `overlap_spans` and `span_array` of each example.
        draws: Number of random placements per example.
        seed: Seed of the placements.

    Returns:
        Mean over examples and placements, in percent; None without examples.
    """
    generator = random.Random(seed)
    scores: list[float] = []
    for target in targets:
        gold, length = marked(target["span_array"]), len(target["span_array"])
        lengths = [min(end - start, length) for start, end in _spans(target)]
        for _ in range(draws):
            starts = [generator.randrange(length - own + 1) for own in lengths]
            placed = {start + i for start, own in zip(starts, lengths, strict=True) for i in range(own)}
            scores.append(set_scores(gold, placed)[2])
    return _percent(scores)


def iou_scores(
    gold: Sequence[set[Span]], predicted: Sequence[set[Span]], *, threshold: float = 0.5
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of spans; a predicted span is correct if its IoU with a gold span reaches the threshold.

    Source: DeYoung et al. 2020, ERASER: several predictions may match one gold span, and macro F1 is computed from mean
    precision and mean recall.

    Args:
        gold: Gold spans of each example.
        predicted: Predicted spans of each example.
        threshold: Minimum intersection over union.

    Returns:
        `precision`, `recall` and `f1` in 0…1, under `micro` and `macro`.
    """
    hits = [
        sum(max((_overlap(span, other) for other in right), default=0.0) >= threshold for span in wrong)
        for right, wrong in zip(gold, predicted, strict=True)
    ]
    total_predicted, total_gold = sum(map(len, predicted)), sum(map(len, gold))
    precisions = [hit / len(found) for hit, found in zip(hits, predicted, strict=True) if found]
    recalls = [hit / len(right) for hit, right in zip(hits, gold, strict=True) if right]
    micro = (_share(sum(hits), total_predicted), _share(sum(hits), total_gold))
    macro = (_share(sum(precisions), len(precisions)), _share(sum(recalls), len(recalls)))
    return {
        name: {"precision": precision, "recall": recall, "f1": harmonic_mean(precision, recall)}
        for name, (precision, recall) in (("micro", micro), ("macro", macro))
    }


def token_scores(gold: Sequence[set[Span]], predicted: Sequence[set[Span]]) -> dict[str, dict[str, float]]:
    """Token precision, recall and F1: micro over the corpus, and macro over examples.

    Source: DeYoung et al. 2020, ERASER.
    """
    pairs = [(_expand(right), _expand(found)) for right, found in zip(gold, predicted, strict=True)]
    common = sum(len(right & found) for right, found in pairs)
    precision = _share(common, sum(len(found) for _, found in pairs))
    recall = _share(common, sum(len(right) for right, _ in pairs))
    each = [set_scores(right, found) for right, found in pairs]
    names = ("precision", "recall", "f1")
    return {
        "micro": dict(zip(names, (precision, recall, harmonic_mean(precision, recall)), strict=True)),
        "macro": {name: _share(sum(scores[i] for scores in each), len(each)) for i, name in enumerate(names)},
    }


def ranking_scores(gold: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """AUPRC, average precision and ROC AUC of real-valued token scores, averaged over examples.

    Source: DeYoung et al. 2020, ERASER, whose AUPRC is the area under scikit-learn's precision–recall curve.

    Args:
        gold: 0 or 1 per token of each example.
        scores: Score per token of each example.

    Returns:
        Means over the examples with both gold and other tokens; None without such examples.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn import metrics  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("scikit-learn", "wt5") from None
    sklearn: Any = metrics
    rows: list[tuple[float, float, float]] = []
    for truth, values in zip(gold, scores, strict=True):
        if len(set(truth)) < 2:
            continue
        precision, recall, _ = sklearn.precision_recall_curve(truth, values)
        average, area = sklearn.average_precision_score(truth, values), sklearn.roc_auc_score(truth, values)
        rows.append((float(sklearn.auc(recall, precision)), float(average), float(area)))
    names = ("auprc", "average_precision", "roc_auc")
    return {name: sum(row[i] for row in rows) / len(rows) if rows else None for i, name in enumerate(names)}


def _check(targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> None:
    if len(targets) != len(predictions) or not targets:
        raise DataError(f"Found {len(predictions)} predictions for {len(targets)} targets; expected one for each.")
    if unknown := sorted({key for entry in (*targets, *predictions) for key in entry} - _TARGET_KEYS):
        raise DataError(f"Found the key {unknown[0]!r}; expected only {', '.join(sorted(_TARGET_KEYS))}.")


def _labels(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return [entry["label"] for entry in entries]


def _spans(entry: Mapping[str, Any]) -> set[Span]:
    return {(start, end) for start, end in entry["overlap_spans"]}


def _marks(target: Mapping[str, Any], prediction: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    return marked(target["span_array"]), marked(prediction["span_array"])


def _has_gold(target: Mapping[str, Any]) -> bool:
    return bool(target["overlap_spans"]) or any(target["span_array"])


def _overlap(one: Span, other: Span) -> float:
    common = min(one[1], other[1]) - max(one[0], other[0])
    union = max(one[1], other[1]) - min(one[0], other[0])
    return common / union if common > 0 else 0.0


def _expand(spans: set[Span]) -> set[int]:
    return {position for start, end in spans for position in range(start, end)}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
