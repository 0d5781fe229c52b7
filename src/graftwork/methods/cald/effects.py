"""Settings of guides and initialisations that have no effect together with others, which a new conversion refuses.

Settings of mixers are checked by the configuration; `mixers.MIXERS` declares them. The guide dense, the baseline of a
sweep over guides, accepts the settings of the others' mixers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from graftwork.errors import ConfigError
from graftwork.methods.cald.config import CaldConfig

Condition = tuple[str, Callable[[CaldConfig], bool]]
"""Condition under which a setting has an effect: its words, and a function of all settings."""

_TRAJECTORY: Condition = "guide trajectory", lambda config: config.guide == "trajectory"
_WAYPOINT: Condition = "guide waypoint", lambda config: config.guide == "waypoint"
_FIXED: Condition = (
    "guide target, hybrid or waypoint",
    lambda config: config.guide in ("target", "hybrid", "waypoint"),
)
_OUTPUTS: Condition = "output_weight above 0", lambda config: config.effective_output_weight > 0
_DISTANCE: Condition = (
    "a teacher",
    lambda config: config.teacher is not None or config.guide not in ("dense", "unguided"),
)

CONDITIONS: dict[str, Condition] = {
    "seed": (
        "initialization gaussian or svd, which draw random numbers",
        lambda config: config.guide == "dense" or config.effective_initialization in ("gaussian", "svd"),
    ),
    "replacement_steps": ("a guide other than dense", lambda config: config.guide != "dense"),
    **dict.fromkeys(("teacher_learning_rate", "teacher_update_cycle", "teacher_schedule", "save_teacher"), _TRAJECTORY),
    **dict.fromkeys(("snapshots", "waypoint_rule"), _WAYPOINT),
    "teacher_mode": _FIXED,
    **dict.fromkeys(("temperature", "scale_output_loss", "divergence"), _OUTPUTS),
    **dict.fromkeys(
        ("layer_loss", "layer_norm", "layer_reduction", "skip_first_layers", "skip_last_layers", "mask_layer_loss"),
        _DISTANCE,
    ),
}
"""Condition of each setting that needs another one."""


def check_effects(config: CaldConfig) -> None:
    """Refuse the first setting that has been changed and has no effect.

    Raises:
        ConfigError: If there is one.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        condition = CONDITIONS.get(each.name)
        if condition is None or value == each.default or condition[1](config):
            continue
        words = condition[0]
        raise ConfigError(
            f"{each.name} is {value!r}, which has no effect: it needs {words}. Omit {each.name}, or change that."
        )
