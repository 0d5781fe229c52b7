"""`graftwork serve`: answers over HTTP, and a page."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwork.core.messages import say
from graftwork.grafting.commands import DeviceMap, Dtype


def serve(
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad.")],
    bank: Annotated[
        str | None,
        typer.Option(
            help="The bank: a folder, or an address such as s3://bucket/bank; artifacts/bank in the run by default."
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Index to find passages in. Without one, questions must name theirs.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Engine of the index: embedded or elasticsearch.")] = None,
    on_missing: Annotated[
        str | None, typer.Option(help="What to do about a passage without gradient: error, skip or encode.")
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    settings: Any = None,
) -> None:
    """Answer over HTTP from a bank of gradients, and show a page; the bearer token is in GRAFTWORK_SERVE_TOKEN."""
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
            on_missing=on_missing,
            dtype=dtype,
            device_map=device_map,
        ),
        chosen,
        tell=say,
    )
