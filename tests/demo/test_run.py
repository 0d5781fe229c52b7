"""`graftwork demo --quick` runs and resumes."""

from __future__ import annotations

import json
import re

import pytest

from graftwork.cli.app import run
from graftwork.demo.parts.part import Scale
from graftwork.demo.run import PARTS
from graftwork.methods import NAMES
from graftwork.reporting.verdicts import Verdict
from reporting.html_rules import violations


@pytest.mark.parametrize(
    "names",
    [
        pytest.param((), id="every part", marks=pytest.mark.long),
        # the part with the most stages and artifacts
        pytest.param(("regrad",), id="one part", marks=pytest.mark.long),
    ],
)
def test_parts_run_and_resume(names, tmp_path, capsys):
    page = tmp_path / "demo" / "report.html"
    words = ["demo", *names, "-o", str(tmp_path / "demo"), "--quick", "--json"]
    assert run(words) == 0
    first = capsys.readouterr()
    shown = set(names or PARTS)
    assert {row["method"] for row in json.loads(first.out)} == shown
    text = page.read_text()
    assert violations(text) == []
    assert "Smoke test (--quick)" in text
    assert "Expected time: about" in first.err
    for name in shown:
        assert f'id="{name}"' in text
        # every number is listed as a gain, a cost or unclear
        assert {verdict.value for verdict in Verdict} <= set(re.findall(r"<h3>([^<]*)</h3>", text))
    assert run([word for word in words if word != "--quick"]) == 2
    assert "Found a quick demonstration" in capsys.readouterr().err
    for link in re.findall(r'<a href="([^#"]+)"', text):
        place = page.parent / link
        assert place.is_file() if link.endswith(".html") else (place / "results.json").is_file()
    # the page is self-contained: no external links to images or scripts
    assert not re.findall(r'(?:src|href)="https?:', text)
    made = {path: path.stat().st_mtime_ns for path in page.parent.rglob("checkpoint-*/*") if path.is_file()}
    assert made
    assert run(words) == 0
    assert capsys.readouterr().out == first.out
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())


def test_quick_and_full_exclude_each_other(tmp_path, capsys):
    assert run(["demo", "-o", str(tmp_path / "demo"), "--quick", "--full"]) == 2
    assert "expected at most one" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_short_demonstration_takes_at_most_two_and_a_half_minutes_of_expected_time(tmp_path):
    def seconds(scale):
        parts = [PARTS.get(name)(tmp_path / name, tmp_path / "world", scale=scale) for name in PARTS]
        return sum(stage.seconds for part in parts for stage in part.stages())

    assert seconds(Scale.QUICK) < seconds(Scale.SHORT) <= 150
    assert seconds(Scale.FULL) > 2 * seconds(Scale.SHORT)


def test_every_part_belongs_to_a_method():
    assert set(PARTS) <= set(NAMES)
    for name in PARTS:
        assert PARTS.get(name).method == name


def test_an_unknown_method_is_refused(tmp_path, capsys):
    assert run(["demo", "topkk", "-o", str(tmp_path / "demo")]) == 2
    assert "Did you mean 'topk'?" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
