"""Loaders that the command line passes to the commands of methods; imported at the first call."""

from __future__ import annotations

from typing import Any, Unpack

from graftwork.core.devices import Placing
from graftwork.grafting.commands import Host


def load_run(path: str, **placing: Unpack[Placing]) -> Any:
    """Load a model for a method's command; see `graftwork.pipeline.loading.load`."""
    from graftwork.pipeline.loading import load

    return load(path, **placing)


def load_untouched(name: str, **placing: Unpack[Placing]) -> Any:
    """Load an untouched model for a method's command; see `graftwork.pipeline.loading.load_model`."""
    from graftwork.pipeline.loading import load_model

    return load_model(name, **placing)


HOST = Host(load_run, load_untouched)
