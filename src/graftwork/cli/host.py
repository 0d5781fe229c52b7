"""Loaders that the command line passes to the commands of methods; imported at the first call."""

from __future__ import annotations

from typing import Any

from graftwork.grafting.commands import Host


def load_run(path: str, *, dtype: str | None = None, device_map: str | None = None) -> Any:
    """Load a model for a method's command; see `graftwork.pipeline.loading.load`."""
    from graftwork.pipeline.loading import load

    return load(path, dtype=dtype, device_map=device_map)


def load_untouched(name: str, *, dtype: str | None = None) -> Any:
    """Load an untouched model for a method's command; see `graftwork.pipeline.loading.load_model`."""
    from graftwork.pipeline.loading import load_model

    return load_model(name, dtype=dtype)


HOST = Host(load_run, load_untouched)
