"""Augmented questions: stable ids, slices, resuming, leakage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.retrieval import Hit
from graftwork.tasks import get_task
from graftwork.tasks.augmentation import augment, check_leakage, merge_augmented, read_augmented
from graftwork.tasks.multihop import DATASETS

HOTPOT = DATASETS["hotpotqa"]


class Shelf:
    """Retriever whose passages name their question; question 3 has no hit."""

    def __init__(self, name: str = "shelf", stop_after: int | None = None) -> None:
        self.name, self.stop_after, self.asked = name, stop_after, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        found = []
        for query in queries:
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            count = 0 if "3" in query else k
            found.append([Hit(f"{query}-{n}", "T", f"about {query} {n}", 1.0 / (n + 1), n) for n in range(count)])
        return found

    def index_fingerprint(self) -> str:
        return self.name


@pytest.fixture
def data(write: Callable[..., Path], tmp_path: Path) -> Path:
    rows = [{"_id": f"id{n}", "question": f"Q{n}?", "answer": f"a{n}"} for n in range(5)]
    write("raw/hotpotqa/hotpot_dev_distractor_v1.json", json.dumps(rows))
    return tmp_path / "raw"


def ids(path: Path) -> list[int]:
    return [row["test_id"] for row in json.loads(path.read_text())]


def test_a_slice_keeps_the_ids_of_the_split_and_slices_can_be_merged(data: Path, tmp_path: Path):
    slices = []
    for start, end in ((0, 2), (2, 5)):
        slices.append(
            augment(HOTPOT, data, tmp_path / f"{start}.json", Shelf(), split="dev", start=start, end=end).path
        )
    whole = augment(HOTPOT, data, tmp_path / "whole.json", Shelf(), split="dev")
    assert ids(slices[1]) == [2, 3, 4]
    merge_augmented(slices[::-1], tmp_path / "merged.json")
    assert (tmp_path / "merged.json").read_text() == (tmp_path / "whole.json").read_text()
    assert (whole.questions, whole.passages, whole.without_passages) == (5, 12, 1)
    with pytest.raises(DataError, match="test_id 2 again"):
        merge_augmented([*slices, slices[1]], tmp_path / "twice.json")
    last = augment(HOTPOT, data, tmp_path / "last.json", Shelf(), split="dev", start=4).path
    with pytest.raises(DataError, match="no question 2, 3"):
        merge_augmented([slices[0], last], tmp_path / "gap.json")
    assert merge_augmented([slices[0], last], tmp_path / "gap.json", allow_gaps=True).questions == 3
    other = augment(HOTPOT, data, tmp_path / "other.json", Shelf("other"), split="dev", start=2, end=4).path
    with pytest.raises(DataError, match="2 different indexes"):
        merge_augmented([slices[0], other], tmp_path / "mixed.json")


def test_records_name_their_retriever_and_are_never_padded(data: Path, tmp_path: Path):
    augment(HOTPOT, data, tmp_path / "dev.json", Shelf(), split="dev", top_k=2)
    rows = json.loads((tmp_path / "dev.json").read_text())
    assert rows[0] == {
        "test_id": 0,
        "question": "Q0?",
        "answer": "a0",
        "question_id": "id0",
        "passages": ["about Q0? 0", "about Q0? 1"],
        "passage_ids": ["Q0?-0", "Q0?-1"],
        "titles": ["T", "T"],
        "scores": [1.0, 0.5],
        "retriever": {"engine": "embedded", "fingerprint": "shelf"},
    }
    assert rows[3]["passages"] == []


def test_an_interrupted_augmentation_resumes(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("graftwork.tasks.augmentation.QUESTIONS_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        augment(HOTPOT, data, tmp_path / "dev.json", Shelf(stop_after=3), split="dev")
    assert not (tmp_path / "dev.json").exists()
    with pytest.raises(DataError, match="another top_k"):
        augment(HOTPOT, data, tmp_path / "dev.json", Shelf(), split="dev", top_k=1)
    part = tmp_path / ".dev.json.part.jsonl"
    part.write_bytes(part.read_bytes() + b'{"torn')
    rest = Shelf()
    augment(HOTPOT, data, tmp_path / "dev.json", rest, split="dev")
    assert rest.asked == 2
    augment(HOTPOT, data, tmp_path / "straight.json", Shelf(), split="dev")
    assert (tmp_path / "dev.json").read_text() == (tmp_path / "straight.json").read_text()
    assert not part.exists()


def test_progress_counts_the_questions_that_are_searched(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("graftwork.tasks.augmentation.QUESTIONS_AT_ONCE", 2)
    counts: list[int] = []
    augment(HOTPOT, data, tmp_path / "dev.json", Shelf(), split="dev", progress=counts.append)
    assert counts == [2, 2, 1]


@pytest.mark.parametrize(("start", "end"), [(3, 3), (4, 2), (5, None)])
def test_an_empty_slice_is_refused(data: Path, tmp_path: Path, start, end):
    with pytest.raises(ConfigError, match="0 ≤ start < end"):
        augment(HOTPOT, data, tmp_path / "dev.json", Shelf(), split="dev", start=start, end=end)


def test_leakage_from_evaluation_questions_is_refused(write):
    train = write(
        "train.json",
        json.dumps(
            [
                {"test_id": 7, "question": "Who  is THE cat?", "answer": "x", "passages": []},
                {"test_id": 8, "question": "Other?", "answer": "x", "passages": [], "question_id": "q8"},
            ]
        ),
    )
    apart = [{"test_id": 7, "question": "Something else?", "answer": "x", "passages": [], "question_id": "q9"}]
    check_leakage(train, [write("fine.json", json.dumps(apart))])
    for row in ({"question": "who is cat"}, {"question": "Reworded?", "question_id": "q8"}):
        dev = write("dev.json", json.dumps([{**apart[0], **row}]))
        with pytest.raises(DataError, match="shares 1 questions"):
            check_leakage(train, [dev])


def test_padding_of_the_original_files_is_dropped(write, tmp_path: Path):
    row = {"test_id": 500, "question": "Q?", "answer": ["a", "b"], "passages": ["one", "", ""]}
    write("hotpotqa/dev.json", json.dumps([row]))
    (example,) = get_task("multihop/hotpotqa").load(tmp_path, "dev").rows
    assert (example.key, example.answers, example.metadata["passages"]) == ("500", ("a", "b"), ("one",))
    assert read_augmented(tmp_path / "hotpotqa" / "dev.json")[0]["test_id"] == 500
