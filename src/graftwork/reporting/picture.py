"""Pictures of a page: PNG for papers, and SVG with readable points for browsers."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from graftwork.errors import CheckpointMismatchError

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#cb912f", "#337ea9", "#787774")
DENSE_COLOUR = "#37352f"
GRID_COLOUR = "#e3e2de"
_PAGE_COLOURS = {
    DENSE_COLOUR: "var(--ink)",
    GRID_COLOUR: "var(--line)",
    "#000000": "var(--ink)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
"""CSS variables of the stylesheet by colour, so that one SVG fits the light and the dark scheme."""
_SUFFIX = "{unique}"
DPI = 150
PALETTE = 128
"""Number of colours in a PNG."""
_ELEMENTS = {"svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"}
_ATTRIBUTES = {
    *("viewBox", "aria-hidden", "id", "d", "style", "clip-path", "transform", "href", "x", "y", "width", "height"),
}
"""Elements and attributes of a plot."""
_ROWS = 60
"""Maximum number of points of one line in the table of numbers."""


@dataclass(frozen=True)
class Point:
    """One readable point of a picture."""

    x: float
    """Position in the SVG, in its units from the left."""
    y: float
    """Position in the SVG, in its units from the top."""
    at: str
    """Formatted value on the first axis."""
    value: str
    """Formatted value on the second axis."""


@dataclass(frozen=True)
class Line:
    """Points of one line, scatter or bar series."""

    name: str
    axis: str
    """Label of the first axis."""
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Picture:
    """A plot as PNG, as SVG in the page's colours, and its points.

    The SVG is inserted into pages as it is; one from a file must pass `check_svg`.
    """

    png: bytes
    svg: str = ""
    lines: tuple[Line, ...] = ()

    def inline(self, name: str) -> str:
        """SVG with ids that are unique on a page, given a unique name of the picture."""
        return self.svg.replace(_SUFFIX, "-" + hashlib.sha256(name.encode()).hexdigest()[:8])

    @property
    def data(self) -> str:
        """Points as JSON for the script of the page: name, and x, y, text of every point."""
        return json.dumps(
            [
                [line.name, [[point.x, point.y, f"{line.axis} {point.at}: {point.value}"] for point in line.points]]
                for line in self.lines
            ],
            separators=(",", ":"),
        )

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of the table of numbers: name, position and value; long lines are thinned evenly."""
        found: list[tuple[str, str, str]] = []
        for line in self.lines:
            step = -(-len(line.points) // _ROWS)
            found += [(line.name, point.at, point.value) for point in line.points[::step]]
        return found


def to_picture(figure: Figure) -> Picture:
    """Draw a finished figure as PNG and as SVG, and collect the points of its lines and bars."""
    lines = tuple(_lines(figure))
    return Picture(_png(figure), _svg(figure), lines)


def _png(figure: Figure) -> bytes:
    from PIL import Image

    drawn, reduced = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)  # pyright: ignore[reportUnknownMemberType]
    # a plot has few colours; with a palette a page of many plots is a third of the size
    Image.open(drawn).convert("RGB").quantize(PALETTE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        reduced, "PNG", dpi=(DPI, DPI)
    )
    return reduced.getvalue()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # text remains text, and equal figures have equal ids
    with matplotlib.rc_context(  # pyright: ignore[reportUnknownMemberType]
        {"svg.fonttype": "none", "svg.hashsalt": "graftwork"}
    ):
        figure.savefig(  # pyright: ignore[reportUnknownMemberType]
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"| version="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' id="([^"]*)"', rf' id="\g<1>{_SUFFIX}"', text)
    text = re.sub(r'(href="#|url\(#)([^")]*)', rf"\g<1>\g<2>{_SUFFIX}", text)
    text = re.sub(r"\n\s*", "\n", text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    return text


def _lines(figure: Figure) -> list[Line]:
    found: list[Line] = []
    for axes in cast("list[Any]", figure.axes):
        panel = axes.get_title(loc="left") or axes.get_title()
        panel = f"{panel}: " if len(figure.axes) > 1 and panel else ""
        for line in axes.lines:
            name = str(line.get_label())
            if name.startswith("_"):
                continue
            pairs = [(float(x), float(y)) for x, y in line.get_xydata()]
            found.append(_line(figure, axes, panel + name, pairs))
        for bars in axes.containers:
            places = [
                (bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in bars if hasattr(bar, "get_width")
            ]
            names = {
                float(tick): text.get_text()
                for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=False)
            }
            for (value, place), point in zip(places, _places(figure, axes, places), strict=True):
                label = " ".join(names.get(round(place), "").split())
                found.append(Line(panel + label, "", (Point(*point, "", f"{value:.1f}"),)))
    return [line for line in found if line.points]


def _line(figure: Figure, axes: Any, name: str, pairs: Sequence[tuple[float, float]]) -> Line:
    # axes of categories, such as layers, have text instead of numbers at their ticks
    texts = {
        float(tick): text.get_text() for tick, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=False)
    }
    named = (
        any(text and not re.fullmatch(r"[−\-\d.,eE+]+", text) for text in texts.values())
        and axes.get_xscale() == "linear"
    )
    unit = str(axes.get_ylabel())
    points = [
        Point(*place, texts.get(x, f"{x:g}") if named else f"{x:g}", f"{y:.4g}" + (f" {unit}" if unit else ""))
        for (x, y), place in zip(pairs, _places(figure, axes, pairs), strict=True)
    ]
    return Line(name, str(axes.get_xlabel()), tuple(points))


def _places(figure: Figure, axes: Any, pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Positions of data points in the SVG, whose unit is 1/72 inch."""
    if not pairs:
        return []
    scale, height = 72 / figure.dpi, 72 * float(figure.get_figheight())
    return [(round(x * scale, 1), round(height - y * scale, 1)) for x, y in axes.transData.transform(pairs)]


def check_svg(text: str, where: str) -> str:
    """Return an SVG from a file if it contains nothing but the shapes and texts of a plot, so that no script can run.

    Args:
        text: SVG as `to_picture` writes it, or an empty string.
        where: File that contains it, for the error.

    Raises:
        CheckpointMismatchError: If it contains any other element or attribute, or a reference to something outside.
    """
    if not text:
        return ""
    try:
        elements = list(ElementTree.fromstring(text).iter())
    except ElementTree.ParseError:
        elements = []
    allowed = all(
        element.tag in _ELEMENTS
        and set(element.attrib) <= _ATTRIBUTES
        and element.get("href", "#").startswith("#")
        and not re.search(r"url\((?!#)|[\\<@]|expression", " ".join(element.attrib.values()))
        for element in elements
    )
    if not elements or not allowed or "<!" in text:
        raise CheckpointMismatchError(
            f"{where} contains an SVG that is no plot of Graftwork. Run the command that wrote it again."
        )
    return text
