"""Graft methods onto a model, and take them off again."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from graftwork.errors import ConfigError, NothingConvertedError, OverlappingMethodsError
from graftwork.grafting.capabilities import ChecksSettings, Continues
from graftwork.grafting.converted import Converted
from graftwork.grafting.marks import APPLIED, mark, unmark
from graftwork.grafting.method import Change, Method
from graftwork.grafting.precision import as_stored
from graftwork.grafting.saving import applied_to
from graftwork.surgery.attention import seam_modules
from graftwork.surgery.modules import inactive_steps, undo
from graftwork.surgery.quantised import prepare_quantised
from graftwork.surgery.sites import pretrained
from graftwork.training.running_text import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PEFT_PREFIX = "base_model.model."


def convert(
    model: nn.Module | Converted,
    method: Method[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    copy: bool = False,
) -> Converted:
    """Graft a method onto a model, in place.

    Settings of a method that is already on the model are replaced; trained parameters of its attention modules are kept
    if the settings create the same modules. Other methods stay if they change other modules.

    Args:
        model: A transformers model, bare or wrapped by PEFT, or the result of an earlier `convert` or `load`.
        method: An instance of a method, such as `TopK(feed_forward_k=64)`.
        tokenizer: Tokenizer for the later stages; loaded from the model's own path if omitted.
        copy: Convert a copy and leave `model` unchanged.

    Returns:
        The model with its list of changes.

    Raises:
        ConfigError: If `model` or `method` is a name, a path or a class.
        UnsupportedModelError: If the method cannot change a model of this structure. The model is left as it was.
        NothingConvertedError: If the settings would change nothing. The model is left as it was.
        OverlappingMethodsError: If another method has changed the same modules. The model is left as it was.

    Example:
        >>> converted = convert(model, TopK(feed_forward_k=256))
        >>> converted.changes[0].path
        'encoder.block.0.layer.1.DenseReluDense'
    """
    _check_arguments(model, method)
    if isinstance(method, ChecksSettings):
        method.check_settings()
    return convert_recorded(model, method, tokenizer=tokenizer, copy=copy)


def convert_recorded(
    model: nn.Module | Converted,
    method: Method[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    copy: bool = False,
) -> Converted:
    """`convert` with the settings of a run, of which some may have no effect.

    Earlier versions recorded such settings, and a setting can lose its effect if another is changed for an evaluation.
    """
    earlier = model if isinstance(model, Converted) else Converted(model, tokenizer=tokenizer)
    target = copying.deepcopy(earlier.model) if copy else earlier.model
    before = positions_of(pretrained(target))
    attach(target, method)
    given = tokenizer or earlier.tokenizer
    found = converted_of(target, given or tokenizer_of(target))
    longest = positions_of(pretrained(target))
    if longest > before and found.tokenizer is not None:
        # a method that extends the positions of a model extends the limit of its tokenizer
        limited = cast(Any, found.tokenizer)
        limited.model_max_length = max(longest, limited.model_max_length)
    return replace(earlier, model=target, methods=found.methods, changes=found.changes, tokenizer=found.tokenizer)


def attach(model: nn.Module, method: Method[Any]) -> None:
    """Graft a method onto a model in place, and mark the model; see `convert`."""
    inner = pretrained(model)
    applied = dict(applied_to(inner))
    replaced = applied.pop(method.name, None)
    continued = replaced is not None and isinstance(method, Continues) and method.continues(replaced[0].config)
    if replaced is not None and continued and not inactive_steps(model):
        applied[method.name] = (method, replaced[1])
        inner.__dict__[APPLIED] = applied
        return
    learned = {} if replaced is None else {path: graft.state_dict() for path, graft in seam_modules(model).items()}
    if replaced is not None:
        undo(model, [method.name])
    prepare_quantised(model)
    try:
        with as_stored(model):
            changes = tuple(method.apply(model))
        if not changes and method.changes_model:
            raise NothingConvertedError(
                f"{method.name} would change nothing in {type(inner).__name__} with {method.config}. "
                "Switch at least one of its settings on; `graftwork show " + method.name + "` lists them."
            )
        _check_overlap(method, changes, applied)
    except Exception:
        undo(model, [method.name])
        if replaced is not None:
            replaced[0].apply(model)
            _load_learned(model, learned)
        raise
    applied[method.name] = (method, changes)
    inner.__dict__[APPLIED] = applied
    _mark(inner, applied)


def _load_learned(model: nn.Module, learned: Mapping[str, Mapping[str, Any]]) -> None:
    """Load the parameters of attention grafts, by path of the attention module."""
    for path, graft in seam_modules(model).items():
        if path in learned:
            graft.load_state_dict(learned[path])


def restore(model: nn.Module | Converted) -> int:
    """Take every method off a model: its modules, functions and outputs are again what they were, bit for bit.

    Weights that were trained since stay trained.

    Returns:
        The number of changes taken back.
    """
    target = model.model if isinstance(model, Converted) else model
    inner = pretrained(target)
    inner.__dict__.pop(APPLIED, None)
    unmark(inner.config)
    return undo(target)


def converted_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Converted:
    """Return a model with the methods and changes that are on it, as `convert` recorded them."""
    applied = applied_to(pretrained(model))
    return Converted(
        model,
        methods=tuple(method for method, _ in applied.values()),
        changes=tuple(change for _, changes in applied.values() for change in changes),
        tokenizer=tokenizer,
    )


def _mark(model: PreTrainedModel, applied: Mapping[str, tuple[Method[Any], tuple[Change, ...]]]) -> None:
    """Mark the configuration of a model whose modules are changed; without changes, every loader returns the model."""
    changing = [name for name, (_, changes) in applied.items() if changes]
    if changing:
        mark(model, changing)
    else:
        unmark(model.config)


def _check_arguments(model: object, method: object) -> None:
    """Refuse a name, a path or a class where an object is expected, and name the call that makes one."""
    if isinstance(method, type) and issubclass(method, Method):
        raise ConfigError(f"Found the class {method.__name__} as method. Pass an instance: {method.__name__}(…).")
    if not isinstance(method, Method):
        raise ConfigError(
            f"Found {method!r} as method. Expected an instance such as graftwork.TopK(feed_forward_k=64); "
            "graftwork.methods.NAMES.get(name) returns the class of a name."
        )
    if not isinstance(model, (nn.Module, Converted)):
        raise ConfigError(
            f"Found {model!r} as model. Expected a transformers model, or what graftwork.load(path) returns."
        )


def _check_overlap(
    method: Method[Any], changes: Sequence[Change], applied: dict[str, tuple[Method[Any], tuple[Change, ...]]]
) -> None:
    for name, (_, others) in applied.items():
        both = [change.path for change in changes if any(_collide(change, other) for other in others)]
        if both:
            raise OverlappingMethodsError(
                f"{method.name} and {name} both change {', '.join(both[:3])}{' …' if len(both) > 3 else ''}. "
                "Two methods can be combined where they change different modules; narrow one of them down, or restore "
                "the model first. The model keeps what it had."
            )


def _collide(one: Change, other: Change) -> bool:
    """True if two changes are of one module, or one is inside a module that the other replaced and does not call."""
    # a path may have been written down before PEFT wrapped the model
    inner, outer = one.path.removeprefix(_PEFT_PREFIX), other.path.removeprefix(_PEFT_PREFIX)
    keeps = other.keeps
    if len(inner) < len(outer):
        inner, outer, keeps = outer, inner, one.keeps
    return _within(inner, outer) and not any(_within(inner, f"{outer}.{part}") for part in keeps)


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the checkpoint that the model was loaded from; None if there is none."""
    import transformers

    # the loader of transformers is untyped
    auto_tokenizer: Any = transformers.AutoTokenizer

    name = getattr(pretrained(model), "name_or_path", "")
    if not name:
        return None
    try:
        tokenizer = auto_tokenizer.from_pretrained(name, trust_remote_code=False)
    # libraries raise errors of several types for missing and for damaged files
    except Exception:
        return None
    return tokenizer if is_usable(tokenizer) else None


def is_usable(tokenizer: Any) -> bool:
    """True if a tokenizer has letters or digits besides its added tokens; libraries build empty ones."""
    vocabulary = cast("Mapping[str, int]", tokenizer.get_vocab())
    added = cast("Mapping[str, int]", tokenizer.added_tokens_encoder)
    return any(token not in added and any(map(str.isalnum, token)) for token in vocabulary)
