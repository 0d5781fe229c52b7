"""Lazy registry of named objects: built-in entries, and entry points of installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

from graftwork.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Lazy mapping from names to objects; an object is imported on first access.

    Args:
        kind: Singular noun for error messages ("method", "task").
        entries: Name → object, or → "module:attribute" string. If the attribute is a mapping, the object is looked up
            in it by the entry's name, so that one table can hold many tasks.
        group: Entry-point group through which installed packages add names; None if the registry is closed.
        tables: "module:attribute" paths of mappings with generated names. They are imported only when a name is in no
            entry, or when all names are listed.
    """

    def __init__(
        self, kind: str, entries: Mapping[str, T | str], group: str | None = None, tables: Sequence[str] = ()
    ) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T | str] = dict(entries)
        paths = [entry.partition(":") for entry in entries.values() if isinstance(entry, str)]
        self._homes = {attribute: module for module, _, attribute in paths}
        self._tables = list(tables)
        self._origins: dict[str, str] = {}
        self._entry_points_read = False

    def get(self, name: str) -> T:
        """Return the object registered under `name`.

        Raises:
            UnknownNameError: If there is none; the message suggests the closest name.
        """
        if name not in self._entries:
            self._read_all()
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        entry = self._entries[name]
        if isinstance(entry, str):
            self._entries[name] = entry = self._load(name, entry)
        return entry

    def path(self, name: str) -> str | None:
        """Return "module:attribute" of an entry that has not been imported yet; None if the object is at hand.

        Raises:
            UnknownNameError: If there is no such name.
        """
        if name not in self:
            raise UnknownNameError(self.kind, name, self._entries)
        entry = self._entries[name]
        return entry if isinstance(entry, str) else None

    def add(self, name: str, entry: T | str) -> None:
        """Register an object in this process.

        Raises:
            ConfigError: If the name is already registered.
        """
        self._read_all()
        if name in self._entries:
            raise ConfigError(f"Found a second {self.kind} called {name!r}. Names must differ; choose another one.")
        self._entries[name] = entry

    def names(self, origin: str | None = None) -> tuple[str, ...]:
        """All registered names, sorted.

        Args:
            origin: Package; restricts the result to names from tables in this package.
        """
        self._read_all()
        if origin is None:
            return tuple(sorted(self._entries))
        return tuple(sorted(name for name, module in self._origins.items() if f"{module}.".startswith(f"{origin}.")))

    def homes(self) -> dict[str, str]:
        """Attribute → module of every built-in "module:attribute" entry, without importing them."""
        return dict(self._homes)

    def __contains__(self, name: object) -> bool:
        self._read_all()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def _load(self, name: str, path: str) -> T:
        module, _, attribute = path.partition(":")
        value: Any = getattr(import_module(module), attribute)
        return cast(T, value[name] if isinstance(value, Mapping) else value)

    def _read_all(self) -> None:
        while self._tables:
            module, _, attribute = self._tables.pop().partition(":")
            for name, entry in getattr(import_module(module), attribute).items():
                self._entries.setdefault(name, entry)
                self._origins.setdefault(name, module)
        self._read_entry_points()

    def _read_entry_points(self) -> None:
        if self._entry_points_read or self.group is None:
            return
        from importlib.metadata import entry_points

        self._entry_points_read = True
        for point in entry_points(group=self.group):
            if point.name in self._entries:
                raise ConfigError(
                    f"Found {self.kind} {point.name!r} twice: it is built in, and {point.value} adds it through the "
                    f"entry-point group {self.group}. Uninstall or rename one of them."
                )
            self._entries[point.name] = point.value
