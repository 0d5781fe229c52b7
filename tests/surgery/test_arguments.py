"""Arguments of attention functions that a graft does not support are refused before the conversion."""

import pytest
from torch import nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssConfig
from transformers.models.t5.modeling_t5 import T5Attention

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.arguments import check_interface, interface_arguments


def test_arguments_are_read_from_the_source_of_the_class():
    assert interface_arguments(Gemma2Attention)["softcap"] == "self.attn_logit_softcapping"
    assert interface_arguments(GptOssAttention)["s_aux"] == "self.sinks"
    assert interface_arguments(T5Attention)["position_bias"] == "position_bias"
    assert {"scaling", "dropout"} <= interface_arguments(BertSelfAttention).keys()
    assert "indices" in interface_arguments(DeepseekV32Attention)


class Inherited(Gemma2Attention):
    """Subclass without a forward of its own."""


def test_a_subclass_inherits_the_arguments():
    assert interface_arguments(Inherited) == interface_arguments(Gemma2Attention)


def test_a_class_without_the_interface_is_refused():
    module = nn.Module.__new__(DisentangledSelfAttention)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0.*DisentangledSelfAttention ignores registered attention"
    ):
        check_interface("layers.0", module, "topk", ())


def gemma(softcap):
    config = Gemma2Config(hidden_size=8, num_attention_heads=2, head_dim=4, attn_logit_softcapping=softcap)
    return Gemma2Attention(config, 0)


def test_a_softcap_that_is_set_is_refused_without_support_and_accepted_with():
    with pytest.raises(UnsupportedModelError, match=r"soft-capped scores \(softcap=self.attn_logit_softcapping\)"):
        check_interface("layers.0", gemma(50.0), "cald", ())
    check_interface("layers.0", gemma(50.0), "topk", {"softcap"})
    check_interface("layers.0", gemma(None), "cald", ())


def test_sinks_are_refused_without_support_and_accepted_with():
    module = GptOssAttention(GptOssConfig(hidden_size=8, num_attention_heads=2, head_dim=4, num_key_value_heads=1), 0)
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        check_interface("layers.0", module, "cald", {"softcap"})
    check_interface("layers.0", module, "topk", {"sinks"})


def test_an_argument_that_is_only_known_in_the_call_is_refused():
    module = nn.Module.__new__(DeepseekV32Attention)
    with pytest.raises(UnsupportedModelError, match=r"keys selected by an indexer \(indices="):
        check_interface("layers.0", module, "topk", {"softcap", "sinks"})
