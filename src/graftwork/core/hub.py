"""Errors of the hub's client as one sentence each."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from graftwork.errors import ConfigError, GraftworkError

_NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""First parts of the modules whose errors are those of connections."""
_OFFLINE = "HF_HUB_OFFLINE is set, and the cache does not contain it. Unset the variable, or download it first."
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"


def hub_problem(error: BaseException, name: str) -> str | None:
    """Describe an error of the hub's client, or one that it caused: what was found, and what to do.

    Args:
        error: The error.
        name: Id of the repository.

    Returns:
        Two sentences; None for errors of other kinds.
    """
    from huggingface_hub import constants, errors

    for one in _chain(error):
        if isinstance(one, errors.GatedRepoError):
            return (
                f"access to it is restricted (gated). Ask for access at {constants.ENDPOINT}/{name}. {LOGIN} of an "
                "account that has it."
            )
        if isinstance(one, errors.RepositoryNotFoundError):
            return (
                "the hub has no such repository, or it is private. Correct the name. "
                f"{LOGIN} of an account that may read it."
            )
        if isinstance(one, errors.RevisionNotFoundError):
            return "the repository has no such revision. Name an existing branch, tag or commit."
        if isinstance(one, errors.HFValidationError):
            return f"{name!r} is no id of a repository. Expected OWNER/NAME."
        if isinstance(one, errors.OfflineModeIsEnabled):
            return _OFFLINE
        if isinstance(one, errors.LocalTokenNotFoundError):
            return f"found no token of the hub. {LOGIN}."
        if isinstance(one, errors.HfHubHTTPError):
            return _status(one, name)
        if type(one).__module__.startswith(_NETWORK):
            return (
                f"the hub at {constants.ENDPOINT} cannot be reached. Check the network, or download the repository "
                "first and use its folder."
            )
    if any(isinstance(one, errors.LocalEntryNotFoundError) for one in _chain(error)):
        if constants.HF_HUB_OFFLINE:
            return _OFFLINE
        return (
            f"the hub at {constants.ENDPOINT} cannot be reached, and the cache does not contain it. Check the network."
        )
    return None


@contextmanager
def talking_to_hub(action: str, name: str) -> Generator[None]:
    """Convert the errors of the hub's client in this block to one line.

    Args:
        action: Description of the block, such as "push to".
        name: Id of the repository.

    Raises:
        ConfigError: If the repository, the login or the connection is at fault.
    """
    try:
        yield
    except GraftworkError:
        raise
    except Exception as error:
        problem = hub_problem(error, name)
        if problem is None:
            raise
        raise ConfigError(f"Cannot {action} {name}: {problem}") from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that caused it, the first cause last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException, name: str) -> str:
    """Sentence about a response with an error status."""
    response = getattr(error, "response", None)
    code = int(getattr(response, "status_code", 0))
    said = str(getattr(error, "server_message", None) or "").strip().splitlines()
    answer = f"the hub answered {code}{f' ({said[0][:120]})' if said else ''}"
    if code == 401:
        return f"{answer}: the token is missing or not valid. {LOGIN}."
    if code == 403:
        return f"{answer}: the token may not do this. Use one with write access to {name.partition('/')[0]}."
    return f"{answer}. Try again later, or correct the name."
