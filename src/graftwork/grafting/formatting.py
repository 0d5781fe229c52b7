"""Examples as the methods of a model format them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from graftwork.core.example import Example
from graftwork.core.stored_rows import has_metadata, map_rows
from graftwork.errors import ConfigError
from graftwork.grafting.capabilities import FormatsExamples
from graftwork.grafting.converted import Converted


def formatted_rows(
    converted: Converted,
    rows: Sequence[Example],
    *,
    mode: str = "fixed",
    training: bool = False,
    explain: bool | None = None,
) -> Sequence[Example]:
    """Return examples with the prompts and targets of the model's methods; see `FormatsExamples`.

    Args:
        converted: The model.
        rows: Examples as their task formats them.
        mode: Mode of the task.
        training: True for examples of a training.
        explain: Whether answers have explanations; None for the default of the method.

    Raises:
        ConfigError: If a method changes examples that reproduce the authors' code.
    """
    found = rows
    for method in converted.methods:
        if not isinstance(method, FormatsExamples) or not method.formats:
            continue
        if mode == "reference" and has_metadata(rows, "explain"):
            raise ConfigError(
                f"mode is reference, and {method.name} changes the examples (explanation_order). Expected mode fixed: "
                "the authors' code has one order only. Leave out one of the two."
            )
        found = map_rows(found, partial(method.formatted, training=training, explain=explain))
    return found
