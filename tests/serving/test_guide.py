"""Commands and code of the serving guide, run against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from graftwork.cli.options import settings_table
from graftwork.serving import error_handlers
from graftwork.serving.settings import ServeSettings
from serving.servers import listening, open_toy

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "serving.md"
BLOCK = re.compile(r"(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)
TOKEN = "a-secret-of-the-tests"


def test_code_blocks_of_the_guide_run(toy, tmp_path: Path, monkeypatch, capsys):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    pytest.importorskip("openai", reason="the client is not installed: pip install openai")
    with listening(open_toy(toy.copy(tmp_path), page=False), TOKEN) as address:
        monkeypatch.setenv("SERVER", address)
        monkeypatch.setenv("GRAFTWORK_SERVE_TOKEN", TOKEN)
        for block in BLOCK.finditer(GUIDE.read_text(encoding="utf-8")):
            if block["mark"] or block["language"] == "yaml":
                continue
            if block["language"] == "python":
                exec(compile(block["code"], "block", "exec"), {})
                assert "p101" in capsys.readouterr().out
                continue
            strict = block["code"].replace("curl -sS", "curl -sS --fail-with-body")
            done = subprocess.run(
                ["bash", "-ec", strict], capture_output=True, text=True, env=dict(os.environ), check=False
            )
            assert done.returncode == 0, done
            assert "p101" in done.stdout or re.search(r'"deleted":"news-[12]"', done.stdout)


def test_guide_lists_every_status_and_existing_options_only():
    text = GUIDE.read_text(encoding="utf-8")
    options = {"--" + row["name"].replace("_", "-") for row in settings_table(ServeSettings)}
    known = options | {"--erase", "--bank", "--index", "--device-map", "--dtype", "--help", "--tenants"}
    assert set(re.findall(r"--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", text))) <= known
    table = set(re.findall(r"\b[45]\d\d\b", text))
    assert {str(status) for _, status in error_handlers.STATUSES} - {
        str(error_handlers.CLIENT_CLOSED_REQUEST)
    } <= table | {"422"}
