"""LoRA trained on a graft is also an adapter folder of PEFT, on the model before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load
from graftwork.pipeline.lora_folder import check_only_adapter
from graftwork.pipeline.phases import with_lora
from graftwork.pipeline.training import train
from graftwork.settings.training import TrainingSettings
from graftwork.training.phases import Finetune

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 11, 40, 2, 7]])


@pytest.fixture
def settings(tmp_path) -> TrainingSettings:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": f"where is the {n} ?", "target": "river"}) + "\n" for n in "abcd"))
    return TrainingSettings(
        tasks=(str(rows),),
        max_steps=2,
        learning_rate=1e-1,
        per_device_train_batch_size=4,
        lora={"r": 2, "target_modules": ("q", "v", "wo")},
        lora_adapter=True,
    )


def logits(model: nn.Module) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def base_of(run: Path) -> str:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_lora_on_a_graft_is_opened_by_peft_on_the_graft_before_training(tmp_path, settings):
    run = tmp_path / "run"
    graft = convert(load(shipped_model("encoder_decoder"), dtype="float32"), TopK(feed_forward_k=16))
    before = logits(graft.model)
    graft.save(run)
    train(run, settings, estimate=False)
    trained = logits(load(run).model)
    assert (trained - before).abs().max() > 1e-3
    assert base_of(run) == str((run / "adapter" / "base").resolve())
    assert torch.equal(logits(load(run / "adapter" / "base").model), before)
    # PEFT's own loader of base and adapter
    opened = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(run / "adapter").eval()
    torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=0)
    again = load(run / "adapter")
    assert [method.name for method in again.methods] == ["topk"]
    torch.testing.assert_close(logits(again.model), trained, atol=1e-5, rtol=0)


def test_lora_on_a_checkpoint_names_the_checkpoint(tmp_path, settings):
    run = tmp_path / "run"
    load(shipped_model("encoder_decoder"), dtype="float32").save(run)
    train(run, settings, estimate=False)
    assert base_of(run) == str(Path(shipped_model("encoder_decoder")).resolve())
    assert not (run / "adapter" / "base").exists()
    opened = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(run / "adapter", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(opened), logits(load(run).model), atol=1e-5, rtol=0)
    train(run, replace(settings, lora_adapter=False), estimate=False, overwrite=True)
    assert not (run / "adapter").exists()


def test_a_training_of_more_than_the_adapter_is_refused(settings):
    model = with_lora(load(shipped_model("encoder_decoder")).model, settings.lora)
    check_only_adapter(model, [Finetune()])
    model.base_model.model.shared.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"the phase finetune also trains .*shared\.weight"):
        check_only_adapter(model, [Finetune()])
    with pytest.raises(ConfigError, match="lora_adapter is on and lora is null"):
        replace(settings, lora=None)
