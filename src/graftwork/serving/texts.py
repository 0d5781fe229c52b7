"""Types of text in requests: no lone surrogates, no control characters; the OpenAPI document has the same rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from graftwork.errors import ConfigError
from graftwork.retrieval.retriever import UNUSABLE_IN_IDS

Model = TypeVar("Model", bound=BaseModel)

_SURROGATE = re.compile("[\ud800-\udfff]")
# tabs, line feeds, vertical tabs, form feeds and carriage returns are parts of texts
_CONTROL_CLASS = r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
_CONTROL = re.compile(f"[{_CONTROL_CLASS}]")
# characters that `str.strip` removes
_SPACE_CLASS = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def check_text(text: str) -> str:
    """Return a text, such as a question or a title.

    Raises:
        ValueError: If it contains a lone surrogate or a control character other than white space.
    """
    return _without(_CONTROL, text, "Remove it.")


def check_non_blank(text: str) -> str:
    """Return a text that is not only white space.

    Raises:
        ValueError: If it is blank, or contains a lone surrogate or a control character.
    """
    if not text.strip():
        raise ValueError("found no text; expected at least one character that is not white space")
    return check_text(text)


def check_id(text: str) -> str:
    """Return the id of a passage; slashes, #, % and all other printable characters are allowed.

    Raises:
        ValueError: If it contains a lone surrogate, a control character or a line separator.
    """
    return _without(UNUSABLE_IN_IDS, text, "Choose an id of one line without control characters.")


def check_value(value: Any) -> None:
    """Check all texts of a decoded JSON value, including the keys of objects.

    Raises:
        ValueError: If a text contains a lone surrogate or a control character.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            check_text(one)
        elif isinstance(one, Mapping):
            items = cast(Mapping[Any, Any], one)
            waiting += [*items.keys(), *items.values()]
        elif isinstance(one, Sequence):
            waiting += cast(Sequence[Any], one)


def _without(unwanted: re.Pattern[str], text: str, advice: str) -> str:
    found = _SURROGATE.search(text) or unwanted.search(text)
    if found is None:
        return text
    kind = "half a character" if "\ud800" <= found[0] <= "\udfff" else "the control character"
    raise ValueError(f"found {kind} U+{ord(found[0]):04X} at position {found.start()}. {advice}")


def parse(model: type[Model], values: Mapping[str, Any]) -> Model:
    """Validate values that come from a form instead of a request.

    Raises:
        ConfigError: If a value is invalid.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{where}: {reason_of(problem)}.") from None


def reason_of(problem: Mapping[str, Any]) -> str:
    """Reason in a validation error of pydantic, without a final dot."""
    own = problem["type"] == "value_error"
    return str(problem["ctx"]["error"] if own else problem["msg"]).removesuffix(".")


@dataclass(frozen=True)
class _Pattern:
    """Regular expression of a text in the OpenAPI document; validators check the same, with a better message."""

    pattern: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "pattern": self.pattern}


_ANY = f"[^{_CONTROL_CLASS}]*"
Text = Annotated[str, AfterValidator(check_text), _Pattern(f"^{_ANY}$")]
"""Text without lone surrogates and without control characters other than white space."""
NonBlankText = Annotated[
    str, AfterValidator(check_non_blank), _Pattern(f"^{_ANY}[^{_CONTROL_CLASS}{_SPACE_CLASS}]{_ANY}$")
]
"""Text of which at least one character is not white space."""
Identifier = Annotated[
    str, Field(min_length=1, max_length=512), AfterValidator(check_id), _Pattern(f"^[^{UNUSABLE_IN_IDS.pattern[1:]}+$")
]
"""Id of a passage, on one line."""
