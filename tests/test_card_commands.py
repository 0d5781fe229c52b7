"""Every row of the card section "From the paper's commands to ours" is executed with tiny models and data."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
from filelock import FileLock

from card_commands.execute import execute
from card_commands.rows import NOT_RUN, SIZES, Executed, Row, normal, rows_of, uncovered
from card_commands.workspaces import WORKSPACES
from fake_elasticsearch import FakeElasticsearch
from graftwork.demo import shipped_model
from graftwork.methods import NAMES

SCRIPTS = Path(__file__).parent / "card_commands"
CARDS = {
    name: Path(str(files(NAMES.get(name).__module__.rpartition(".")[0]) / "README.md")).read_text(encoding="utf-8")
    for name in NAMES
}
ROWS = [
    pytest.param(row, id=f"{name}-{number}-{row.theirs[:40]}")
    for name, card in CARDS.items()
    for number, row in enumerate(rows_of(name, card), start=1)
]


@cache
def known_names() -> tuple[str, ...]:
    """Names of all tasks, mixtures, recipes and commands."""
    from graftwork.cli.app import app, command_line
    from graftwork.settings.recipe import recipe_names
    from graftwork.tasks import MIXTURES, TASKS

    command_line(["convert"])
    verbs = [command.name or "" for command in app.registered_commands]
    return (*TASKS, *MIXTURES, *recipe_names(), *verbs)


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """Run in a separate folder with a fake hub and a fake Elasticsearch, and restore the process state afterwards."""
    import datasets
    from transformers.utils import logging as transformers_logging

    rows = datasets.Dataset.from_dict({"sentence": ["w4 w5", "w6"], "text": ["w4 w5", "w6"], "label": [0, 1]})
    server = FakeElasticsearch()
    level, handlers, verbosity = logging.root.level, list(logging.root.handlers), transformers_logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets, "load_dataset", lambda *words, **options: rows)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRAFTWORK_ELASTICSEARCH_URL", server.url)
        environment = dict(os.environ)
        yield
        for name in set(os.environ) - set(environment):
            del os.environ[name]
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
    server.close()


def execute_card(folder: Path, card: str, world: Path) -> Executed:
    """Execute the script of a card."""
    from graftwork.methods.sparsefinder import legacy
    from graftwork.tasks.prepare import prepare

    WORKSPACES[card](folder)
    if card == "regrad":
        table = (world / "dpr" / "psgs_w100.tsv").read_bytes()
        (folder / "psgs_w100.tsv.gz").write_bytes(gzip.compress(table))
    variables = {
        "WORLD": str(world),
        "MODEL": shipped_model("encoder_decoder"),
        "DECODER": shipped_model("decoder"),
    }
    names = {"Path": Path, "legacy": legacy, "prepare": prepare, "shutil": shutil}
    with isolated(folder):
        return execute(SCRIPTS / f"{card}.txt", variables, names)


@pytest.fixture(scope="session")
def executed(offline_world: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """Executed commands by card; each script runs once for all tests and worker processes."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.mktemp("cards")

    @cache
    def once(card: str) -> Executed:
        file = folder / f"card-{card}.json"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                found = execute_card(tmp_path_factory.mktemp(card), card, offline_world)
                file.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return Executed(**json.loads(file.read_text(encoding="utf-8")))

    return once


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("card", NAMES)
def test_every_command_of_a_script_has_the_expected_outcome(card, executed):
    assert executed(card).failed == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_covered_by_a_command(row, executed):
    assert uncovered(row, executed(row.card), known_names()) == []


WITHOUT_CODE = {
    ("regrad", "`--model_path M`"),
    ("regrad", "`--split dev`"),
    ("regrad", "`peft_config.json`: `peft_type`"),
    ("regrad", "a missing file"),
}
"""Rows without code in the right cell, by their left cell; two of them describe refusals, which are executed."""


def every_row() -> list[Row]:
    return [row for name, card in CARDS.items() for row in rows_of(name, card)]


def test_rows_without_code_are_listed():
    assert {(row.card, row.theirs) for row in every_row() if not row.code and not row.removed} == WITHOUT_CODE
    assert {len(rows_of(name, card)) > 20 for name, card in CARDS.items()} == {True}


def test_listed_exceptions_occur_on_a_card():
    code = [code for row in every_row() for code in row.code]
    assert set(code) >= NOT_RUN.keys()
    assert {word for one in code for word in one.split() if word.startswith("--")} >= SIZES - {"--checkpoints"}


def words(line: str) -> list[str]:
    return normal(shlex.split(line))


EXECUTED = Executed(
    commands=[
        words("graftwork train RUN --task glue/sst2 --max-steps 2 --learning_rate=1e-3 --set train.take=4"),
        words("graftwork convert cald encoder -o RUN --share kv --rank 4"),
    ],
    refused={"--proj_share_mode": words("graftwork convert cald encoder -o other --share foo")},
    calls=["legacy.import_dump(Path('a'), Path('b'), rescale_queries=True)"],
    files=["RUN/train", "RUN/train/", "RUN/train/distill/log.jsonl"],
    environment=["HF_HUB_OFFLINE=1"],
)


@pytest.mark.parametrize(
    "ours",
    [
        "`--task glue/sst2`",
        "`graftwork train RUN --task T`",
        "`graftwork train M … --learning-rate 1e-3`",
        "`--max-steps 3000`, which is smaller here",
        "`--set train.take=N`",
        "`-o RUN` of `convert`",
        "`--share X`: `kv`",
        "`glue/sst2` of `train`",
        "`RUN/train`, `log.jsonl`",
        "`legacy.import_dump(rescale_queries=True)`",
        "set `HF_HUB_OFFLINE=1`",
        "removed: `anything` at all",
        "removed: `legacy.import_dump` reads them",
        "nothing to carry out",
    ],
)
def test_executed_commands_cover_a_row(ours):
    assert uncovered(Row("card", "`--theirs`", ours), EXECUTED, known_names()) == []


@pytest.mark.parametrize(
    ("ours", "missing"),
    [
        ("`--learning-rate X`, `--no-such-flag`", ["--no-such-flag"]),
        ("`--learning-rate 1e-4`", ["--learning-rate 1e-4"]),
        ("`--rank 8`", ["--rank 8"]),
        ("`--set train.take=5`", ["--set train.take=5"]),
        ("`--set train.no_such=X`", ["--set train.no_such=X"]),
        ("`graftwork evaluate RUN`", ["graftwork evaluate RUN"]),
        ("`graftwork train RUN --rank 4`", ["graftwork train RUN --rank 4"]),
        ("`--split train\\|dev`", ["--split train", "--split dev"]),
        ("`--share X`: `kv`, `layer`", ["layer"]),
        # a refused command covers only rows that describe a refusal
        ("`--share foo`", ["--share foo"]),
        ("`--rank X`; anything else is refused", ["a refusal"]),
        ("`glue/qnli`", ["glue/qnli"]),
        ("`topk/t5-base_boolq`", ["topk/t5-base_boolq"]),
        ("`RUN/train/finetune/log.jsonl`", ["RUN/train/finetune/log.jsonl"]),
        ("`legacy.import_dump(force=True)`", ["legacy.import_dump(force=True)"]),
        ("`HF_HUB_OFFLINE=0`", ["HF_HUB_OFFLINE=0"]),
        ("`nobody_knows`", ["nobody_knows"]),
        ("removed: `--limit N` does it", ["--limit N"]),
    ],
)
def test_uncovered_code_of_a_row_is_reported(ours, missing):
    assert uncovered(Row("card", "`--theirs`", ours), EXECUTED, known_names()) == missing


def test_a_refusal_covers_only_the_row_in_its_brackets():
    ours = "`--share foo`, refused"
    assert uncovered(Row("card", "`--proj_share_mode X`", ours), EXECUTED, known_names()) == []
    assert uncovered(Row("card", "`--other X`", ours), EXECUTED, known_names()) == ["--share foo", "a refusal"]


def test_an_unexpected_outcome_is_reported_as_a_failure(tmp_path):
    script = tmp_path / "script.txt"
    script.write_text(
        "# none\ngraftwork list\nrefused [x]: graftwork list\nrefused [y]: graftwork list nothing\n"
        "graftwork no-such-verb\n"
    )
    with isolated(tmp_path):
        found = execute(script, {}, {})
    assert found.commands == [["graftwork", "list"]]
    assert found.refused == {"y": ["graftwork", "list", "nothing"]}
    first, second = found.failed
    assert first.startswith("graftwork list\n  ended with 0")
    assert second.startswith("graftwork no-such-verb\n  ended with 2")
