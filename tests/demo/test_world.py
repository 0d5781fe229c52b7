"""The offline world is deterministic, has valid files, and its splits are disjoint."""

import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from graftwork.demo.world.questions import SEPARATOR, UNIFIEDQA, text_lines
from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import SPLITS, World, build_world
from graftwork.demo.world.writers import write_world

PRINT_DIGEST = """
import sys
from hashlib import sha256
from pathlib import Path
from graftwork.demo.world.world import build_world
from graftwork.demo.world.writers import write_world
paths = write_world(build_world(int(sys.argv[2])), Path(sys.argv[1]))
assert "torch" not in sys.modules
digest = sha256()
for path in sorted(Path(sys.argv[1]).rglob("*.*")):
    digest.update(path.read_bytes())
print(len(paths), digest.hexdigest())
"""


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    write_world(world, out)
    return out


def digest_in_new_process(out: Path, hash_seed: str, seed: int = 0) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", PRINT_DIGEST, str(out), str(seed)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.long
def test_the_written_world_is_equal_in_every_process(tmp_path):
    first = digest_in_new_process(tmp_path / "a", "1")
    assert first == digest_in_new_process(tmp_path / "b", "2")
    assert first != digest_in_new_process(tmp_path / "c", "1", seed=1)


def test_seed_0_gives_the_pretraining_data_of_the_shipped_models(world):
    learned = json.dumps([row.input + row.answers[0] for name in UNIFIEDQA for row in UNIFIEDQA[name](world, "train")])
    assert hashlib.sha256(learned.encode()).hexdigest()[:16] == "644fa0c36bc54da0"


def test_names_are_unique_and_lower_case(world):
    for entities in (world.people, world.places, world.employers, world.events):
        names = [entity.name for entity in entities]
        assert len(set(names)) == len(names)
        assert all(name == name.lower() for name in names)


def test_values_are_in_the_pool_of_their_relation(world):
    assert {fact.relation for fact in world.known_facts} == set(RELATIONS)
    for fact in world.known_facts:
        assert fact.value in world.pool(fact.relation)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", UNIFIEDQA)
def test_files_are_in_unifiedqa_format(folder, name, split):
    lines = (folder / "unifiedqa" / name / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    answers = (folder / "unifiedqa" / name / f"{split}_ans.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(answers) >= 40
    for line, acceptable in zip(lines, answers, strict=True):
        question, answer = line.split("\t")
        assert line == line.lower().strip()
        assert question.count(SEPARATOR) == (name in ("choice", "reading"))
        assert json.loads(acceptable)[0] == answer


def test_text_files_have_one_sentence_per_line(folder):
    for split in ("train", "dev"):
        lines = (folder / "text" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) > 100
        assert all(line.endswith(".") and line.count(".") == 1 for line in lines)


@pytest.mark.parametrize("split", SPLITS)
def test_choice_questions_have_four_distinct_options_with_the_answer(world, split):
    for row in UNIFIEDQA["choice"](world, split):
        options = [part.split(") ")[1].strip() for part in row.rest.split("(")[1:]]
        assert len(set(options)) == 4
        assert row.answers[0] in options


@pytest.mark.parametrize("split", SPLITS)
def test_yes_and_no_are_equally_frequent(world, split):
    answers = [row.answers for row in UNIFIEDQA["yesno"](world, split)]
    assert answers.count(("yes",)) == answers.count(("no",)) == len(answers) / 2


@pytest.mark.parametrize("split", SPLITS)
def test_reading_answers_occur_in_the_passage(world, split):
    for row in UNIFIEDQA["reading"](world, split):
        assert row.answers[0] in row.rest
        assert row.rest.startswith("(")


@pytest.mark.parametrize("name", UNIFIEDQA)
def test_splits_share_no_question(world, name):
    train, dev, test = ({row.question for row in UNIFIEDQA[name](world, split)} for split in SPLITS)
    assert not train & dev
    assert not train & test
    assert not dev & test


def test_choice_questions_of_train_are_not_fact_questions_of_dev(world):
    shown = {row.question for name in ("facts", "choice") for row in UNIFIEDQA[name](world, "train")}
    assert not shown & {row.question for row in UNIFIEDQA["facts"](world, "dev")}


def test_sentences_of_dev_are_not_in_train(world):
    assert not set(text_lines(world, "train")) & set(text_lines(world, "dev"))


def test_unseen_people_appear_in_passages_only(world):
    unseen = {person.name for person in world.people if person.unseen}
    texts = [line for split in SPLITS for line in text_lines(world, split)]
    texts += [row.input for name in UNIFIEDQA if name != "reading" for s in SPLITS for row in UNIFIEDQA[name](world, s)]
    assert not unseen & {pair for text in texts for pair in pairs_of_words(text)}


@pytest.mark.parametrize("split", SPLITS)
def test_passages_of_a_split_are_about_its_own_people(world, split):
    unseen = {person.name for person in world.people if person.unseen}
    seen = {pair for row in UNIFIEDQA["reading"](world, split) for pair in pairs_of_words(row.input)}
    assert unseen & seen == {person.name for person in world.unseen_people(split)}


def test_facts_asked_in_dev_are_asked_with_other_templates_in_train(world):
    questions = {split: {row.question for row in UNIFIEDQA["facts"](world, split)} for split in SPLITS}
    for fact in world.known_facts:
        wordings = {ask.format(s=fact.subject) for ask in RELATIONS[fact.relation].ask}
        assert len(wordings & questions["train"]) >= len(wordings) - 1


def pairs_of_words(text: str) -> set[str]:
    return {" ".join(pair) for pair in pairwise(re.findall("[a-z]+", text))}
