"""The offline world, tiny models pretrained on it, and a demonstration of every method."""

from __future__ import annotations

from importlib.resources import files


def shipped_model(name: str) -> str:
    """Return the folder of a tiny pretrained model that ships with the package.

    Args:
        name: "encoder_decoder", "encoder" or "decoder".

    Example:
        >>> shipped_model("encoder_decoder").endswith("encoder_decoder")
        True
    """
    return str(files("graftwork") / "demo" / "models" / name)
