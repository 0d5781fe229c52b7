"""One progress line for several stages."""

from __future__ import annotations

import pytest

from graftwork.core import progress
from graftwork.core.progress import Progress, Stages


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_remaining_time_is_scaled_by_finished_stages(clock):
    with Stages([10, 20, 30]) as whole:
        whole.start("first")
        assert whole.left == 60
        clock[0] += 20
        whole.finish()
        whole.start("second")
        # twice as slow as expected: 2 * (20 + 30)
        assert whole.left == 100
        clock[0] += 15
        assert whole.left == 85
        whole.finish()


def test_progress_inside_a_stage_appears_in_the_line_of_the_whole(clock, capsys):
    with Stages([10, 10]) as whole:
        whole.start("cald: converting")
        with Progress("distill", total=200) as inner:
            for _ in range(4):
                clock[0] += 5
                inner.advance(25)
        whole.finish()
        clock[0] += 20
        whole.start("topk: sweep")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/2] cald: converting, about 20 s left"
    assert lines[1] == "[1/2] cald: converting, 38%, about 10 s left"
    assert lines[2].startswith("[2/2] topk: sweep, about ")
    assert not any("distill" in line for line in lines)


def test_progress_prints_lines_of_its_own_after_the_stages(clock, capsys):
    with Stages([1]) as whole:
        whole.start("one")
        whole.finish()
    with Progress("predict", total=4) as own:
        clock[0] += 20
        own.advance(2)
    assert capsys.readouterr().err.splitlines()[-1] == "predict: 2 of 4, about 20 s left"
