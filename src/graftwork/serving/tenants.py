"""Several banks on one server: each tenant has a token, a bank and an index of its own, and the model is shared."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.core.config import build, read_yaml
from graftwork.errors import ConfigError
from graftwork.serving.settings import TOKEN_VARIABLE, check_token

if TYPE_CHECKING:
    from starlette.requests import Request

    from graftwork.serving.service import Service

SCOPE_KEY = "graftwork.service"
"""Key of the service of a request in its ASGI scope."""
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class TenantSettings:
    """Bank and index of one tenant."""

    bank: str
    """Folder of the bank, or an address such as s3://bucket/bank."""
    index: str | None = None
    """Index to retrieve passages from; without it, questions must name their passages."""
    backend: str | None = None
    """Engine of the index: embedded, opensearch or elasticsearch."""


@dataclass(frozen=True)
class Tenant:
    """A tenant of a running server."""

    name: str
    service: Service
    token: str


class Tenants:
    """Services of one server by bearer token.

    Args:
        main: Service of the server's own bank.
        token: Token of the server's own bank; None answers every request from it.
        others: Further tenants.
    """

    def __init__(self, main: Service, token: str | None, others: Sequence[Tenant] = ()) -> None:
        self.main, self.token, self.others = main, token, tuple(others)

    @property
    def services(self) -> list[Service]:
        """All services, that of the server's own bank first."""
        return [self.main, *(one.service for one in self.others)]

    def find(self, token: bytes) -> Service | None:
        """Return the service of a token; the time does not depend on which tokens are similar."""
        found = None
        for service, own in [(self.main, self.token), *((one.service, one.token) for one in self.others)]:
            if own is not None and secrets.compare_digest(token.strip(), own.encode()):
                found = service
        return found

    def log_in(self, name: str, password: str) -> bool:
        """Return True for a tenant's name with its token, and for any other name with the server's token."""
        expected = next((one.token for one in self.others if one.name == name), self.token)
        return expected is not None and secrets.compare_digest(password.encode(), expected.encode())

    def named(self, name: str | None) -> Service:
        """Return the service of a user of the page."""
        return next((one.service for one in self.others if one.name == name), self.main)


def service_of(request: Request) -> Service:
    """Return the service of the tenant that sent a request."""
    return request.scope[SCOPE_KEY]


def read_tenants(path: str) -> dict[str, TenantSettings]:
    """Read a YAML file with bank, index and backend of each tenant by its name.

    Raises:
        ConfigError: If a name or a setting is invalid.
    """
    content: Mapping[str, Any] = read_yaml(Path(path))
    found: dict[str, TenantSettings] = {}
    for name, values in content.items():
        if not _NAME.fullmatch(str(name)):
            raise ConfigError(
                f"{path} names a tenant {name!r}; expected lower-case letters, digits, - and _, with a letter first."
            )
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} has {values!r} for tenant {name}; expected `bank: FOLDER`, and `index:`.")
        found[str(name)] = build(TenantSettings, cast("Mapping[str, Any]", values), where=f"{path}, tenant {name}")
    if not found:
        raise ConfigError(f"Found no tenants in {path}; expected at least one name with its bank.")
    return found


def tenant_tokens(names: Sequence[str], own: str | None, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the token of each tenant, from environment variables such as GRAFTWORK_SERVE_TOKEN_LAW.

    Args:
        names: Names of the tenants.
        own: Token of the server's own bank.
        variables: Environment variables.

    Raises:
        ConfigError: If a token is missing, too short, or used twice.
    """
    if own is None:
        raise ConfigError(
            "Found tenants and no token of the server's own bank; expected one, because anyone could use that bank. "
            f"Set {TOKEN_VARIABLE}."
        )
    found: dict[str, str] = {}
    for name in names:
        variable = f"{TOKEN_VARIABLE}_{name.upper().replace('-', '_')}"
        token = check_token("127.0.0.1", variables.get(variable) or None, variable=variable)
        if token is None:
            raise ConfigError(f"Found no token of the tenant {name}. Set {variable}.")
        if token in (own, *found.values()):
            raise ConfigError(f"Found one token for two tenants in {variable}; expected different ones.")
        found[name] = token
    return found
