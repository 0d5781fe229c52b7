"""Layouts of attention and feed-forward layers, and the table of known model families.

Attention is replaced through transformers' public interface, so it needs no table. Feed-forward layers have no public
interface: families in this table have a tested layout, and layouts of all others are matched by `structure` and proven
by `proof`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graftwork.core.registry import Registry

Stack = Literal["encoder", "decoder"]
Form = Literal["layer", "activation", "experts"]
"""Part of a model that a feed-forward layout describes: a layer that computes projections and activation; a module that
applies the activation between projections of its parent; or experts whose projections are 3-D parameters."""


@dataclass(frozen=True, slots=True)
class FeedForwardLayout:
    """Parts of one feed-forward class, as attribute paths relative to the module."""

    class_name: str
    """Name of the class that contains the projections."""
    input: str
    """Projection from the hidden size to the feed-forward width; the gate projection of a gated layer."""
    output: str
    """Projection back to the hidden size."""
    up: str | None = None
    """Up projection of a gated layer, multiplied by the activated gate; None for a plain layer."""
    activation: str = "act"
    """Activation module or function."""
    hidden_dropout: str | None = None
    """Dropout on the activations, before the output projection; None if there is none."""
    output_dropout: str | None = None
    """Dropout on the output, inside the same class; None if there is none."""
    entry: str | None = None
    """Method of the class that computes the feed-forward layer; None if `forward` computes nothing else."""
    exit: str | None = None
    """Module that normalises output after dropout + input at the end of `entry`; None if `entry` adds no residual."""
    fused: bool = False
    """True if `input` computes gate and up projection in one matrix, gate first."""
    form: Form = "layer"
    """Part of the model that the layout describes."""

    @property
    def gated(self) -> bool:
        """True if an up projection is multiplied by the activated gate."""
        return self.up is not None or self.fused

    @property
    def projections(self) -> tuple[str, ...]:
        """Attribute paths of all projections: gate or input, up if present, output."""
        return tuple(name for name in (self.input, self.up, self.output) if name is not None)


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Projections of one self-attention class, for methods that compress hidden states before projecting them."""

    query: str
    key: str
    value: str
    output: str | None = None
    """Output projection, if it is part of the same class."""


@dataclass(frozen=True, slots=True)
class Family:
    """Layer layout of one `config.model_type`."""

    name: str
    """Value of `config.model_type`."""
    default_stack: Stack
    """Stack of modules whose path contains neither "encoder" nor "decoder"."""
    attention: tuple[str, ...]
    """Class names of the modules that call the attention interface."""
    cross_attention: tuple[str, ...] = ()
    """Path components that mark an attention module as cross-attention."""
    feed_forward: tuple[FeedForwardLayout, ...] = ()
    """Layouts of its feed-forward classes; empty if they cannot be replaced."""
    position_bias: bool = False
    """True if attention modules compute a T5 position bias and pass it to the next layer."""
    self_attention: AttentionLayout | None = None
    """Projections of the encoder's self-attention; None if grafts cannot start from hidden states in this family."""


def _bert(name: str, prefix: str) -> Family:
    return Family(
        name,
        "encoder",
        attention=(f"{prefix}SelfAttention", f"{prefix}CrossAttention"),
        cross_attention=("crossattention",),
        feed_forward=(
            FeedForwardLayout(
                f"{prefix}Layer",
                input="intermediate.dense",
                output="output.dense",
                activation="intermediate.intermediate_act_fn",
                output_dropout="output.dropout",
                entry="feed_forward_chunk",
                exit="output.LayerNorm",
            ),
        ),
        self_attention=AttentionLayout("query", "key", "value"),
    )


def _t5(name: str, prefix: str) -> Family:
    return Family(
        name,
        "encoder",
        attention=(f"{prefix}Attention",),
        cross_attention=("EncDecAttention",),
        feed_forward=(
            FeedForwardLayout(f"{prefix}DenseActDense", input="wi", output="wo", hidden_dropout="dropout"),
            FeedForwardLayout(
                f"{prefix}DenseGatedActDense", input="wi_0", up="wi_1", output="wo", hidden_dropout="dropout"
            ),
        ),
        position_bias=True,
    )


def _llama(name: str, prefix: str) -> Family:
    return Family(
        name,
        "decoder",
        attention=(f"{prefix}Attention",),
        feed_forward=(
            FeedForwardLayout(f"{prefix}MLP", input="gate_proj", up="up_proj", output="down_proj", activation="act_fn"),
        ),
    )


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        _bert("bert", "Bert"),
        _bert("roberta", "Roberta"),
        _bert("xlm-roberta", "XLMRoberta"),
        _bert("camembert", "Camembert"),
        _bert("electra", "Electra"),
        Family(
            "distilbert",
            "encoder",
            attention=("DistilBertSelfAttention",),
            feed_forward=(
                FeedForwardLayout(
                    "FFN", input="lin1", output="lin2", activation="activation", output_dropout="dropout"
                ),
            ),
            self_attention=AttentionLayout("q_lin", "k_lin", "v_lin", "out_lin"),
        ),
        Family(
            "gpt2",
            "decoder",
            attention=("GPT2Attention",),
            cross_attention=("crossattention",),
            feed_forward=(FeedForwardLayout("GPT2MLP", input="c_fc", output="c_proj", output_dropout="dropout"),),
        ),
        _llama("llama", "Llama"),
        _llama("mistral", "Mistral"),
        _llama("qwen2", "Qwen2"),
        _t5("t5", "T5"),
        _t5("mt5", "MT5"),
        # bart and opt compute the feed-forward layer in the forward of the whole layer: no layer to replace, only the
        # activation, which is matched structurally
        Family("bart", "encoder", attention=("BartAttention",), cross_attention=("encoder_attn",)),
        Family("opt", "decoder", attention=("OPTAttention",)),
    )
}
"""Built-in families by `config.model_type`."""

REGISTRY: Registry[Family] = Registry("family", FAMILIES, group="graftwork.families")
"""Built-in families, those of `register_family`, and those of installed packages (entry-point group
`graftwork.families`)."""


def register_family(family: Family) -> None:
    """Add the layout of a model family, for models whose layers are not found by structure.

    Installed packages register a `Family` through the entry-point group `graftwork.families` instead, under the name of
    its `config.model_type`.

    Args:
        family: Layout of one `config.model_type`.

    Raises:
        ConfigError: If the model type is already registered.
    """
    REGISTRY.add(family.name, family)
