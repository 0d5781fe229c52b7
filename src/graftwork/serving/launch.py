"""Start a server from a run folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from graftwork.core.devices import Placing
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, MissingExtraError
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.pipeline.loading import load
from graftwork.retrieval import open_index
from graftwork.serving.settings import TOKEN_VARIABLE, ServeSettings, check_token

if TYPE_CHECKING:
    import uvicorn

    from graftwork.methods.regrad.answering.gradient_retrieval import Missing
    from graftwork.serving.service import Service
    from graftwork.serving.tenants import Tenant, TenantSettings

BANK_FOLDER = "bank"


def open_service(
    run: str,
    settings: ServeSettings,
    *,
    bank: str | None = None,
    index: str | None = None,
    backend: str | None = None,
    retriever: str | None = None,
    on_missing: str | None = None,
    **placing: Unpack[Placing],
) -> Service:
    """Load a model with its bank and its index into a service.

    `open_tenant` adds further banks of the same model.

    Args:
        run: Run folder of a model with regrad.
        settings: Batching and limits.
        bank: Folder of the bank, or an address such as s3://bucket/bank; None takes the bank of the method's settings,
            else artifacts/bank in the run.
        index: Index to retrieve passages from; None takes the index of the method's settings, if any.
        backend: Engine of the index: embedded, opensearch or elasticsearch.
        retriever: bm25, dense or hybrid; None takes the method's setting, or what the index was built for.
        on_missing: Handling of passages without a gradient: error, skip or encode; None takes the method's setting.
        placing: Device, device map and data type of the model.

    Raises:
        ConfigError: If the model has no regrad adapter, or the bank does not exist.
        FingerprintMismatchError: If the bank was encoded with another model.
    """
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.serving.service import Service

    converted = load(run, **placing)
    configs = [method.config for method in converted.methods if isinstance(method.config, ReGradConfig)]
    if not configs:
        raise ConfigError(f"Found no regrad on the model in {run}. Convert it: graftwork convert regrad MODEL -o RUN.")
    if converted.tokenizer is None:
        raise ConfigError(f"Found no tokenizer in {run}; expected one. Convert the model with its tokenizer.")
    config = configs[0]
    location = bank or config.bank or RunFolder(run).artifacts / BANK_FOLDER
    if not holds_bank(location):
        raise ConfigError(
            f"Found no gradient bank in {location}. Build one with `graftwork bank build`, or name another with --bank."
        )
    named = index or config.index
    if named is None and retriever is not None:
        raise ConfigError(f"Found --retriever {retriever} without an index, which it ranks. Name one with --index.")
    engine = backend or (config.backend if index is None else None)
    opened = None if named is None else open_index(named, engine, retriever=retriever or config.retriever)
    answerer = Answerer(
        converted.model,
        converted.tokenizer,
        GradientBank(location, "a"),
        opened,
        config=config,
        on_missing=cast("Missing", on_missing or config.on_missing),
        batch_size=settings.batch_size,
        in_place=config.in_place,
    )
    return Service(answerer, settings, name=Path(run).resolve().name)


def open_tenant(main: Service, name: str, found: TenantSettings, token: str) -> Tenant:
    """Open bank and index of a tenant, for the model of a service.

    Args:
        main: Service of the server's own bank.
        name: Name of the tenant.
        found: Its bank and index.
        token: Its token.

    Raises:
        ConfigError: If the bank does not exist.
        FingerprintMismatchError: If the bank was encoded with another model.
    """
    from graftwork.methods.regrad.answering.answerer import Answerer
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.serving.service import Service
    from graftwork.serving.tenants import Tenant

    if not holds_bank(found.bank):
        raise ConfigError(
            f"Found no gradient bank of the tenant {name} in {found.bank}. Build one with `graftwork bank build`, or "
            "correct the file of tenants."
        )
    own = main.answerer
    answerer = Answerer(
        own.model,
        own.prompts.tokenizer,
        GradientBank(found.bank, "a"),
        None if found.index is None else open_index(found.index, found.backend),
        config=own.config,
        on_missing=own.gradient_retriever.on_missing,
        batch_size=own.batch_size,
        encoder=own.encoder,
    )
    answerer.in_place = own.in_place
    return Tenant(name, Service(answerer, main.settings, name=main.name, shared=main), token)


def serve(
    open_service: Callable[[], Service],
    settings: ServeSettings,
    *,
    report: Callable[[str], None],
    tenants: str | None = None,
) -> None:
    """Run the server until SIGINT or SIGTERM; requests in progress are finished.

    Args:
        open_service: Loads the model; called after the port is bound, so that a taken port fails at once.
        settings: Address and limits.
        report: Receives a line with the server's address.
        tenants: YAML file of further banks with tokens of their own; None for none.

    Raises:
        ConfigError: If the port is taken, a tenant has no token, or other machines could connect without a token.
        MissingExtraError: If a package of the extra `serve` is not installed.
    """
    token = check_token(settings.host, os.environ.get(TOKEN_VARIABLE) or None, settings.cors_origins)
    for package in ("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if settings.page else [])):
        _require(package)
    import uvicorn

    from graftwork.serving.tenants import read_tenants, tenant_tokens

    named = {} if tenants is None else read_tenants(tenants)
    tokens = tenant_tokens(list(named), token, os.environ) if named else {}
    with _listen(settings) as listening:
        service = open_service()
        others = [open_tenant(service, name, one, tokens[name]) for name, one in named.items()]
        config = server_config(service, token, others)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listening.getsockname()[1]}"
        where = f"{address}/page/" if settings.page else f"{address}/v1/answer"
        report(f"Serving {service.name} at {where}{', token required' if token else ''}")
        uvicorn.Server(config).run(sockets=[listening])


def server_config(service: Service, token: str | None, tenants: Sequence[Tenant] = ()) -> uvicorn.Config:
    """Return the configuration of the HTTP server, with its time-outs and its connection limit.

    Args:
        service: Service of the server's own bank.
        token: Its token; None for none.
        tenants: Further banks with tokens of their own.
    """
    import uvicorn

    from graftwork.serving.app import create_app
    from graftwork.serving.connections import limited_protocol

    return uvicorn.Config(
        create_app(service, token=token, tenants=tenants),
        http=limited_protocol(service.settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=service.settings.keep_alive_timeout,
        timeout_graceful_shutdown=int(service.settings.timeout) + 1,
    )


def _listen(settings: ServeSettings) -> socket.socket:
    """Bind the socket. Done before the model is loaded, which can take minutes."""
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
