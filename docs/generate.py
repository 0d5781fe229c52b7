"""Rewrite the generated tables of the README and of the method cards: `python docs/generate.py`."""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tables() -> dict[Path, dict[str, str]]:
    """Return the generated tables by document and mark."""
    from graftwork.cli import families
    from graftwork.cli.options import families_markdown, methods_markdown, settings_markdown
    from graftwork.methods import NAMES

    found = {
        ROOT / "README.md": {"methods": methods_markdown()},
        ROOT / "docs" / "guides" / "families.md": {"types": families.markdown()},
        ROOT / "docs" / "guides" / "memory.md": {"memory": memory_markdown()},
    }
    for package in NAMES.homes().values():
        cls = NAMES.get(package.rpartition(".")[2])
        found[Path(str(files(package) / "README.md"))] = {
            "settings": settings_markdown(cls.config_class),
            "families": families_markdown(sorted(cls.families)),
        }
    return found


def memory_markdown() -> str:
    """Return the figures of `docs/memory.py` in Markdown, in GB; the first run of that script writes them."""
    rows = json.loads((ROOT / "docs" / "memory.json").read_text(encoding="utf-8"))
    lines = ["| model | method | training, GB *estimated* | inference, GB *estimated* |", "|---|---|---|---|"]
    for model, methods in rows.items():
        for name, own in methods.items():
            lines.append(f"| `{model}` | {name} | {own['training'] / 1e9:.2f} | {own['inference'] / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


def filled(text: str, mark: str, table: str) -> str:
    """Return a document with the table between the lines of a mark replaced.

    Raises:
        ValueError: If the document lacks the mark.
    """
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"Found no lines {begin.strip()} and {end}. Add them around the generated table.")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{table}{end}", text, flags=re.S)


def main() -> int:
    """Rewrite every document; return 1 with `--check` if one is out of date."""
    stale = []
    for path, own in tables().items():
        before = path.read_text(encoding="utf-8")
        after = before
        for mark, table in own.items():
            after = filled(after, mark, table)
        if after != before:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    print(f"Out of date: {', '.join(stale)}" if stale else "Up to date")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
