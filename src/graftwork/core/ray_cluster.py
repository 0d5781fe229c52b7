"""Ray: start or connection, and the resources that actors reserve."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from graftwork.errors import ConfigError, MissingExtraError


def open_ray() -> Any:
    """Return the `ray` module, connected to a cluster; started on this machine if there is none.

    Raises:
        MissingExtraError: If Ray is not installed.
    """
    try:
        ray: Any = import_module("ray")
        import_module("ray.data")
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def check_cpus(ray: Any, workers: int, cpus_per_worker: float, *, readers: int = 1) -> None:
    """Verify that the CPUs exist which the actors reserve, and those of Ray's readers beside them.

    Args:
        ray: The `ray` module.
        workers: Number of actors.
        cpus_per_worker: Number of CPUs per actor.
        readers: Number of CPUs for Ray Data's readers; 0 without them.

    Raises:
        ConfigError: If they do not.
    """
    available = float(ray.cluster_resources().get("CPU", 0))
    if workers < 1 or available - workers * cpus_per_worker < readers:
        needed = "one CPU left for readers, because Ray deadlocks without" if readers else "as many, or Ray waits"
        raise ConfigError(
            f"Found {workers} workers of {cpus_per_worker:g} CPUs, and {available:g} CPUs; expected {needed}. "
            "Use fewer workers, or fewer CPUs per worker."
        )


def check_gpus(ray: Any, workers: int, gpus_per_worker: float) -> None:
    """Verify that the GPUs which the actors reserve exist; Ray waits for them without end.

    Args:
        ray: The `ray` module.
        workers: Number of actors.
        gpus_per_worker: Number of GPUs per actor; a fraction shares one.

    Raises:
        ConfigError: If they do not.
    """
    available = float(ray.cluster_resources().get("GPU", 0))
    if workers * gpus_per_worker > available:
        raise ConfigError(
            f"Found {workers} workers of {gpus_per_worker:g} GPUs, and {available:g} GPUs. Use fewer workers, or a "
            "smaller --gpus-per-worker: a fraction shares a GPU, 0 computes on CPUs."
        )
