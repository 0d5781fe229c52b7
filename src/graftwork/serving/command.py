"""The command `graftwork serve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from graftwork.core.messages import say
from graftwork.grafting.commands import Device, DeviceMap, Dtype


def serve(
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad.")],
    bank: Annotated[
        str | None,
        typer.Option(
            help="Gradient bank: folder, or address such as s3://bucket/bank; artifacts/bank in the run by default."
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(help="Index to retrieve passages from; without it, questions must name their passages."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Engine of the index: embedded, opensearch or elasticsearch.")
    ] = None,
    retriever: Annotated[
        str | None, typer.Option(help="bm25, dense or hybrid; by default what the index was built for.")
    ] = None,
    on_missing: Annotated[
        str | None,
        typer.Option(
            help="Handling of passages without a gradient: error (reject a question that names one), skip (answer with "
            "the others), or encode (compute the gradient). Retrieved ones are left out unless they are encoded."
        ),
    ] = None,
    tenants: Annotated[
        str | None,
        typer.Option(
            help="YAML file of further banks for the same model: name, and bank, index and backend. Each has a token "
            "of its own in GRAFTWORK_SERVE_TOKEN_NAME."
        ),
    ] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Serve answers over HTTP, and a web page; GRAFTWORK_SERVE_TOKEN sets the bearer token."""
    from graftwork.core.config import build
    from graftwork.serving.launch import open_service
    from graftwork.serving.launch import serve as listen
    from graftwork.serving.settings import ServeSettings

    chosen = build(ServeSettings, settings or {}, where="the options")
    listen(
        lambda: open_service(
            run,
            chosen,
            bank=bank,
            index=index,
            backend=backend,
            retriever=retriever,
            on_missing=on_missing,
            device=device,
            device_map=device_map,
            dtype=dtype,
        ),
        chosen,
        report=say,
        tenants=tenants,
    )
