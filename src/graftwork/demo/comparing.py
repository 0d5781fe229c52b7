"""Numbers of a demonstration beside those of the dense model, read from its run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.metrics.answers import score_answer
from graftwork.reporting.verdicts import MIB


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


def weight_bytes(model: nn.Module) -> int:
    """Size of all parameters in bytes, as they are in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def folder_mib(*folders: Path) -> float:
    """Size of all files in folders, in MiB."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) / MIB
