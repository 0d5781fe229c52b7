"""Choice of the storage backend for a bank's location."""

from __future__ import annotations

import re
from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank.backends import Backend, LocalBackend

_URL = re.compile(r"([a-z0-9+]+)://(.*)")


def backend_for(location: str | Path | Backend) -> Backend:
    """The backend that a user names: a folder, or s3://bucket/name, gs://bucket/name, az://container/name.

    Raises:
        ConfigError: If it is the address of something else.
        MissingExtraError: If the package for object stores is needed and not installed.
    """
    if isinstance(location, Backend):
        return location
    url = _URL.fullmatch(str(location))
    if url is None:
        return LocalBackend(Path(location))
    from graftwork.methods.regrad.bank.object_store import SCHEMES, ObjectStoreBackend

    if url[1] not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f"Found {location} for a bank; expected a folder, or an address with one of: {known}.")
    return ObjectStoreBackend(url[1], url[2])
