"""Program that runs several commands in one process: `python stages.py COMMANDS.json`, also under `torchrun`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from graftwork.cli.app import run

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if code := run(words):
            sys.exit(code)
