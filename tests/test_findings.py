"""Inputs in the folder of real data that once ended in exceptions of libraries, or in a wrong result."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz_inputs import readers
from graftwork.errors import GraftworkError
from graftwork.pipeline.loading import load, load_model

READERS = {
    "bank_pt": "bank_pt",
    "corpus_gz_tsv": "corpus_gz",
    "cwq": "cwq",
    "eraser_movies": "movies",
    "legacy_dump": "legacy_dump",
    "pairs": "pairs",
    "trainyaml": "training",
}
"""Reader of `fuzz_inputs` by the first part of a file's name."""
LOADABLE = ("sharded", "bin_only", "adapter_only")
"""Model folders that load; a folder without a tokenizer can be converted only."""


@pytest.fixture(scope="module")
def findings(shared: Path) -> Path:
    folder = shared / "findings"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


def test_every_input_ends_in_an_error_of_ours(findings, tmp_path):
    known = readers()
    paths = sorted((findings / "integrity" / "fuzz").iterdir())
    assert {path.name.split("-")[0] for path in paths} == set(READERS)
    outcomes = {}
    for number, path in enumerate(paths):
        reader = known[READERS[path.name.split("-")[0]]]
        folder = tmp_path / str(number)
        for name, content in ((reader.file, path.read_bytes()), *reader.others):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for document in re.findall(rb'"docid": "(\w+\.txt)"', path.read_bytes()):
            # the documents of the input are not in the folder; without them, an earlier check refuses it
            (folder / reader.file).with_name("docs").mkdir(exist_ok=True)
            ((folder / reader.file).with_name("docs") / document.decode()).write_text("word " * 2000)
        try:
            reader.read(folder / reader.file)
            outcomes[path.name] = "no error"
        except GraftworkError as error:
            outcomes[path.name] = str(error)
    for name, text in outcomes.items():
        assert Path(known[READERS[name.split("-")[0]]].file).name.split(".")[0] in text, (name, text)


@pytest.mark.long
def test_a_second_conversion_does_not_replace_a_trained_model(findings):
    outcome = _script(findings / "first_use" / "convert_over_trained.py", Path.cwd())
    assert "convert again 2" in outcome
    assert "trained weights still there: True" in outcome
    assert "after 'Trained': equals trained: True equals untrained: False" in outcome
    assert "doctor 0" in outcome


@pytest.mark.long
def test_odd_model_folders_are_refused_with_their_fault(findings, tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "src").symlink_to(root / "src")
    _script(findings / "first_use" / "make_model_folders.py", tmp_path)
    expected = {
        "no_tokenizer": "no usable tokenizer",
        "gguf_only": "found no config.json but model.gguf",
        "gguf_cfg": "model.gguf, weights in another format",
        "remote_code": "needs code from its folder",
        "truncated": "is damaged",
        "missing_shard": "which the index of the weights names",
        "empty": "an empty folder",
        "empty_config": "config.json",
    }
    found = {path.name for path in (tmp_path / "models").iterdir()}
    assert found == {*expected, *LOADABLE}
    for name, text in expected.items():
        with pytest.raises(GraftworkError) as raised:
            load_model(str(tmp_path / "models" / name))
        assert text in str(raised.value), (name, str(raised.value))
    for name in LOADABLE:
        assert load(tmp_path / "models" / name).tokenizer is not None
    assert not (tmp_path / "work").exists()


def _script(path: Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, str(path)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
