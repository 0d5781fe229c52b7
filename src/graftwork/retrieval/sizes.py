"""Size of an embedded index, measured on an index of made-up passages."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

from graftwork.retrieval.embedded import build_embedded

PASSAGES, WORDS, VOCABULARY = 1000, 100, 50_000
"""Number of made-up passages, of words in each, and of different words."""


@cache
def bytes_per_passage() -> int:
    """Bytes on disk of one passage of 100 words in an embedded index; words follow Zipf's law as in running text."""
    chance = random.Random(0)
    shares = [1 / rank for rank in range(1, VOCABULARY + 1)]
    drawn = chance.choices(range(VOCABULARY), shares, k=PASSAGES * WORDS)
    with tempfile.TemporaryDirectory() as folder:
        corpus, index = Path(folder) / "passages.tsv", Path(folder) / "index"
        rows = ["id\ttext\ttitle"]
        for number in range(PASSAGES):
            words = drawn[number * WORDS : (number + 1) * WORDS]
            rows.append(f"{number}\t{' '.join(f'w{word:x}' for word in words)}\tw{words[0]:x} w{words[1]:x}")
        corpus.write_text("\n".join(rows) + "\n", encoding="utf-8")
        build_embedded(corpus, index)
        return sum(file.stat().st_size for file in index.rglob("*") if file.is_file()) // PASSAGES
