"""Movies and entailment pairs, small enough to be memorised."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

# words that are single tokens of the shipped tokenizer, for short texts
GOOD = ["a great film", "the best of all", "good and better", "a feast"]
BAD = ["a bad film", "anything but good", "not the best", "could be better"]
FILLER = (
    "the doctor gives the dog to the baker and the cook comes home after the fair , "
    "then the hunter had another horse and the cat goes away before the concert"
)


def review(generator: random.Random, positive: bool) -> tuple[str, list[tuple[int, int, str]]]:
    words: list[str] = []
    filler = FILLER.split()
    marks = []
    for snippet in generator.sample(GOOD if positive else BAD, 2):
        start = generator.randrange(len(filler) - 6)
        words += filler[start : start + generator.randint(3, 6)]
        own = snippet.split()
        marks.append((len(words), len(words) + len(own), snippet))
        words += [*own, "."]
    return " ".join(words), marks


@pytest.fixture(scope="session")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder with 32 reviews that are both training and validation data."""
    data = tmp_path_factory.mktemp("explained")
    folder = data / "movies"
    (folder / "docs").mkdir(parents=True)
    generator = random.Random(0)
    lines = []
    for number in range(32):
        positive = number >= 16
        key = f"{'pos' if positive else 'neg'}R_{number:03}.txt"
        text, marks = review(generator, positive)
        (folder / "docs" / key).write_text(text)
        evidences = [
            [{"text": words, "docid": key, "start_token": start, "end_token": end}] for start, end, words in marks
        ]
        label = "POS" if positive else "NEG"
        lines.append({"annotation_id": key, "classification": label, "query": "Q", "evidences": evidences})
    for name in ("train.jsonl", "val.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data
