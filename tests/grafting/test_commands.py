"""Options of method commands."""

from __future__ import annotations

import pytest

from graftwork.errors import ConfigError
from graftwork.grafting.commands import lengths_of, required_tasks


@pytest.mark.parametrize(
    ("text", "lengths"), [(None, []), ("", []), ("2", [2]), ("512, 1024", [512, 1024]), ("8,,4,", [8, 4])]
)
def test_lengths_are_whole_numbers_with_commas_between(text, lengths):
    assert lengths_of(text) == lengths


@pytest.mark.parametrize("text", ["1", "0", "-4", "2.5", "512 1024", "many"])
def test_other_lengths_are_refused(text):
    with pytest.raises(ConfigError, match="Expected whole numbers from 2"):
        lengths_of(text)


def test_a_command_that_needs_a_task_refuses_none():
    assert required_tasks(["a", "b"]) == ["a", "b"]
    for tasks in (None, []):
        with pytest.raises(ConfigError, match="Found no task"):
            required_tasks(tasks)
