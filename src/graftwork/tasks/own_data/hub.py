"""Data sets of the Hugging Face hub, or local folders that `datasets` opens, as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from graftwork.core.storage import disk_error
from graftwork.errors import ConfigError, DataError

HUB_SPLITS: Mapping[str, str] = {"dev": "validation", "val": "validation"}
"""Names of splits on the hub by ours."""


@dataclass(frozen=True, slots=True)
class HubName:
    """Name of a data set: id or folder, configuration and split."""

    path: str
    config: str | None = None
    split: str | None = None


def parse_hub_name(name: str) -> HubName:
    """Parse `hub:ID[:CONFIGURATION[:SPLIT]]`; an empty configuration is the default one.

    Raises:
        ConfigError: If the id is empty, or there are more than three parts.
    """
    path, *more = name.removeprefix("hub:").split(":")
    if not path or len(more) > 2:
        raise ConfigError(f"Found {name!r}. Expected hub:ID, hub:ID:CONFIGURATION or hub:ID:CONFIGURATION:SPLIT.")
    config, split = [*more, "", ""][:2]
    return HubName(path, config or None, split or None)


def hub_rows(name: HubName) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, row) for every row of a split; class numbers are replaced by class names.

    No code of the data set is executed: `datasets` reads data files only.

    Raises:
        DataError: If the data set or its split cannot be loaded.
    """
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    load = cast("Callable[..., Any]", datasets.load_dataset)  # pyright: ignore[reportUnknownMemberType]
    split = HUB_SPLITS.get(name.split or "", name.split)
    try:
        loaded = load(name.path, name.config, split=split)
        classes: dict[str, list[str]] = {
            column: feature.names
            for column, feature in dict(loaded.features).items()
            if isinstance(feature, datasets.ClassLabel)
        }
        rows = cast("Iterable[Mapping[str, Any]]", loaded)
    except Exception as error:
        # datasets raises errors of Arrow, of the hub client and of its own beside those of Python
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise disk_error(error) or DataError(
            f"hub:{name.path}: found no split {split!r}"
            + (f" of configuration {name.config!r}" if name.config else "")
            + f" to load ({reason}). Expected a data set of the hub, of this machine's cache, or a folder. Check id, "
            "configuration, split and network."
        ) from error
    for number, row in enumerate(rows, start=1):
        named = {column: _named(row[column], names) for column, names in classes.items()}
        yield f"hub:{name.path} ({split}), row {number}", {**row, **named}


def _named(value: Any, names: list[str]) -> Any:
    # -1 marks rows without a class
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
