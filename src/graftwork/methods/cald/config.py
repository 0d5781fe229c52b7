"""The settings of conversion to linear-complexity attention, and of the guides under which it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError

Guide = Literal["dense", "unguided", "target", "trajectory", "waypoint", "hybrid"]
Share = Literal["none", "kv", "layer", "head", "key_value", "headwise"]
Initialization = Literal["gaussian", "segment_mean", "identity", "svd"]
LengthRule = Literal["inv_sqrt", "slot_mean", "none"]
OnLong = Literal["error", "truncate", "interpolate"]

_ALIASES = {"key_value": "kv", "headwise": "none"}
_WITH_SNAPSHOT = ("target", "hybrid")


@dataclass(frozen=True)
class CaldConfig:
    """Which layers become linear, how, and which teacher the conversion follows."""

    mixer: Literal["linformer", "feature_map"] = "linformer"
    """What takes the place of attention: linformer (tokens compressed to rank slots), or feature_map (softmax-free, any
    length, nothing learned)."""
    rank: int | tuple[int, ...] | str = 256
    """Slots that the tokens are compressed to; a list gives each converted layer its own. Well below the sequence
    length, or nothing is gained. auto:0.95 lets the first training examples decide: the smallest rank of each layer
    that can keep that share of what its attention maps hold (squared entries), in steps of 8."""
    share: Share = "none"
    """What the compression matrices are shared over: none (keys and values of every layer have their own), kv (one for
    both), layer (one for the whole model), head (own ones for every head too); headwise and key_value are other words
    for none and kv."""
    initialization: Initialization = "gaussian"
    """How the matrices start: gaussian, segment_mean (a slot averages neighbours), identity (a slot is a position; no
    compression for sequences up to the rank), svd (from the teacher's attention on the first training examples;
    gaussian until then)."""
    length_rule: LengthRule | None = None
    """What compressed tokens are divided by: inv_sqrt (root of the number of tokens), slot_mean (tokens on the slot's
    starting positions), none; null goes by the initialisation."""
    mask_empty_slots: bool | None = None
    """Keep attention away from slots on whose starting positions no token stands; null goes by the initialisation."""
    positions: int | None = None
    """Rows of the matrices: the longest sequence; null for what the model's config says."""
    on_long: OnLong = "error"
    """What to do with a longer sequence: error, truncate (keys beyond are left out), interpolate (stretch the
    matrices)."""
    form: Literal["auto", "projected", "compressed"] = "auto"
    """Order of the computation; changes speed, never the result: projected compresses keys and values, compressed
    compresses hidden states before they become keys and values, auto chooses by length."""
    layers: str | None = None
    """Layer numbers to convert, from 0, such as "0-3,7"; null converts every layer."""
    seed: int = 0
    """Seed of the Gaussian initialisation."""
    guide: Guide = "unguided"
    """Whom the student follows while it is fine-tuned: dense (no conversion, for comparison), unguided (nobody), target
    (a fine-tuned model), trajectory (the model while it is being fine-tuned itself), waypoint (snapshots of that),
    hybrid (the target, at first only)."""
    teacher: str | None = None
    """Run folder, model folder or weights file of the fine-tuned model; for target and hybrid. Under any other guide
    distances are measured to it, and it has no part in training."""
    snapshots: str | None = None
    """Pattern of the snapshots' folders, such as "runs/dense/train/distill/checkpoint-*"; for waypoint."""
    waypoint_rule: Literal["equal_split", "next_ahead"] = "equal_split"
    """Which snapshot guides an update: equal_split (each for an equal share of all updates), next_ahead (the first one
    whose number is larger than the update's)."""
    student_init: Literal["source", "target"] | None = None
    """Weights that the student starts from: source (the converted model's own) or target (the teacher's); null is
    target for target and hybrid, else source."""
    layer_weight: float | None = None
    """Weight of the distance between the layers of student and teacher; null is 1 with a teacher, else 0."""
    output_weight: float = 0.0
    """Weight of the divergence between the outputs of student and teacher."""
    distill_steps: int | None = None
    """Updates after which the teacher is left; null never. Required by hybrid."""
    freeze_steps: int | None = None
    """Updates at first in which only the new matrices are trained; null for none."""
    teacher_learning_rate: float | None = None
    """Peak learning rate of the moving teacher; null for the student's."""
    teacher_update_cycle: int = 1
    """The moving teacher is updated in every so manieth update of the student."""
    teacher_schedule: Literal["own", "reference"] | None = None
    """Learning rate of the moving teacher: own (ends at 0 with its last update), reference (the student's schedule,
    advanced when the teacher is updated); null is own."""
    teacher_mode: Literal["eval", "train"] | None = None
    """Whether a fixed teacher drops out; null is eval."""
    temperature: float = 2.0
    """Temperature of the divergence between outputs."""
    scale_output_loss: bool = True
    """Multiply the divergence by the temperature squared."""
    layer_loss: Literal["mse", "cosine"] = "mse"
    """Distance between hidden states."""
    layer_norm: Literal["none", "layernorm", "rmsnorm", "loss_norm"] = "none"
    """What hidden states go through before they are compared: none for models that normalise after a layer, layernorm
    for those that do before; loss_norm divides the distance by its own value."""
    layer_reduction: Literal["sum", "mean"] = "sum"
    """How the distances of the layers are put together."""
    skip_first_layers: int = 0
    """Hidden states left out at the front, the embeddings being the first."""
    skip_last_layers: int = 0
    """Hidden states left out at the end."""
    mask_layer_loss: bool | None = None
    """Leave padding out of the distance; null is true."""
    save_teacher: bool = False
    """Write the moving teacher, once trained, beside the checkpoints."""
    compat: Literal["reference"] | None = None
    """reference does as the authors' code did wherever the setting is null: dropout in a fixed teacher, padding in the
    distance, their teacher schedule, their division in a short accumulation window, a warm-up of 4 %."""

    def __post_init__(self) -> None:
        """Settle aliases and refuse what does not go together.

        Raises:
            ConfigError: If a value is out of range, or a guide lacks or refuses a setting.
        """
        object.__setattr__(self, "share", _ALIASES.get(self.share, self.share))
        self._check_numbers()
        self._check_mixer()
        self._check_guide()
        from graftwork.surgery.layers import parse_layers

        parse_layers(self.layers, "layers")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, or the ranks of the layers; none while examples are to decide."""
        if isinstance(self.rank, str):
            return ()
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    @property
    def kept_share(self) -> float | None:
        """The share of the attention maps that an automatic rank must keep; None for a rank that is given."""
        if not isinstance(self.rank, str):
            return None
        word, _, number = self.rank.partition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if word != "auto" or not 0 < share < 1:
            raise ConfigError(
                f"rank is {self.rank!r}. Expected whole numbers from 1, or auto: and a share above 0 and below 1, such "
                "as auto:0.95."
            )
        return share

    @property
    def has_slots(self) -> bool:
        """Whether the initialisation gives each slot positions of its own."""
        return self.initialization in ("segment_mean", "identity")

    @property
    def effective_length_rule(self) -> LengthRule:
        """The length rule, settled."""
        return self.length_rule or ("slot_mean" if self.has_slots else "inv_sqrt")

    @property
    def masks_empty_slots(self) -> bool:
        """Whether empty slots are hidden, settled."""
        return self.has_slots if self.mask_empty_slots is None else self.mask_empty_slots

    @property
    def effective_layer_weight(self) -> float:
        """The weight of the layer distance, settled."""
        if self.layer_weight is not None:
            return self.layer_weight
        return 0.0 if self.guide in ("dense", "unguided") else 1.0

    @property
    def starts_from_target(self) -> bool:
        """Whether the student starts from the teacher's weights."""
        return (self.student_init or ("target" if self.guide in _WITH_SNAPSHOT else "source")) == "target"

    @property
    def loss_is_masked(self) -> bool:
        """Whether padding is left out of the layer distance, settled."""
        return self.compat is None if self.mask_layer_loss is None else self.mask_layer_loss

    @property
    def teacher_drops_out(self) -> bool:
        """Whether a fixed teacher is in training mode, settled."""
        return (self.teacher_mode or ("eval" if self.compat is None else "train")) == "train"

    @property
    def own_teacher_schedule(self) -> bool:
        """Whether the moving teacher's learning rate ends at 0, settled."""
        return (self.teacher_schedule or ("own" if self.compat is None else "reference")) == "own"

    def _check_numbers(self) -> None:
        positive = {
            "rank": min(self.ranks, default=1 if self.kept_share else 0),
            "positions": self.positions,
            "distill_steps": self.distill_steps,
            "freeze_steps": self.freeze_steps,
            "teacher_update_cycle": self.teacher_update_cycle,
        }
        for name, value in positive.items():
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}. Expected whole numbers from 1; to switch it off, leave it out."
                )
        for name in ("temperature", "teacher_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}. Expected a number above 0.")
        for name in ("layer_weight", "output_weight", "skip_first_layers", "skip_last_layers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}. Expected a number from 0.")

    def _check_mixer(self) -> None:
        if self.share == "layer" and len(set(self.ranks)) > 1:
            raise ConfigError(
                f"rank is {list(self.ranks)} and share is 'layer'. One matrix for all layers has one rank; give a "
                "single number, the largest, or share less."
            )
        if self.share == "head" and self.form == "compressed":
            raise ConfigError(
                "form is 'compressed' and share is 'head'. With a matrix for every head, compressing hidden states "
                "costs as many times more as there are heads; set form to auto or projected."
            )
        if self.effective_length_rule == "slot_mean" and not self.has_slots:
            raise ConfigError(
                f"length_rule is 'slot_mean' and initialization is {self.initialization!r}, under which slots have no "
                "positions of their own. Expected initialization segment_mean or identity; or set length_rule to "
                "inv_sqrt."
            )
        if self.masks_empty_slots and not self.has_slots:
            raise ConfigError(
                f"mask_empty_slots is on and initialization is {self.initialization!r}, under which slots have no "
                "positions of their own. Set mask_empty_slots to false, or initialization to segment_mean or identity."
            )

    def _check_guide(self) -> None:
        guide = self.guide
        if guide in ("dense", "unguided"):
            if (self.layer_weight or 0) > 0 or self.output_weight > 0:
                raise ConfigError(
                    f"guide is {guide!r}, which has no teacher, and layer_weight or output_weight is above 0. Leave "
                    "both out, or choose a guide that has one."
                )
            if self.distill_steps is not None:
                raise ConfigError(f"guide is {guide!r}, which has no teacher to leave. Leave distill_steps out.")
        if guide in _WITH_SNAPSHOT and self.teacher is None:
            raise ConfigError(
                f"guide is {guide!r} and teacher is null. Give the run, folder or weights of a fine-tuned dense model."
            )
        if guide == "waypoint" and self.snapshots is None:
            raise ConfigError(
                "guide is 'waypoint' and snapshots is null. Give a pattern such as "
                "'runs/dense/train/distill/checkpoint-*'."
            )
        if guide == "hybrid" and self.distill_steps is None:
            raise ConfigError("guide is 'hybrid' and distill_steps is null. Say after how many updates to leave it.")
        if self.starts_from_target and self.teacher is None:
            raise ConfigError("student_init is 'target' and teacher is null. Give the teacher, or start from source.")
        if guide == "dense" and self.freeze_steps is not None:
            raise ConfigError("guide is 'dense', which has no new matrices. Leave freeze_steps out.")
