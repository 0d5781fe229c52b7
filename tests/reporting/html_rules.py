"""Structural rules of a generated page, checked without a browser."""

from __future__ import annotations

import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
HEADINGS = {f"h{level}": level for level in range(1, 7)}


class Page(HTMLParser):
    """Collects the violations of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.count: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.regions: Counter[str] = Counter()
        self.level = 0
        self.buttons: list[str] = []

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in given}
        self.count[tag] += 1
        self._check(tag, attributes)
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, given)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes <{self.open[-1][0] if self.open else 'nothing'}>")
        if any(name == tag for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        around = [name for name, _ in self.open]
        if data.strip() and not {"main", "header", "nav", "head", "script"} & set(around) and around[-1:] != ["a"]:
            self.problems.append(f"text outside all landmarks: {data.strip()[:40]!r}")

    def _check(self, tag: str, own: dict[str, str]) -> None:
        if "id" in own:
            self.ids[own["id"]] += 1
        if own.get("role") == "region" or (tag == "section" and own.get("aria-label")):
            self.regions[own.get("aria-label", "")] += 1
        if tag == "table":
            around = self.open[-1][1] if self.open else {}
            if (around.get("role"), around.get("tabindex")) != ("region", "0") or not around.get("aria-label"):
                self.problems.append("a table is not in a focusable region with a label")
        if own.get("class") == "plot" and (own.get("tabindex") != "0" or not own.get("aria-label")):
            self.problems.append("a plot cannot be focused, or has no label")
        if tag == "svg" and own.get("aria-hidden") != "true":
            self.problems.append("an SVG is not hidden behind the label of its plot")
        if tag == "img" and not own.get("alt"):
            self.problems.append("an image has no alternative text")
        if tag == "input" and not own.get("aria-label"):
            self.problems.append("a field has no label")
        if tag == "th" and own.get("scope") not in ("col", "row"):
            self.problems.append("a header cell has no scope")
        if tag == "details":
            self.count["closed details"] += "open" not in own
        if tag in HEADINGS:
            if HEADINGS[tag] > self.level + 1:
                self.problems.append(f"<{tag}> follows <h{self.level}>")
            self.level = HEADINGS[tag]
        if re.search(r"width:\s*[\d.]+(px|rem|em|ch|vw)", own.get("style", "")):
            self.problems.append(f"a fixed width can overflow: {own['style']}")
        for name in ("src", "href", "data", "action"):
            if re.match(r"(?:\w+:)?//|https?:", own.get(name, "")):
                self.problems.append(f"<{tag}> loads {own[name][:60]}")


def violations(html: str) -> list[str]:
    """Return the broken rules: landmarks, labels, focusable tables and plots, heading order, ids, references."""
    page = Page()
    page.feed(html)
    page.close()
    found = list(page.problems)
    found += [f"the id {name} occurs {count} times" for name, count in page.ids.items() if count > 1]
    found += [f"the label {name!r} occurs {count} times" for name, count in page.regions.items() if count > 1]
    for tag in ("main", "h1", "title", "style"):
        if page.count[tag] != 1:
            found.append(f"found {page.count[tag]} of <{tag}>; expected one")
    styles = " ".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    if "prefers-color-scheme: dark" not in styles:
        found.append("no colours for the dark scheme")
    if re.search(r"@import|url\((?!#)", styles + " ".join(re.findall(r'style="([^"]*)"', html))):
        found.append("a style loads something")
    if '<html lang="en">' not in html or 'name="viewport"' not in html:
        found.append("no language or no viewport")
    return found


def axe_core() -> Path | None:
    """File of axe-core: that of the environment variable AXE_CORE, or of `npm install --no-save axe-core`."""
    named = os.environ.get("AXE_CORE")
    path = Path(named) if named else ROOT / "node_modules" / "axe-core" / "axe.min.js"
    return path if path.is_file() else None
