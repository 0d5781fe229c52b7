"""Folders of the offline data and models with which every example of the documentation runs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from graftwork.core.cache import cache_folder
from graftwork.core.storage import writing
from graftwork.demo.world.world import build_world
from graftwork.demo.world.writers import write_world

MODELS = ("encoder_decoder", "encoder", "decoder")
"""Names of the tiny pretrained models."""


def shipped_model(name: str) -> str:
    """Return the folder of a tiny pretrained model that ships with the package.

    Args:
        name: "encoder_decoder", "encoder" or "decoder".

    Example:
        >>> shipped_model("encoder_decoder").endswith("encoder_decoder")
        True
    """
    return str(files("graftwork") / "demo" / "models" / name)


def offline_world(folder: str | Path | None = None) -> Path:
    """Return the folder of the offline world: data in the formats of real data sets, and the tiny models in `models/`.

    Args:
        folder: Folder to write to; by default a folder in the user's cache (or in `$GRAFTWORK_CACHE`), which is written
            once.

    Raises:
        StorageError: If the folder cannot be written.

    Example:
        >>> sorted(path.name for path in (offline_world() / "models").iterdir())
        ['decoder', 'encoder', 'encoder_decoder']
    """
    if folder is not None:
        return _write(Path(folder))
    cache = cache_folder()
    target = cache / f"world-{_definition()}"
    if target.exists():
        return target
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".world-", dir=cache))
        try:
            _write(part).chmod(0o755)
            # another process may have written the same content meanwhile
            if not target.exists():
                part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _write(folder: Path) -> Path:
    with writing(folder):
        write_world(build_world(), folder)
        for name in MODELS:
            shutil.copytree(shipped_model(name), folder / "models" / name, dirs_exist_ok=True)
    return folder


def _definition() -> str:
    """Digest of everything the world is made from: the code that writes it, and the models."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).parent
    for path in sorted([*(root / "world").glob("*.py"), *(root / "models").rglob("*.*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
