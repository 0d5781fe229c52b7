"""Banks in folders without write permission, and panics of Lance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bank_writer import gradient, open_bank
from graftwork.methods.regrad.bank.errors import BankCorruptionError
from graftwork.methods.regrad.bank.files import reading

READ_ONLY = (
    "import os, sys\n"
    "import torch\n"
    "from graftwork.methods.regrad.bank.gradient_bank import GradientBank\n"
    # imports everything before the rights are given up: the interpreter may be installed for root only
    "GradientBank(sys.argv[1], 'a').get(['p1'])\n"
    "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    "bank = GradientBank(sys.argv[1])\n"
    "print(len(bank), tuple(bank.get(['p1']).shape))\n"
)


class PanicException(BaseException):
    """Substitute for the class of pyo3, which has no importable name."""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
def test_a_bank_in_a_read_only_folder_is_searched(open_folder: Path):
    folder = open_folder / "bank"
    bank = open_bank(folder, "float32")
    bank.append([gradient(number) for number in range(4)])
    size = bank.layout.size
    bank.close()
    inside = [folder, *folder.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = subprocess.run([sys.executable, "-c", READ_ONLY, folder], capture_output=True, text=True, check=False)
    for path in inside:
        path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"4 (1, {size})"


def test_files_of_a_bank_follow_the_umask(tmp_path: Path):
    open_bank(tmp_path / "bank", "float32").append([gradient(1)])
    private = [
        path.name for path in (tmp_path / "bank").rglob("*") if path.is_file() and not path.stat().st_mode & 0o044
    ]
    umask = os.umask(0)
    os.umask(umask)
    assert private == [] or umask & 0o044


def test_a_panic_of_lance_is_an_error_of_the_bank(tmp_path: Path):
    bank = open_bank(tmp_path / "bank", "float32")
    with pytest.raises(BankCorruptionError, match="out of range"), reading(bank.backend):
        raise PanicException("index out of range")
