"""Numbers of kept scores that differ by layer: lists, ranges of layers, and shares that are calibrated. Torch-free."""

from __future__ import annotations

from graftwork.errors import ConfigError
from graftwork.surgery.layers import parse_layers

AUTO = "auto:"
"""Prefix of a share of the activation mass, from which k is calibrated."""

Number = int | float | None
Setting = int | float | str | tuple[Number, ...] | None


def kept_share(setting: Setting, field: str) -> float | None:
    """Share of `auto:0.95`; None for other settings.

    Raises:
        ConfigError: If the share is not above 0 and below 1.
    """
    if not isinstance(setting, str) or not setting.startswith(AUTO):
        return None
    try:
        share = float(setting.removeprefix(AUTO))
    except ValueError:
        share = 0.0
    if not 0.0 < share < 1.0:
        raise ConfigError(f"{field} is {setting!r}. Expected auto: and a share above 0 and below 1, such as auto:0.95.")
    return share


def by_layer(setting: Setting, field: str) -> dict[int, Number] | None:
    """Number of each layer of a list or of ranges such as "0-3:256,4-11:64"; None for a setting of all layers.

    Raises:
        ConfigError: If the text is neither, or names a layer twice.
    """
    if isinstance(setting, tuple):
        return dict(enumerate(setting))
    if not isinstance(setting, str) or setting.startswith(AUTO):
        return None
    found: dict[int, Number] = {}
    for part in setting.split(","):
        layers, colon, number = part.strip().rpartition(":")
        value = _number(number)
        if not colon or value is None:
            raise ConfigError(
                f"{field} is {setting!r}. Expected a number, a list with one number for each layer, ranges of layers "
                "such as '0-3:256,4-11:64', or a share such as auto:0.95."
            )
        for layer in parse_layers(layers, field) or ():
            if layer in found:
                raise ConfigError(f"{field} is {setting!r}, which names layer {layer} twice. Name each layer once.")
            found[layer] = value
    return found


def of_layer(setting: Setting, layer: int, field: str) -> Number:
    """Number of a layer; None if its layer is not changed."""
    numbers = by_layer(setting, field)
    if numbers is not None:
        return numbers.get(layer)
    if isinstance(setting, (str, tuple)):
        raise ConfigError(f"{field} is {setting!r}, which is calibrated from examples. Call calibrate first.")
    return setting


def check_layers(setting: Setting, count: int, field: str) -> None:
    """Check a setting against the number of layers of a model.

    Raises:
        ConfigError: If a list has another length, or a range names a layer that the model does not have.
    """
    numbers = by_layer(setting, field)
    if numbers is None:
        return
    if isinstance(setting, tuple) and len(setting) != count:
        raise ConfigError(
            f"{field} has {len(setting)} numbers. Expected {count}, one for each layer; null leaves a layer dense."
        )
    if numbers and max(numbers) >= count:
        raise ConfigError(f"{field} names layer {max(numbers)}. Expected layers from 0 to {count - 1}.")


def _number(text: str) -> int | float | None:
    """A whole number, or a share with a decimal point."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return None
