"""One process, one import: commands run through `graftwork.cli.app.run`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants  # noqa: F401 (reads the environment once, before commands change it)

from graftwork.cli.app import run
from graftwork.demo import shipped_model

MODEL = shipped_model("encoder_decoder")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # the command line sets the process up for itself, which other tests should not notice
    from transformers.utils import logging as transformers_logging

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = dict(os.environ)
    level, handlers = logging.root.level, list(logging.root.handlers)
    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture
def graftwork(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs one command line; words with spaces come as words of their own."""

    def call(*words: str | Path) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def data(offline_world: Path) -> Path:
    return offline_world / "unifiedqa"


@pytest.fixture(scope="session")
def converted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after `convert`; copy it before changing it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert run(["convert", "topk", MODEL, "-o", str(folder), "--feed-forward-k", "64", "--dtype", "float32"]) == 0
    return folder
