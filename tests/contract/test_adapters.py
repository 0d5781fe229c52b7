"""LoRA with every method, in either order, is equivalent to the method on merged weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork.grafting.conversion import convert
from tiny_models import real_logits

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def lora(model) -> LoraConfig:
    """Return a LoRA configuration with non-zero weights on every projection inside the layers."""
    # paths of layers contain numbers; the head is excluded, because it may share its weights with the embedding
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
    ]
    turned = any(isinstance(model.get_submodule(name), Conv1D) for name in inside)
    return LoraConfig(r=2, target_modules=inside, init_lora_weights=False, fan_in_fan_out=turned)


@pytest.mark.parametrize("first", ["method", "adapter"])
def test_an_adapter_is_equivalent_to_merged_weights(case, first):
    config, batch = lora(case.model()), case.batch()
    adapted = get_peft_model(case.model(), config).eval()
    weights = get_peft_model_state_dict(adapted)
    model = case.model()
    if first == "method":
        convert(model, case.real())
    wrapped = get_peft_model(model, config).eval()
    set_peft_model_state_dict(wrapped, weights)
    if first == "adapter":
        convert(wrapped, case.real())
    merged = adapted.merge_and_unload()
    plain = real_logits(merged, case.name, batch)
    expected = real_logits(convert(merged, case.real()).model, case.name, batch)
    found = real_logits(wrapped, case.name, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # the adapter has an effect, and so does the method if it changes the model
    assert not torch.allclose(found, real_logits(case.converted(), case.name, batch))
    assert torch.allclose(plain, expected) == (not case.method_class.changes_model)
