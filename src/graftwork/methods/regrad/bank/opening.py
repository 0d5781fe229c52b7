"""Storage backend of a bank's location."""

from __future__ import annotations

import re
from pathlib import Path

from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank.backends import Backend, LocalBackend

_URL = re.compile(r"([a-z0-9+]+)://(.*)")


def backend_for(location: str | Path | Backend) -> Backend:
    """Return the storage backend of a folder or of an s3://bucket/name, gs://bucket/name or az://container/name URL.

    Raises:
        ConfigError: If the URL has another scheme.
        MissingExtraError: If the location is in an object store and obstore is not installed.
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
