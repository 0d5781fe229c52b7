"""Callbacks that run after a library has been imported, so that extending it does not import it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder:
    """Finder that delegates to the other finders and adds the callbacks to the modules that have some."""

    def __init__(self) -> None:
        self.pending: dict[str, list[str]] = {}
        self.begun: dict[str, list[str]] = {}
        """Callbacks of modules whose import had begun already; called at the first import after it has ended."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of a module with callbacks; None for any other module."""
        for module in [module for module in self.begun if not _is_being_imported(module)]:
            for callback in self.begun.pop(module, ()):
                _call(callback)
        if name not in self.pending:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                return self._extended(name, spec)
        return None

    def _extended(self, name: str, spec: ModuleSpec) -> ModuleSpec:
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # removed first: the loader stays with the module
            del loader.exec_module
            execute(module)
            for callback in self.pending.pop(name, ()):
                _call(callback)

        loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def after_import(module: str, callback: str) -> None:
    """Call a function after a module has been imported; at once if it already is.

    An exception of the function becomes a warning, so that the module remains importable.

    Args:
        module: Dotted name of the module.
        callback: Function without arguments, as "module:attribute"; imported when it is called.
    """
    begun = _is_being_imported(module)
    if module in sys.modules and not begun:
        _call(callback)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    waiting = (_FINDER.begun if begun else _FINDER.pending).setdefault(module, [])
    if callback not in waiting:
        waiting.append(callback)


def _is_being_imported(module: str) -> bool:
    """True while a module is executed for the first time, as when it imports torch, which calls `autoload`."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _call(callback: str) -> None:
    home, _, attribute = callback.partition(":")
    try:
        getattr(import_module(home), attribute)()
    # an incompatible version of the library must not make it unusable
    except Exception as error:
        warnings.warn(f"Graftwork cannot extend {home}: {type(error).__name__}: {error}", stacklevel=2)


def autoload() -> None:
    """Entry point of `torch.backends`, called by `import torch`; the import of this module has registered the hooks."""
