"""Rewrite the generated tables of the README, the method cards and the pages: `python docs/generate.py`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftwork.settings.recipe import Published

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

from figures import attention_table, feed_forward_table, readme_table  # noqa: E402 (a script beside this one)


def tables() -> dict[Path, dict[str, str]]:
    """Return the generated tables by document and mark."""
    from graftwork.cli import families
    from graftwork.cli.options import families_markdown, methods_markdown, settings_markdown
    from graftwork.methods import NAMES
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.recipe import RunConfig
    from graftwork.settings.training import TrainingSettings

    docs = ROOT / "docs"
    found = {
        ROOT / "README.md": {"methods": methods_markdown(), "measured": readme_table()},
        docs / "guides" / "families.md": {"types": families.markdown()},
        docs / "settings.md": {
            "training": settings_markdown(TrainingSettings),
            "evaluation": settings_markdown(EvaluationSettings),
            "run": settings_markdown(RunConfig),
        },
        docs / "recipes.md": {"recipes": recipes_markdown()},
        docs / "guides" / "memory.md": {"memory": memory_markdown()},
    }
    for package in NAMES.homes().values():
        cls = NAMES.get(package.rpartition(".")[2])
        found[Path(str(files(package) / "README.md"))] = {
            "settings": settings_markdown(cls.config_class),
            "families": families_markdown(sorted(cls.families)),
        }
    card = Path(str(files("graftwork"))) / "methods" / "topk" / "README.md"
    found[card] |= {"measured-feed-forward": feed_forward_table(), "measured-attention": attention_table()}
    return found


def recipes_markdown() -> str:
    """Return one table of recipes for each method: purpose, published numbers, command."""
    from graftwork.settings.recipe import load_recipe, recipe_names

    lines: list[str] = []
    for name in recipe_names():
        method = name.partition("/")[0]
        if not any(line == f"## `{method}`" for line in lines):
            lines += ["", f"## `{method}`", "", "| recipe | what it does | published | command |", "|---|---|---|---|"]
        text = (files("graftwork") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        comment = re.findall(r"^# (.*)$", text, re.M)
        purpose = comment[0] if comment else ""
        command = next((line.partition("Run:")[2].strip() for line in comment if line.startswith("Run:")), "")
        cells = (
            f"`{name}`",
            purpose,
            _published(load_recipe(name).published),
            f"`{command or f'graftwork run {name}'}`",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def _published(numbers: Sequence[Published]) -> str:
    """Published numbers with their settings; the sources are named once."""
    shown: list[str] = []
    for one in numbers:
        at = ", ".join(f"{key.rpartition('.')[2]} {'off' if value is None else value}" for key, value in one.at.items())
        shown.append(f"{one.metric} {one.value:g} (`{one.task}`{', ' + at if at else ''})")
    sources = list(dict.fromkeys(one.source for one in numbers))
    return "; ".join(shown) + (f". {'; '.join(sources)}" if shown else "–")


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
