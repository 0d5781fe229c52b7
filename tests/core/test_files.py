"""Files written for a run."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from graftwork.core.files import apply_umask
from graftwork.core.native import NativePanicError, panics_as_errors


class PanicException(BaseException):
    """Substitute for the class of pyo3, which has no importable name."""


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_private_files_of_libraries_get_the_mode_of_new_files(tmp_path: Path, umask, mode):
    (tmp_path / "deep").mkdir()
    private, chosen = tmp_path / "deep" / "model.safetensors", tmp_path / "secret"
    for path, own in ((private, 0o600), (chosen, 0o640)):
        path.touch()
        path.chmod(own)
    before = os.umask(umask)
    try:
        apply_umask(tmp_path)
        apply_umask(tmp_path / "missing")
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == mode
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "model.safetensors", "secret"]


def test_panics_become_errors_and_interrupts_stay(tmp_path: Path):
    with pytest.raises(NativePanicError, match="overflow"), panics_as_errors(tmp_path):
        raise PanicException("overflow")
    with pytest.raises(KeyboardInterrupt), panics_as_errors(tmp_path):
        raise KeyboardInterrupt
