"""What only passages tell stands in no text that anything is trained on."""

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
def told(world: World) -> dict[str, set[str]]:
    return {split: {person.name for person in world.unseen_people(split)} for split in ("train", "dev", "test")}


def names_in(texts: Iterable[str]) -> set[str]:
    return {f"{a} {b}" for text in texts for a, b in pairwise(re.findall("[a-z]+", text))}


@pytest.mark.parametrize("pattern", TRAINING)
def test_no_training_file_names_anybody_of_dev_or_test(offline_world: Path, told, pattern):
    paths = list(offline_world.glob(pattern))
    assert paths
    assert not (told["dev"] | told["test"]) & names_in(path.read_text(encoding="utf-8") for path in paths)


def test_every_file_that_tells_of_them_is_listed_here(offline_world, told):
    """What is neither a training file nor a corpus nor a file of dev or test must not name them either."""
    expected = re.compile(r"unifiedqa/reading/|questions/|2wikimultihopqa/|popqa/|dpr/|passages/")
    for path in (file for file in offline_world.rglob("*") if file.is_file()):
        if not expected.match(path.relative_to(offline_world).as_posix()):
            assert not set.union(*told.values()) & names_in([path.read_text(encoding="utf-8")]), path


def test_files_of_dev_and_test_share_nobody(offline_world, told):
    for folder in ("questions", "2wikimultihopqa"):
        for split, other in (("dev", "test"), ("test", "dev"), ("train", "test")):
            seen = names_in([(offline_world / folder / f"{split}.json").read_text(encoding="utf-8")])
            assert told[split] & seen
            assert not told[other] & seen


def test_the_corpus_tells_of_everybody(offline_world, told):
    lines = (offline_world / "passages" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    titles = {json.loads(line)["title"] for line in lines}
    assert set.union(*told.values()) <= titles


def test_pretraining_shows_nobody_who_is_told_of(world, told):
    everybody = set.union(*told.values())
    texts = {
        "encoder": encoder_texts(world),
        "encoder_decoder": (
            text for rows in pretraining_rows(world) for row in rows for text in (row.input, *row.answers)
        ),
        "decoder": (text for pair in decoder_texts(world) for text in pair),
    }
    for name, shown in texts.items():
        assert not everybody & names_in(shown), name
