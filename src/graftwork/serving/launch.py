"""From a run folder to a server that listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, MissingExtraError
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.pipeline.loading import load
from graftwork.retrieval import open_index
from graftwork.serving.settings import TOKEN_VARIABLE, ServeSettings, check_token

if TYPE_CHECKING:
    from graftwork.serving.service import Service

BANK_FOLDER = "bank"


def open_service(
    run: str,
    settings: ServeSettings,
    *,
    bank: str | None = None,
    index: str | None = None,
    backend: str | None = None,
    on_missing: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
) -> Service:
    """Load a model with its bank and its index.

    Args:
        run: Run folder of a model with regrad.
        settings: Sizes and limits.
        bank: The bank, a folder or an address such as s3://bucket/bank; by default what the settings of the method
            name, else artifacts/bank in the run.
        index: Index to find passages in; by default what the settings of the method name, if any.
        backend: Engine of the index.
        on_missing: What to do about a passage without gradient; by default as the settings of the method say.
        dtype: Data type of the weights.
        device_map: As in `from_pretrained`.

    Raises:
        ConfigError: If regrad is not on the model, or there is no bank.
        FingerprintMismatchError: If the bank is another model's.
    """
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.serving.service import Service

    converted = load(run, dtype=dtype, device_map=device_map)
    configs = [method.config for method in converted.methods if isinstance(method.config, ReGradConfig)]
    if not configs:
        raise ConfigError(f"Found no regrad on the model in {run}. Convert it: graftwork convert regrad MODEL -o RUN.")
    config = configs[0]
    location = bank or config.bank or RunFolder(run).artifacts / BANK_FOLDER
    if not holds_bank(location):
        raise ConfigError(
            f"Found no gradient bank in {location}. Build one with `graftwork bank build`, or name another."
        )
    named = index or config.index
    retriever = None if named is None else open_index(named, backend or (config.backend if index is None else None))
    chosen: Any = on_missing or config.on_missing
    answerer = Answerer(
        converted.model,
        converted.tokenizer,
        GradientBank(location, "a"),
        retriever,
        config=config,
        on_missing=chosen,
        batch_size=settings.batch_size,
        in_place=config.in_place,
    )
    return Service(answerer, settings, name=Path(run).resolve().name)


def serve(open_it: Callable[[], Service], settings: ServeSettings, *, tell: Callable[[str], None]) -> None:
    """Listen until the process is told to end; requests at work are finished.

    Args:
        open_it: Loads the model; called once it is clear that the server may listen at all.
        settings: Where to listen.
        tell: Takes a line about where the server is.

    Raises:
        ConfigError: If others could reach it without a token.
        MissingExtraError: If a package for serving is not installed.
    """
    token = check_token(settings.host, os.environ.get(TOKEN_VARIABLE) or None)
    for package in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if settings.page else [])):
        _require(package)
    import uvicorn

    from graftwork.serving.app import create_app

    with _listen(settings) as listening:
        service = open_it()
        config = uvicorn.Config(
            create_app(service, token=token),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.timeout) + 1,
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listening.getsockname()[1]}"
        where = f"{address}/page/" if settings.page else f"{address}/v1/answer"
        tell(f"Serving {service.name} at {where}{', which asks for the token' if token else ''}")
        uvicorn.Server(config).run(sockets=[listening])


def _listen(settings: ServeSettings) -> socket.socket:
    """The socket, taken before the model is loaded, which can take minutes."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {settings.host}, port {settings.port} ({error.strerror or error}). Choose another port, "
            "or 0 for a free one."
        ) from None


def _require(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(package.replace("_", "-"), "serve")
