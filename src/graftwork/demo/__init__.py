"""The offline world, the tiny models that know it, and the demonstration of every method on both."""

from __future__ import annotations

from importlib.resources import files


def shipped_model(name: str) -> str:
    """Folder of a tiny pretrained model that comes with the package.

    Args:
        name: "encoder_decoder", "encoder" or "decoder".

    Example:
        >>> shipped_model("encoder_decoder").endswith("encoder_decoder")
        True
    """
    return str(files("graftwork") / "demo" / "models" / name)
