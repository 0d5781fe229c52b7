"""What the documentation takes from the code: the page of the command line, and the methods' cards."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
CARD = re.compile(r"^methods/(?P<name>\w+)\.md$")
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the generated pages in, and lead links of cards to pages where there are some."""
    if page.file.src_uri == "cli.md":
        return markdown + "\n" + command_line()
    card = CARD.match(page.file.src_uri)
    if card is None:
        return markdown
    folder = PurePosixPath("src/graftwork/methods") / card["name"]
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    return LINK.sub(lambda link: _relinked(link, folder), text)


def command_line() -> str:
    """Every command with its options, from the program itself."""
    import typer
    from typer.cli import get_docs_for_click

    from graftwork.cli.app import command_line as whole_command

    command = whole_command()
    with typer.Context(command, info_name="graftwork") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="graftwork")
    # the page has a heading of its own
    return text.partition("\n")[2]


def _relinked(link: re.Match[str], folder: PurePosixPath) -> str:
    path = PurePosixPath(os.path.normpath(folder / link["target"]))
    if path.name == "README.md" and path.parent.parent == folder.parent:
        return f"[{link['text']}]({path.parent.name}.md{link['anchor'] or ''})"
    # a file of the repository that has no page: its words are enough
    return link["text"]
