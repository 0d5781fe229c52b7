"""Discovery of the optional modules of method folders, so that nothing to the left of a method names it."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "methods"


def method_modules(name: str) -> tuple[str, ...]:
    """Dotted names of the modules called `name` in the method folders, sorted by method.

    A method contributes tasks by a module `tables`, commands by `commands`, and so on; a method without that module
    contributes nothing.
    """
    package = __name__.split(".")[0]
    return tuple(f"{package}.methods.{path.parent.name}.{name}" for path in sorted(_FOLDER.glob(f"*/{name}.py")))
