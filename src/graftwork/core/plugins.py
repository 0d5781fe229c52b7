"""Discovery of optional modules in the method folders, so that no other package has to list the methods."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "methods"


def method_modules(name: str) -> tuple[str, ...]:
    """Dotted names of the modules called `name` in the method folders, sorted by method.

    A method contributes tasks through its module `tables`, commands through `commands`, and so on; methods without that
    module are skipped.
    """
    package = __name__.split(".")[0]
    return tuple(f"{package}.methods.{path.parent.name}.{name}" for path in sorted(_FOLDER.glob(f"*/{name}.py")))
