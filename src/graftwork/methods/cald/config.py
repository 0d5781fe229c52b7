"""Settings of the conversion to linear-complexity attention, and of guided fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.methods.cald.mixers import MIXER_SETTINGS, MIXERS, Mixer

Guide = Literal["dense", "unguided", "target", "trajectory", "waypoint", "hybrid"]
Share = Literal["none", "kv", "layer", "head", "key_value", "headwise"]
Initialization = Literal["gaussian", "segment_mean", "identity", "svd"]
LengthRule = Literal["inv_sqrt", "slot_mean", "none"]
Extension = Literal["tile", "interpolate"]
OnLong = Literal["error", "truncate", "interpolate"]

_ALIASES = {"key_value": "kv", "headwise": "none"}
_WITH_SNAPSHOT = ("target", "hybrid")


@dataclass(frozen=True)
class CaldConfig:
    """Layers to convert, form of the new attention, and teacher followed during fine-tuning."""

    mixer: Mixer = "linformer"
    """Replacement of attention. For encoders: linformer (tokens are compressed to rank slots; closest to the dense
    model) or feature_map (softmax-free and parameter-free; for lengths beyond any fixed number of positions). For
    decoders: linear (softmax in a window, a feature map before it; generation with a state of constant size)."""
    rank: int | tuple[int, ...] | str = 256
    """Number of slots to which tokens are compressed; a list sets one per converted layer. Choose it well below the
    sequence length, or nothing is saved. auto:0.95 chooses per layer from the first training examples: the smallest
    rank, in steps of 8, that can preserve 95 % of the squared entries of the layer's attention maps."""
    share: Share = "none"
    """Scope of a compression matrix: none (two per layer, for keys and values), kv (one per layer), layer (one per
    model; fewest parameters), head (two per head; most parameters). headwise is an alias of none, key_value of kv."""
    initialization: Initialization | None = None
    """Initialisation of the matrices: segment_mean (a slot averages neighbouring tokens; closest to the dense
    model before training), gaussian (the authors', for published numbers), svd (from the teacher's attention on the
    first training examples; gaussian before training), identity (a slot is a position; no compression up to rank
    tokens, to check a setup). null is segment_mean, and gaussian with compat reference."""
    length_rule: LengthRule | None = None
    """Divisor of compressed tokens: inv_sqrt (square root of the number of tokens), slot_mean (number of tokens at the
    slot's initial positions), none. null is slot_mean with segment_mean or identity initialisation, else inv_sqrt."""
    mask_empty_slots: bool | None = None
    """Mask slots whose initial positions contain no token. null is true with segment_mean or identity initialisation,
    else false."""
    positions: int | None = None
    """Number of rows of the matrices, the maximum sequence length. null takes it from the model's config; set it if all
    inputs are shorter, or longer: learned position embeddings are then extended."""
    extend_positions: Extension | None = None
    """Rule for position embeddings beyond those of the model: tile (repeats them; short inputs are computed as before),
    interpolate (stretches them; keeps the order of all positions, and needs more training). null is tile."""
    on_long: OnLong = "error"
    """Handling of sequences longer than positions: error, truncate (ignore the keys beyond), interpolate (stretch the
    matrices)."""
    form: Literal["auto", "projected", "compressed"] = "auto"
    """Order of the computation; changes speed, never the result: projected compresses keys and values, compressed
    compresses hidden states before the key and value projections (faster for long inputs), auto chooses by length."""
    feature_map: Literal["elu", "softmax", "gated"] = "softmax"
    """Feature map of the mixer linear: softmax (learned, as in LoLCATs; closest to the dense model), elu (elu(x) + 1,
    without parameters; smallest state), gated (softmax map and a learned forget gate, for texts far longer than those
    of the training)."""
    window: int | None = 64
    """Number of tokens to which the mixer linear attends by softmax; a larger number is closer to the dense model and
    needs more memory. null is linear attention only."""
    transfer_steps: int | None = None
    """Number of updates before the training in which only the mixer learns, to reproduce the dense attention outputs
    of each layer; for the mixer linear. null is none."""
    transfer_learning_rate: float = 1e-2
    """Peak learning rate of these updates; the mixer has few parameters and tolerates a high one."""
    layers: str | None = None
    """Layer numbers to convert, from 0, such as "0-3,7"; null converts every layer."""
    seed: int = 0
    """Seed of the initialisations gaussian and svd; the others draw no random numbers."""
    guide: Guide = "unguided"
    """Teacher signal during fine-tuning: target (a fine-tuned dense model; needs one), trajectory (the dense model,
    fine-tuned at the same time; needs none in advance), waypoint (checkpoints of a dense fine-tuning, in order), hybrid
    (target for the first distill_steps updates), unguided (no teacher), dense (no conversion; the baseline and the
    teacher of the others)."""
    teacher: str | None = None
    """Run folder, model folder, weights file or hub id of the fine-tuned dense model; required by target and hybrid.
    With other guides it is used only to measure distances, not for training."""
    snapshots: str | None = None
    """Glob pattern of the checkpoints for waypoint, such as "runs/dense/train/distill/checkpoint-*"."""
    waypoint_rule: Literal["equal_split", "next_ahead"] = "equal_split"
    """Checkpoint that guides an update: equal_split (each for an equal share of the updates; for any number of
    checkpoints), next_ahead (the first one of a later step than the update; if both runs have the same length)."""
    student_init: Literal["source", "target"] | None = None
    """Initial weights of the student: source (the converted model's) or target (the teacher's). null is target for the
    guides target and hybrid, else source."""
    layer_weight: float | None = None
    """Weight of the distance between hidden states of student and teacher; null is 1 for encoders with a teacher, else
    0."""
    output_weight: float | None = None
    """Weight of the divergence between outputs of student and teacher; null is 1 for decoders with a teacher,
    else 0."""
    divergence: Literal["forward", "reverse"] = "forward"
    """Divergence between outputs: forward (the student covers everything that the teacher holds possible), reverse (the
    student avoids what the teacher holds impossible)."""
    distill_steps: int | None = None
    """Number of updates with a teacher, after which only the task loss remains; null is all. Required by hybrid."""
    freeze_steps: int | None = None
    """Number of initial updates that train only the parameters of the mixer; null is none."""
    replacement_steps: int | None = None
    """Number of updates over which the layers are replaced one after another, from the first one on; before its turn, a
    layer has dense attention. For models that many layers replaced at once damage; null replaces all from the start."""
    trained: Literal["all", "attention", "mixer"] = "all"
    """Part that is trained: all, attention (projections and mixer of the attention layers; less memory), mixer."""
    teacher_learning_rate: float | None = None
    """Peak learning rate of the trajectory teacher; null takes the student's."""
    teacher_update_cycle: int = 1
    """The trajectory teacher is updated every N updates of the student; above 1, training is faster."""
    teacher_schedule: Literal["own", "reference"] | None = None
    """Learning-rate schedule of the trajectory teacher: own (reaches 0 at its last update), reference (the student's,
    advanced once per teacher update, as in the authors' code). null is own."""
    teacher_mode: Literal["eval", "train"] | None = None
    """Mode of a fixed teacher: eval (no dropout), train (dropout, as in the authors' code). null is eval."""
    temperature: float = 2.0
    """Temperature of the divergence between outputs; higher values weight unlikely classes more."""
    scale_output_loss: bool = True
    """Multiply the divergence by the temperature squared, so that its gradients do not depend on the temperature."""
    layer_loss: Literal["mse", "cosine"] = "mse"
    """Distance between hidden states: mse, or cosine, which ignores their scale."""
    layer_norm: Literal["none", "layernorm", "rmsnorm", "loss_norm"] = "none"
    """Normalisation of hidden states before they are compared: none for post-norm models (BERT, RoBERTa), layernorm or
    rmsnorm for pre-norm models. loss_norm instead divides each distance by its own detached value."""
    layer_reduction: Literal["sum", "mean"] = "sum"
    """Reduction of the distances over layers."""
    skip_first_layers: int = 0
    """Number of hidden states excluded from the distance at the front; the embeddings are the first."""
    skip_last_layers: int = 0
    """Number of hidden states excluded from the distance at the end."""
    mask_layer_loss: bool | None = None
    """Exclude padding from the distance; null is true."""
    save_teacher: bool = False
    """Save the trajectory teacher after training, next to the checkpoints."""
    compat: Literal["reference"] | None = None
    """reference reproduces the authors' code where a setting is null: dropout in a fixed teacher, padding in the
    distance, their teacher schedule, their divisor of a short accumulation window, a warm-up of 4 %, Gaussian matrices.
    Use it to compare with published runs."""

    def __post_init__(self) -> None:
        """Resolve aliases and check the settings and their combination.

        Raises:
            ConfigError: If a value is out of range, or a guide requires or excludes a setting.
        """
        object.__setattr__(self, "share", _ALIASES.get(self.share, self.share))
        self._check_numbers()
        self._check_mixer()
        self._check_guide()
        from graftwork.surgery.layers import parse_layers

        parse_layers(self.layers, "layers")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, or the ranks of the layers; empty if the rank is automatic."""
        if isinstance(self.rank, str):
            return ()
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)

    @property
    def kept_share(self) -> float | None:
        """Share of the attention maps that an automatic rank preserves; None for an explicit rank."""
        if not isinstance(self.rank, str):
            return None
        word, _, number = self.rank.partition(":")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if word != "auto" or not 0 < share < 1:
            raise ConfigError(
                f"rank is {self.rank!r}. Expected whole numbers from 1, or auto: followed by a share above 0 and below "
                "1, such as auto:0.95."
            )
        return share

    @property
    def effective_initialization(self) -> Initialization:
        """Initialisation of the matrices, with the default resolved."""
        return self.initialization or ("segment_mean" if self.compat is None else "gaussian")

    @property
    def has_slots(self) -> bool:
        """True if the initialisation assigns positions to each slot."""
        return self.effective_initialization in ("segment_mean", "identity")

    @property
    def effective_length_rule(self) -> LengthRule:
        """Length rule, with the default resolved."""
        return self.length_rule or ("slot_mean" if self.has_slots else "inv_sqrt")

    @property
    def masks_empty_slots(self) -> bool:
        """True if empty slots are masked, with the default resolved."""
        return self.has_slots if self.mask_empty_slots is None else self.mask_empty_slots

    @property
    def effective_layer_weight(self) -> float:
        """Weight of the layer distance, with the default resolved."""
        if self.layer_weight is not None:
            return self.layer_weight
        return 0.0 if self.guide in ("dense", "unguided") or MIXERS[self.mixer].causal else 1.0

    @property
    def effective_output_weight(self) -> float:
        """Weight of the divergence between outputs, with the default resolved."""
        if self.output_weight is not None:
            return self.output_weight
        return 0.0 if self.guide in ("dense", "unguided") or not MIXERS[self.mixer].causal else 1.0

    @property
    def starts_from_target(self) -> bool:
        """True if the student starts from the teacher's weights."""
        return (self.student_init or ("target" if self.guide in _WITH_SNAPSHOT else "source")) == "target"

    @property
    def loss_is_masked(self) -> bool:
        """True if padding is excluded from the layer distance, with the default resolved."""
        return self.compat is None if self.mask_layer_loss is None else self.mask_layer_loss

    @property
    def teacher_drops_out(self) -> bool:
        """True if a fixed teacher is in training mode, with the default resolved."""
        return (self.teacher_mode or ("eval" if self.compat is None else "train")) == "train"

    @property
    def own_teacher_schedule(self) -> bool:
        """True if the trajectory teacher's learning rate reaches 0 at its last update, with the default resolved."""
        return (self.teacher_schedule or ("own" if self.compat is None else "reference")) == "own"

    def _check_numbers(self) -> None:
        positive = {
            "rank": min(self.ranks, default=1 if self.kept_share else 0),
            "positions": self.positions,
            "distill_steps": self.distill_steps,
            "freeze_steps": self.freeze_steps,
            "replacement_steps": self.replacement_steps,
            "window": self.window,
            "transfer_steps": self.transfer_steps,
            "teacher_update_cycle": self.teacher_update_cycle,
        }
        for name, value in positive.items():
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}. Expected whole numbers from 1; to switch it off, omit it."
                )
        for name in ("temperature", "teacher_learning_rate", "transfer_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}. Expected a number above 0.")
        for name in ("layer_weight", "output_weight", "skip_first_layers", "skip_last_layers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}. Expected a number from 0.")

    def _check_mixer(self) -> None:
        mixer = MIXERS[self.mixer]
        for field in fields(self):
            unused = field.name in MIXER_SETTINGS and field.name not in mixer.uses
            if unused and getattr(self, field.name) != field.default:
                owners = " or ".join(name for name, each in MIXERS.items() if field.name in each.uses)
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)!r} and mixer is {self.mixer!r}, which ignores it. "
                    f"Omit {field.name}, or set mixer to {owners}."
                )
        if self.mixer == "linear":
            self._check_linear()
        if self.share == "layer" and len(set(self.ranks)) > 1:
            raise ConfigError(
                f"rank is {list(self.ranks)} and share is 'layer'. Expected a single number, because all layers share "
                "one matrix. Set rank to the largest of these, or share to kv or none."
            )
        if self.share == "head" and self.form == "compressed":
            raise ConfigError(
                "form is 'compressed' and share is 'head'. With a matrix per head, hidden states would be compressed "
                "once per head. Set form to auto or projected."
            )
        if self.effective_length_rule == "slot_mean" and not self.has_slots:
            raise ConfigError(
                f"length_rule is 'slot_mean' and initialization is {self.effective_initialization!r}, which assigns no "
                "positions to slots. Expected initialization segment_mean or identity; or set length_rule to inv_sqrt."
            )
        if self.masks_empty_slots and not self.has_slots:
            raise ConfigError(
                f"mask_empty_slots is on and initialization is {self.effective_initialization!r}, which assigns no "
                "positions to slots. Set mask_empty_slots to false, or initialization to segment_mean or identity."
            )

    def _check_linear(self) -> None:
        if self.feature_map == "elu" and self.window is None and (self.transfer_steps or self.freeze_steps):
            name = "transfer_steps" if self.transfer_steps else "freeze_steps"
            raise ConfigError(
                f"{name} is set, feature_map is 'elu' and window is null, so that the mixer has nothing to train. "
                "Omit it, or set feature_map to softmax or gated."
            )
        if self.transfer_steps is None and self.transfer_learning_rate != CaldConfig.transfer_learning_rate:
            raise ConfigError(
                "transfer_learning_rate is set and transfer_steps is null, so that there is no attention transfer. Set "
                "transfer_steps, or omit transfer_learning_rate."
            )

    def _check_guide(self) -> None:
        guide = self.guide
        if guide in ("dense", "unguided"):
            if (self.layer_weight or 0) > 0 or (self.output_weight or 0) > 0:
                raise ConfigError(
                    f"guide is {guide!r}, which has no teacher, and layer_weight or output_weight is above 0. Omit "
                    "both, or choose a guide with a teacher."
                )
            if self.distill_steps is not None:
                raise ConfigError(f"distill_steps is set and guide is {guide!r}, which has no teacher. Omit it.")
        if guide == "trajectory" and not (self.effective_layer_weight > 0 or self.effective_output_weight > 0):
            raise ConfigError(
                "guide is 'trajectory', and layer_weight and output_weight are 0, so that no loss would use the "
                "teacher. Set one of them above 0, or guide to unguided."
            )
        if guide in _WITH_SNAPSHOT and self.teacher is None:
            raise ConfigError(
                f"guide is {guide!r} and teacher is null. Set it to the run, folder or weights of a fine-tuned dense "
                "model."
            )
        if guide == "waypoint" and self.snapshots is None:
            raise ConfigError(
                "guide is 'waypoint' and snapshots is null. Set it to a pattern such as "
                "'runs/dense/train/distill/checkpoint-*'."
            )
        if guide == "hybrid" and self.distill_steps is None:
            raise ConfigError("guide is 'hybrid' and distill_steps is null. Set it to the number of guided updates.")
        if self.starts_from_target and self.teacher is None:
            raise ConfigError("student_init is 'target' and teacher is null. Set teacher, or student_init to source.")
        if guide == "dense" and self.freeze_steps is not None:
            raise ConfigError("freeze_steps is set and guide is 'dense', which has no compression matrices. Omit it.")
        if self.trained != "all" and guide == "dense":
            raise ConfigError(
                f"trained is {self.trained!r} and guide is 'dense', which trains the whole model. Omit it."
            )
        if self.trained == "mixer" and self.freeze_steps is not None:
            raise ConfigError("freeze_steps is set and trained is 'mixer', which never trains anything else. Omit one.")
        if self.trained == "mixer" and not MIXERS[self.mixer].learns:
            raise ConfigError(
                f"trained is 'mixer' and mixer is {self.mixer!r}, which has no parameters. Set trained to attention."
            )
