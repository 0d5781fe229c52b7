"""Kills of every writer, in a process of their own: they fork from a process that has started no thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_a_writer_that_is_killed_at_any_moment_can_be_repeated():
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, script, "--processes", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
