"""MkDocs hooks that generate pages from the code: the command line, the method cards, and the contributing guide."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Fill the navigation entry of the methods from the registry."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [f"methods/{name}.md" for name in method_names()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add one page for the card of each method, and the API page of the methods."""
    from mkdocs.structure.files import File

    for name in method_names():
        files.append(File.generated(config, f"methods/{name}.md", content=card(name)))
    files.append(File.generated(config, "api/methods.md", content=methods_api()))
    return files


def method_names() -> list[str]:
    """Return the names of the built-in methods."""
    from graftwork.methods import NAMES

    return sorted(module.rpartition(".")[2] for module in NAMES.homes().values())


def card(name: str) -> str:
    """Return the card of a method, with links to other cards rewritten into links to pages."""
    folder = PurePosixPath("src/graftwork/methods") / name
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    return LINK.sub(lambda link: _card_link(link, folder), text)


def methods_api() -> str:
    """Return the API page of the methods: protocol, then class, configuration and documented modules of each."""
    from graftwork.methods import NAMES

    quiet = "    options: {show_root_heading: false, show_root_toc_entry: false}"
    lines = ["# Methods", ""]
    for module in ("graftwork.grafting.method", "graftwork.grafting.capabilities"):
        lines += [f"::: {module}", quiet]
    for attribute, package in sorted(NAMES.homes().items(), key=lambda home: home[1]):
        config = NAMES.get(package.rpartition(".")[2]).config_class
        lines += [f"::: {package}.{attribute}", f"::: {config.__module__}.{config.__name__}"]
        for part in getattr(import_module(package), "API", ()):
            is_class = part.rpartition(".")[2][0].isupper()
            lines += [f"::: {package}.{part}", *([] if is_class else [quiet])]
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Insert the content of generated pages, and rewrite links to files of the repository into links to pages."""
    name = page.file.src_uri
    if name == "cli.md":
        return markdown + "\n" + command_line()
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
