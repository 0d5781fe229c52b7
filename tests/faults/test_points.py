"""Every commit point: it is listed, called and tested; a fault there is one error, and the command can be repeated."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from faults.scenarios import RANDOM, SCENARIOS, leftovers
from faults.writers import WRITERS
from graftwork.cli.app import run
from graftwork.core import faults
from graftwork.core.files import write_json
from graftwork.errors import ConfigError, DiskFullError, NonFiniteError, ReadOnlyError

SOURCE = Path(__file__).parents[2] / "src" / "graftwork"
VALUES = ("model.weights", "training.loss", "training.gradients", "prediction.weights", "bank.gradients")
"""Points that pass values."""


def calls() -> dict[str, list[str]]:
    """Places of the calls of each point, in the source."""
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point"):
                continue
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} does not name its point"
            values = len(node.args) > 2
            assert values == (name.value in VALUES), f"{path}:{node.lineno} and VALUES disagree"
            found.setdefault(str(name.value), []).append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    return found


def test_every_point_is_listed_and_called():
    assert set(calls()) == set(faults.POINTS)


def test_every_point_is_hit_by_a_kill_and_by_a_fault_of_the_disk():
    killed = {point for scenario in SCENARIOS.values() for point in scenario.points}
    assert killed == set(faults.POINTS)
    assert {point for writer in WRITERS.values() for point in writer.points} == set(faults.POINTS)
    assert set(RANDOM) <= set(SCENARIOS)


DISKS = (("full", DiskFullError), ("read-only", ReadOnlyError))


@cache
def _expected(name: str, place: Path) -> tuple[Path, Any, Any]:
    """Prepared folder of a writer, its state, and the state after an uninterrupted change."""
    writer, base, whole = WRITERS[name], place / name / "base", place / name / "whole"
    base.mkdir(parents=True)
    writer.prepare(base)
    shutil.copytree(base, whole)
    before = writer.read(whole)
    writer.write(whole)
    return base, before, writer.read(whole)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writers")


CASES = [
    (name, points)
    for name, writer in WRITERS.items()
    for points in ([writer.points] if writer.in_turn else [(point,) for point in writer.points])
]


@pytest.mark.parametrize(("name", "points"), CASES, ids=[f"{name}-{points[0]}" for name, points in CASES])
def test_a_fault_of_the_disk_is_one_error_and_the_change_can_be_repeated(name, points, place, tmp_path):
    writer, folder = WRITERS[name], tmp_path / "work"
    base, before, after = _expected(name, place)
    shutil.copytree(base, folder)
    for point in points:
        action, error = DISKS[list(faults.POINTS).index(point) % 2]
        with faults.handled_by(faults.Fault(point, action)), pytest.raises(error) as raised:
            writer.write(folder)
        assert str(folder) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert writer.read(folder) in (before, after)
    writer.write(folder)
    assert writer.read(folder) == after
    assert not leftovers(folder)


@pytest.mark.parametrize("point", VALUES)
def test_values_that_are_not_finite_are_refused(point, place, tmp_path):
    name = next(name for name, writer in WRITERS.items() if point in writer.points)
    writer, folder = WRITERS[name], tmp_path / "work"
    base, before, after = _expected(name, place)
    shutil.copytree(base, folder)
    with faults.handled_by(faults.Fault(point, "nan")), pytest.raises(NonFiniteError, match=r"(?i)nan|not finite"):
        writer.write(folder)
    assert writer.read(folder) == before
    writer.write(folder)
    assert writer.read(folder) == after


WRITE = """
import sys
from pathlib import Path
from graftwork.core.files import write_json
write_json(Path(sys.argv[1]), 2)
"""


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_removes_its_temporary_file(tmp_path):
    file = tmp_path / "results.json"
    write_json(file, 1)
    environment = {**os.environ, "GRAFTWORK_FAULT": "file.written@results.*:kill"}
    killed = subprocess.run([sys.executable, "-c", WRITE, file], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads(file.read_text()) == 1
    assert len(list(tmp_path.iterdir())) == 2
    other = tmp_path / ".results.json.part"
    other.write_text("of somebody else")
    write_json(file, 3)
    assert sorted(tmp_path.iterdir()) == [other, file]


def test_a_point_costs_one_check_and_a_fault_hits_once():
    assert faults._handler is None
    fault = faults.Fault.parse("file.written@run.*:full:2")
    hits = []
    with faults.handled_by(fault):
        for path in ("run.yaml", "results.json", "run.yaml", "run.yaml"):
            try:
                faults.point("file.written", path)
            except OSError as error:
                hits.append(error.filename)
    assert hits == ["run.yaml"]
    assert fault._hits == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file.writen:kill", r"unknown point 'file\.writen'\. Did you mean 'file\.written'\?"),
        ("file.written:ful", r"unknown action 'ful'\. Did you mean 'full'\?"),
        ("xyz:kill", "Expected one of: file.written"),
        ("file.written", r"Expected POINT\[@FILE\]:ACTION\[:N\]"),
        ("file.written:kill:0", r"Expected POINT\[@FILE\]:ACTION\[:N\]"),
    ],
)
def test_a_malformed_fault_is_refused_with_a_suggestion(text, message, monkeypatch, capfd):
    with pytest.raises(ConfigError, match=message):
        faults.Fault.parse(text)
    monkeypatch.setenv(faults.VARIABLE, text)
    assert run(["list", "methods"]) == 2
    assert f"GRAFTWORK_FAULT='{text}'" in capfd.readouterr().err


def test_nan_at_a_point_without_values_is_refused(tmp_path):
    with faults.handled_by(faults.Fault("file.written", "nan")), pytest.raises(ConfigError, match="passes no values"):
        write_json(tmp_path / "x.json", 1)
