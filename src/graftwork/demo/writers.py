"""Writers that put the offline world on disk, in the formats that the readers of real data sets read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from graftwork.demo.questions import UNIFIEDQA, text_lines
from graftwork.demo.world import SPLITS, World


def write_unifiedqa(world: World, out: Path) -> list[Path]:
    """Write `unifiedqa/<dataset>/<split>.tsv` and `<split>_ans.jsonl` below a folder.

    Returns:
        The TSV files.
    """
    written = []
    for name, rows_of in UNIFIEDQA.items():
        folder = out / "unifiedqa" / name
        for split in SPLITS:
            rows = rows_of(world, split)
            _write_lines(folder / f"{split}_ans.jsonl", [json.dumps(row.answers) for row in rows])
            written.append(_write_lines(folder / f"{split}.tsv", [f"{row.input}\t{row.answers[0]}" for row in rows]))
    return written


def write_text(world: World, out: Path) -> list[Path]:
    """Write `text/train.txt` and `text/dev.txt` below a folder, one sentence a line."""
    return [_write_lines(out / "text" / f"{split}.txt", text_lines(world, split)) for split in ("train", "dev")]


def write_world(world: World, out: Path) -> list[Path]:
    """Write every format below a folder."""
    return [path for write in (write_unifiedqa, write_text) for path in write(world, out)]


def _write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path
