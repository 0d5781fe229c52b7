"""Rendering of self-contained HTML pages: templates with one stylesheet and one script."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

TEMPLATE_FOLDER = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Render a template; texts in `values` are escaped.

    Args:
        template: File name in the folder of templates.
        **values: Variables of the template.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    # jinja2 leaves the values of the mapping untyped
    filters = cast(dict[str, Any], environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters |= {"data_url": _data_url, "mib": _mib, "shorten": _shorten, "slug": slug, "row_values": _values}
    return environment.get_template(template).render(**values)


def slug(text: str) -> str:
    """Convert a title to a name of files and anchors.

    Example:
        >>> slug("Score against k: dense")
        'score-against-k-dense'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "untitled"


def _mib(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**20:.2f}"


def _values(row: Mapping[str, str]) -> list[str]:
    return list(row.values())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _shorten(text: Any, length: int = 300) -> str:
    words = str(text)
    return words if len(words) <= length else words[: length - 1] + "…"
