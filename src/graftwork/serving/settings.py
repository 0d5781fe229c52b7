"""The settings of the server: where it listens, how requests share a batch, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graftwork.errors import ConfigError

TOKEN_VARIABLE = "GRAFTWORK_SERVE_TOKEN"
"""Environment variable that holds the bearer token."""
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """How a server listens, batches and protects itself."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a token in GRAFTWORK_SERVE_TOKEN."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and says which."""
    batch_size: int = 16
    """Questions answered at once, at most; each with passages and strength of its own."""
    batch_wait: float = 0.005
    """Seconds that a question waits for others to share its batch; 0 answers at once."""
    queue_size: int = 128
    """Questions that may wait; further ones are refused with 429."""
    timeout: float = 60.0
    """Seconds after which a request is given up with 504."""
    check_every: int = 1000
    """Answers between two checks of all weights; the answers in between are sent before the check."""
    max_body_bytes: int = 1 << 20
    """Longest request, in bytes."""
    max_question_characters: int = 8192
    """Longest question; the model's own limit holds besides."""
    max_passage_characters: int = 65536
    """Longest passage that may be added."""
    max_passages: int = 64
    """Passages that may be added, named or retrieved in one request."""
    max_new_tokens: int = 256
    """Tokens that a request may ask for."""
    default_new_tokens: int = 20
    """Tokens generated at most where the request does not say."""
    page: bool = True
    """Show the page at /page."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: If a number is out of range.
        """
        counts = (
            "batch_size",
            "queue_size",
            "check_every",
            "max_body_bytes",
            "max_question_characters",
            "max_passage_characters",
            "max_passages",
            "max_new_tokens",
            "default_new_tokens",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}. Expected a number from 0 to 65535.")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError(f"timeout is {self.timeout}. Expected seconds above 0.")
        if not 0 <= self.batch_wait <= 1:
            raise ConfigError(f"batch_wait is {self.batch_wait}. Expected seconds from 0 to 1.")
        if self.default_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"default_new_tokens is {self.default_new_tokens} and max_new_tokens is {self.max_new_tokens}. "
                "Expected the default not to be above the limit."
            )


def check_token(host: str, token: str | None) -> str | None:
    """The token, if there must be one there is one.

    Raises:
        ConfigError: If others than this machine could ask without a token, or the token is too short to be one.
    """
    if token is None and host not in LOCAL_HOSTS:
        raise ConfigError(
            f"Found host {host} and no token, so that anyone who reaches it could change the bank. Put one into "
            f"{TOKEN_VARIABLE}, or listen on 127.0.0.1."
        )
    if token is not None and len(token) < 8:
        raise ConfigError(f"Found a token of {len(token)} characters in {TOKEN_VARIABLE}; expected at least 8.")
    return token
