"""Mixers: replacements of attention, each with the settings that it uses; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mixer = Literal["linformer", "feature_map", "linear"]


@dataclass(frozen=True, slots=True)
class MixerSettings:
    """Settings that one mixer uses, and the attention that it replaces."""

    uses: frozenset[str]
    """Names of the settings of `CaldConfig` that belong to mixers and have an effect on this one."""
    causal: bool
    """True if the mixer replaces causal attention of decoders, false for attention of encoders."""
    learns: bool
    """True if the mixer has parameters of its own."""


MIXERS: Mapping[Mixer, MixerSettings] = {
    "linformer": MixerSettings(
        frozenset(
            {
                "rank",
                "share",
                "initialization",
                "length_rule",
                "mask_empty_slots",
                "positions",
                "extend_positions",
                "on_long",
                "form",
                "seed",
                "freeze_steps",
            }
        ),
        causal=False,
        learns=True,
    ),
    "feature_map": MixerSettings(frozenset(), causal=False, learns=False),
    "linear": MixerSettings(
        frozenset({"feature_map", "window", "freeze_steps", "transfer_steps", "transfer_learning_rate"}),
        causal=True,
        learns=True,
    ),
}
"""Mixers by the value of the setting `mixer`."""

MIXER_SETTINGS = frozenset(name for mixer in MIXERS.values() for name in mixer.uses)
"""All settings that belong to one mixer or another."""

TRAINING_SETTINGS = frozenset({"freeze_steps", "transfer_steps", "transfer_learning_rate"})
"""Settings among them that belong to the training and do not change the mixers themselves."""
