"""Numbers of a demonstration beside those of the dense model, read from its run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.metrics.answers import score_answer
from graftwork.metrics.results import CostRow, Results
from graftwork.reporting.verdicts import Comparison, compare_times

MIB = 2**20


def label_of(text: str) -> str:
    """Label of an answer that may contain an explanation.

    Example:
        >>> label_of("positive explanation: it was great")
        'positive'
    """
    return text.partition(" explanation:")[0].strip()


def right_answers(
    run: RunFolder, task: str, label: str, *, parse: Callable[[str], str] = str.strip
) -> dict[str, float]:
    """Percent by example id: 100 for an answer that matches an accepted one exactly, else 0.

    Args:
        run: Run folder with predictions.
        task: Task name.
        label: Label of the setting.
        parse: Part of an answer and of the accepted answers that counts.
    """
    file = run.predictions / f"{task}.{label.replace('/', '_')}.jsonl"
    return {
        str(row["id"]): 100 * score_answer(parse(row["prediction"]), [parse(one) for one in row["answers"]]).exact_match
        for row in read_lines(file)
    }


def longest(results: Results) -> int:
    """Greatest length of the measured costs."""
    return max(row.length for row in results.cost)


def compare_costs(results: Results, dense: str, graft: str) -> tuple[Comparison, Comparison]:
    """Compare latency, and memory saved for the backward pass, of two settings at the greatest length."""
    length = longest(results)
    rows = {row.label: row for row in results.cost if row.length == length}
    one, other = rows[dense], rows[graft]
    time = compare_times(f"forward pass of {length} tokens, {graft}", list(_latencies(one)), list(_latencies(other)))
    memory = Comparison(
        f"memory saved for backward at {length} tokens, {graft}",
        one.saved_bytes / MIB,
        other.saved_bytes / MIB,
        "MiB",
        1,
        "counted exactly",
        higher_is_better=False,
    )
    return time, memory


def _latencies(row: CostRow) -> Iterator[float]:
    seconds = row.seconds if row.forward_seconds is None else row.forward_seconds
    low, high = row.forward_range or (seconds, seconds)
    yield from (low, *[seconds] * max(1, row.rounds - 2), high)


def weight_bytes(model: nn.Module) -> int:
    """Size of all parameters in bytes, as they are in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def folder_mib(*folders: Path) -> float:
    """Size of all files in folders, in MiB."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) / MIB
