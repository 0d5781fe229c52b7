"""Measured figures of `measured.json` as tables: the README and the cards show the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")


def figures() -> list[dict[str, Any]]:
    """Every measured figure, in the order of the README."""
    return json.loads(FILE.read_text(encoding="utf-8"))["figures"]


def shown(ratios: list[float]) -> str:
    """A ratio, or the range of several."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def every_ratio(figure: Mapping[str, Any]) -> list[float]:
    """Ratios of all runs, with any number of threads, on every machine."""
    return [*figure.get("earlier", ()), *(one for runs in figure["ratios"].values() for one in runs)]


def readme_table() -> str:
    """Table of the figures with a label."""
    lines = ["| measurement | baseline | time | saved MiB | command |", "|---|---|---|---|---|"]
    script = ""
    for figure in figures():
        if figure["label"] is None:
            continue
        command = figure.get("command") or (figure["script"] if figure["script"] != script else "the same")
        script = figure.get("script", "")
        time = figure.get("shown") or f"{shown(every_ratio(figure))} ×"
        saved = " / ".join(map(str, figure.get("saved_mib", ())))
        cells = (figure["label"], figure["baseline"], time, saved, command if command == "the same" else f"`{command}`")
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def feed_forward_table() -> str:
    """Table of the feed-forward layers on the card of topk."""
    return _table("topk_feed_forward", "tokens × d_ff", "dense", "checkpointed", "checkpointed dense: time, saved")


def attention_table() -> str:
    """Table of attention on the card of topk."""
    return _table("topk_attention", "tokens", "SDPA", "eager", "eager dense: time / SDPA, saved")


def _table(kind: str, setting: str, baseline: str, further: str, heading: str) -> str:
    titles = (
        setting,
        f"time / {baseline}, one thread",
        "two threads",
        "earlier machines, two threads",
        f"saved MiB, ours / {baseline}",
        f"peak MiB, ours / {baseline}",
        heading,
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows = {
        tuple(int(word) for word in figure["arguments"].split() if word.isdigit()): figure
        for figure in figures()
        if figure["id"].startswith(kind)
    }
    for sizes, figure in sorted(rows.items()):
        runs = [figure["ratios"].get("1", []), figure["ratios"].get("2", []), figure["earlier"]]
        cells = (
            " × ".join(f"{size:,}" for size in sizes),
            *(shown(one) if one else "not run" for one in runs),
            " / ".join(map(str, figure["saved_mib"])),
            " / ".join(map(str, figure["peak_mib"])),
            figure[further],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
