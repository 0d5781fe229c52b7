"""Where the attention and the feed-forward layers of each model family are. Data only.

This is the one place that a new release of transformers can make wrong: attention is exchanged through a public
interface, but feed-forward layers have none, so their classes and projection names are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FeedForwardLayout:
    """The parts of one feed-forward class, as attribute paths from the module that holds them."""

    class_name: str
    """Name of the class that holds both projections."""
    input: str
    """Projection from the hidden size to the feed-forward width; of a gated layer, the gate."""
    output: str
    """Projection back to the hidden size."""
    up: str | None = None
    """Second projection of a gated layer, which the activated gate multiplies."""
    activation: str = "act"
    """Module or function between the two."""
    hidden_dropout: str | None = None
    """Dropout on the activations, before the output projection."""
    output_dropout: str | None = None
    """Dropout on the result, inside the same class."""
    entry: str | None = None
    """Method of the class that computes the feed-forward part; None if the class is nothing else."""
    exit: str | None = None
    """Module, called with (dropped result, input), that closes an `entry` method by a residual and a norm."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Gate or input, up if there is one, and output."""
        return tuple(name for name in (self.input, self.up, self.output) if name is not None)


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """The projections of one self-attention class, for methods that combine tokens before they are projected."""

    query: str
    key: str
    value: str
    output: str | None = None
    """Output projection, where it is part of the same class."""


@dataclass(frozen=True, slots=True)
class Family:
    """What surgery knows of one `config.model_type`."""

    name: str
    default_stack: str
    """"encoder" or "decoder", for families whose module paths do not say it."""
    attention: tuple[str, ...]
    """Class names of the modules that call the attention interface."""
    cross_attention: tuple[str, ...] = ()
    """Path components that mark an attention module as cross-attention."""
    feed_forward: tuple[FeedForwardLayout, ...] = ()
    position_bias: bool = False
    """Attention modules compute a T5 position bias and hand it on."""
    self_attention: AttentionLayout | None = None
    """Projections of the encoder's self-attention; None where methods only get projected queries, keys and values."""


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
        # the feed-forward parts of bart and opt are lines inside the layer's forward: there is nothing to exchange
        Family("bart", "encoder", attention=("BartAttention",), cross_attention=("encoder_attn",)),
        Family("opt", "decoder", attention=("OPTAttention",)),
    )
}
"""Every supported family by its `config.model_type`."""
