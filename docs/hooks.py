"""MkDocs hooks that generate pages from the code: the command line, the method cards, and the contributing guide."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
CARD = re.compile(r"^methods/(?P<name>\w+)\.md$")
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Insert the content of generated pages, and rewrite links to files of the repository into links to pages."""
    name = page.file.src_uri
    if name == "cli.md":
        return markdown + "\n" + command_line()
    card = CARD.match(name)
    if card is not None:
        folder = PurePosixPath("src/graftwork/methods") / card["name"]
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        return LINK.sub(lambda link: _card_link(link, folder), text)
    if name == "contributing.md":
        return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return markdown.replace("](../../CONTRIBUTING.md", "](../contributing.md")


def command_line() -> str:
    """Return the help of every command as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from graftwork.cli.app import command_line as whole_command

    command = whole_command()
    with typer.Context(command, info_name="graftwork") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="graftwork")
    # the page has its own heading
    return text.partition("\n")[2]


def _card_link(link: re.Match[str], folder: PurePosixPath) -> str:
    path = PurePosixPath(os.path.normpath(folder / link["target"]))
    if path.name == "README.md" and path.parent.parent == folder.parent:
        return f"[{link['text']}]({path.parent.name}.md{link['anchor'] or ''})"
    # a repository file without a page: keep the text, drop the link
    return link["text"]
