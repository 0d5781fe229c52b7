"""Layer numbers as users write them. Free of torch, so that configurations can check them."""

from __future__ import annotations

from graftwork.errors import ConfigError


def parse_layers(text: str | None, field: str) -> frozenset[int] | None:
    """Read layer numbers such as "0-3,7"; None means every layer.

    Raises:
        ConfigError: If the text is anything else.
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
