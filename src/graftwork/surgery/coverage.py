"""Table of the model types of transformers: which method can change which, as found by a sweep over all of them.

`make coverage` writes the table. Torch-free, so that the command line can list it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import cast

COLUMNS = ("topk attention", "topk feed-forward", "sparsefinder", "cald", "regrad", "wt5")
"""Columns of the table: a method, or a part of a method."""
VERIFIED = "verified"


@cache
def table() -> Mapping[str, Mapping[str, str]]:
    """Model type → column → "verified" or "refused: " with the reason.

    "verified" means that a tiny random model of the type, converted with settings that must change nothing, equals the
    dense model in logits with padding, in gradients, and in cached greedy generation, to 1e-5.
    """
    return cast("Mapping[str, Mapping[str, str]]", _stored()["types"])


def version() -> str:
    """Version of transformers that the table describes."""
    return str(_stored()["transformers"])


@cache
def _stored() -> Mapping[str, object]:
    text = (files("graftwork.surgery") / "coverage.json").read_text(encoding="utf-8")
    return cast("Mapping[str, object]", json.loads(text))
