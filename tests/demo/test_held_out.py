"""Facts about unseen people are in no training text."""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from graftwork.demo.pretraining.decoder import decoder_texts
from graftwork.demo.pretraining.encoder import encoder_texts
from graftwork.demo.pretraining.encoder_decoder import pretraining_rows
from graftwork.demo.world.world import World, build_world

TRAINING = (
    "unifiedqa/*/train.tsv",
    "unifiedqa/*/train_ans.jsonl",
    "text/train.txt",
    "wikitext/wiki.train.raw",
    "esnli/esnli_train_*.csv",
    "eraser_movies/train.jsonl",
    "eraser_movies/docs/*_train_*.txt",
    "aclImdb/train/*/*.txt",
    "glue/SST-2/train.tsv",
    "questions/train.json",
    "2wikimultihopqa/train.json",
)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def unseen(world: World) -> dict[str, set[str]]:
    return {split: {person.name for person in world.unseen_people(split)} for split in ("train", "dev", "test")}


def names_in(texts: Iterable[str]) -> set[str]:
    return {f"{a} {b}" for text in texts for a, b in pairwise(re.findall("[a-z]+", text))}


@pytest.mark.parametrize("pattern", TRAINING)
def test_training_files_do_not_contain_people_of_dev_or_test(offline_world: Path, unseen, pattern):
    paths = list(offline_world.glob(pattern))
    assert paths
    assert not (unseen["dev"] | unseen["test"]) & names_in(path.read_text(encoding="utf-8") for path in paths)


def test_unseen_people_occur_only_in_the_listed_files(offline_world, unseen):
    """Only corpora and question files mention unseen people."""
    expected = re.compile(r"unifiedqa/reading/|questions/|2wikimultihopqa/|popqa/|dpr/|passages/")
    for path in (file for file in offline_world.rglob("*") if file.is_file()):
        if not expected.match(path.relative_to(offline_world).as_posix()):
            assert not set.union(*unseen.values()) & names_in([path.read_text(encoding="utf-8")]), path


def test_files_of_different_splits_share_no_people(offline_world, unseen):
    for folder in ("questions", "2wikimultihopqa"):
        for split, other in (("dev", "test"), ("test", "dev"), ("train", "test")):
            seen = names_in([(offline_world / folder / f"{split}.json").read_text(encoding="utf-8")])
            assert unseen[split] & seen
            assert not unseen[other] & seen


def test_the_corpus_contains_all_unseen_people(offline_world, unseen):
    lines = (offline_world / "passages" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    titles = {json.loads(line)["title"] for line in lines}
    assert set.union(*unseen.values()) <= titles


def test_pretraining_texts_contain_no_unseen_people(world, unseen):
    everybody = set.union(*unseen.values())
    texts = {
        "encoder": encoder_texts(world),
        "encoder_decoder": (
            text for rows in pretraining_rows(world) for row in rows for text in (row.input, *row.answers)
        ),
        "decoder": (text for pair in decoder_texts(world) for text in pair),
    }
    for name, shown in texts.items():
        assert not everybody & names_in(shown), name
