"""Settings of the server: address, batching, limits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.errors import ConfigError

TOKEN_VARIABLE = "GRAFTWORK_SERVE_TOKEN"
"""Environment variable that holds the bearer token."""
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
"""Host names that need no token."""
_ORIGIN = re.compile(r"\*|https?://[^\s/?#@,]+")


@dataclass(frozen=True)
class ServeSettings:
    """Address, batching and limits of a server."""

    host: str = "127.0.0.1"
    """Address to listen on. Addresses other than this machine's own require a token in GRAFTWORK_SERVE_TOKEN."""
    port: int = 8000
    """Port to listen on; 0 takes a free port and prints it."""
    batch_size: int = 16
    """Maximum number of answers in progress. Raise it until memory is full; lower it if single answers are slow."""
    prefill_tokens: int = 2048
    """Maximum number of prompt tokens, including padding, that are processed between two tokens of the answers in
    progress; a longer prompt is processed alone. Lower it if streams stutter; raise it for throughput."""
    queue_size: int = 128
    """Maximum number of waiting questions; further ones are rejected with 429. Lower it to fail early under load."""
    timeout: float = 60.0
    """Seconds after which a request fails with 504; a stream fails if no token arrives for this long."""
    compact_after: float = 60.0
    """Seconds without requests after which the bytes of deleted passages are removed from the files of bank and index;
    0 for never. Raise it if the disk is slow and shared: questions are answered meanwhile."""
    check_every: int = 1000
    """Number of answers in which all weights are compared once, part by part; lower it on unreliable hardware, at the
    cost of hashing."""
    header_timeout: float = 10.0
    """Seconds within which a client must send the headers of a request; the connection is closed afterwards."""
    body_timeout: float = 30.0
    """Seconds within which a client must send the body of a request, which fails with 408 afterwards, and read
    responses, after which the connection is closed."""
    keep_alive_timeout: int = 75
    """Seconds after which an idle connection is closed. Keep it above the idle time-outs of clients (5 for OpenAI's
    client) and proxies (often 60), whose requests fail if the server closes a connection at the same moment."""
    max_connections: int = 512
    """Maximum number of open connections; further ones get 503. Keep it below the limit of open files."""
    max_body_bytes: int = 1 << 20
    """Maximum size of a request in bytes."""
    max_question_characters: int = 8192
    """Maximum length of a question in characters; the model's context limits it as well."""
    max_passage_characters: int = 65536
    """Maximum length of an added passage in characters."""
    max_passages: int = 64
    """Maximum number of passages that one request adds, names or retrieves."""
    max_new_tokens: int = 256
    """Maximum number of new tokens that a request may ask for."""
    default_new_tokens: int = 20
    """Maximum number of new tokens for requests that set no limit."""
    max_choices: int = 8
    """Maximum number of answers to one request (`n` of OpenAI's API); each takes a row of the batch."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser, such as https://app.example.org; * for all, which needs
    a token. Set it for a web application of your own; programs need none."""
    page: bool = True
    """Serve the web page at /page; turn it off where gradio is not installed or only programs connect."""

    def __post_init__(self) -> None:
        """Validate the settings.

        Raises:
            ConfigError: If a number is out of range.
        """
        counts = (
            "batch_size",
            "prefill_tokens",
            "queue_size",
            "check_every",
            "keep_alive_timeout",
            "max_connections",
            "max_body_bytes",
            "max_question_characters",
            "max_passage_characters",
            "max_passages",
            "max_new_tokens",
            "default_new_tokens",
            "max_choices",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}. Expected a number from 0 to 65535.")
        for name in ("timeout", "header_timeout", "body_timeout"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected seconds above 0.")
        if not (math.isfinite(self.compact_after) and self.compact_after >= 0):
            raise ConfigError(f"compact_after is {self.compact_after}. Expected seconds from 0.")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins contains {origin!r}. Expected scheme, host and port, such as "
                    "https://app.example.org, or *."
                )
        if self.default_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"default_new_tokens is {self.default_new_tokens} and max_new_tokens is {self.max_new_tokens}. "
                "Expected the default not to be above the limit."
            )


def check_token(
    host: str, token: str | None, origins: Sequence[str] = (), *, variable: str = TOKEN_VARIABLE
) -> str | None:
    """Return the token, after checking that host and origins need none or that there is one.

    Args:
        host: Address to listen on.
        token: The token, if any.
        origins: Origins that may call the server from a browser.
        variable: Environment variable of the token, for errors.

    Raises:
        ConfigError: If other machines or any web page could connect without a token, or the token is shorter than 8
            characters.
    """
    if token is None and "*" in origins:
        raise ConfigError(
            "Found cors_origins * and no token, so that every web page could change the bank. Set "
            f"{TOKEN_VARIABLE}, or name the origins."
        )
    if token is None and host not in LOCAL_HOSTS:
        raise ConfigError(
            f"Found host {host} and no token, so that anyone who reaches it could change the bank. Set "
            f"{TOKEN_VARIABLE}, or listen on 127.0.0.1."
        )
    if token is not None and len(token) < 8:
        raise ConfigError(f"Found a token of {len(token)} characters in {variable}; expected at least 8.")
    return token
