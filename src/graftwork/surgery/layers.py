"""Parsing of layer selections. Torch-free, so that configurations can validate them."""

from __future__ import annotations

from graftwork.errors import ConfigError


def parse_layers(text: str | None, field: str) -> frozenset[int] | None:
    """Parse layer numbers such as "0-3,7"; None selects every layer.

    Raises:
        ConfigError: If the text is not a list of numbers and ranges.
    """
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{field} is {text!r}. Expected layer numbers from 0 and ranges, such as '0-3,7'.")
        layers.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(layers)
