"""Saved grafts in other libraries: pipelines, PEFT, sentence-transformers and trl open and save the graft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graftwork.demo import shipped_model
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import Converted
from graftwork.methods.cald import Cald
from graftwork.methods.regrad import ReGrad
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load

# the libraries use deprecated parts of transformers and datasets
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[5, 9, 11, 40, 2]])
TEXTS = ["who is the author of the book?", "ada"]


def saved(folder: Path, base: str, method) -> Converted:
    converted = convert(load(shipped_model(base), dtype="float32"), method)
    converted.model.save_pretrained(folder)
    converted.tokenizer.save_pretrained(folder)
    return converted


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS)[0]


def dense(folder: Path) -> torch.nn.Module:
    converted = load(folder)
    restore(converted)
    return converted.model


@pytest.mark.parametrize(
    ("task", "base", "method"),
    [
        ("text-generation", "decoder", lambda: TopK(attention_k=2)),
        ("text-generation", "decoder", lambda: ReGrad(rank=2, b_std=0.5)),
        ("fill-mask", "encoder", lambda: Cald(rank=8)),
        ("feature-extraction", "encoder", lambda: Sparsefinder(alpha=1.5)),
    ],
)
def test_pipelines_open_the_graft(task, base, method, tmp_path):
    from transformers import pipeline

    converted = saved(tmp_path / "graft", base, method())
    opened = pipeline(task, model=str(tmp_path / "graft"))
    whole = converted.model.base_model if task == "feature-extraction" else converted.model
    assert torch.equal(output(opened.model), output(whole))
    plain = dense(tmp_path / "graft")
    assert not torch.equal(output(whole), output(plain.base_model if task == "feature-extraction" else plain))
    if task == "text-generation":
        options = {"max_new_tokens": 4, "do_sample": False}
        own = pipeline(task, model=converted.model, tokenizer=converted.tokenizer)
        assert opened(TEXTS[0], **options) == own(TEXTS[0], **options)


def test_an_adapter_of_peft_names_the_saved_graft_as_its_base_and_opens_on_it(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is the extra lora")
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "graft", "decoder", TopK(attention_k=2))
    torch.manual_seed(0)
    chosen = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("graft"), chosen)
    expected = output(adapted)
    adapted.save_pretrained("adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "graft"

    opened = peft.AutoPeftModelForCausalLM.from_pretrained("adapter")
    assert torch.equal(output(opened), expected)
    on_dense = peft.PeftModel.from_pretrained(dense(tmp_path / "graft"), "adapter")
    assert not torch.allclose(output(on_dense), expected)
    merged = opened.merge_and_unload()
    merged.save_pretrained("merged")
    assert torch.equal(output(load("merged").model), output(merged))
    torch.testing.assert_close(output(merged), expected)


def test_sentence_transformers_embed_with_the_graft_and_save_it(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    converted = saved(tmp_path / "graft", "encoder", Sparsefinder(alpha=1.5))
    opened = library.SentenceTransformer(str(tmp_path / "graft"), device="cpu")
    batch = converted.tokenizer(TEXTS, return_tensors="pt", padding=True)

    @torch.no_grad()
    def mean_state(model) -> torch.Tensor:
        states = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        mask = batch["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    found = opened.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, mean_state(converted.model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, mean_state(dense(tmp_path / "graft")), atol=1e-2)
    opened.save_pretrained(str(tmp_path / "sentences"))
    again = library.SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)
    assert load(tmp_path / "sentences").methods[0].config == converted.methods[0].config


@pytest.mark.parametrize("adapter", [False, True])
def test_trl_trains_a_loaded_graft_and_saves_it(adapter, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "graft", "decoder", TopK(attention_k=2))
    tokenizer = AutoTokenizer.from_pretrained("graft")
    model = AutoModelForCausalLM.from_pretrained("graft")
    before = output(model).clone()
    options = {}
    if adapter:
        peft = pytest.importorskip("peft", reason="peft is not installed; it is the extra lora")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir="trained",
            # the first step of LoRA changes nothing but B, which starts at 0
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            max_length=16,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    trainer.save_model("final")
    after = output(trainer.model)
    assert not torch.equal(after, before)
    if adapter:
        opened = peft.AutoPeftModelForCausalLM.from_pretrained("final")
    else:
        opened = AutoModelForCausalLM.from_pretrained("final")
        assert load("final").methods[0].config.attention_k == 2
        assert not torch.allclose(output(dense(Path("final"))), after)
    assert torch.equal(output(opened), after)


def test_a_restored_graft_leaves_no_mark(tmp_path):
    from transformers import AutoModelForCausalLM

    saved(tmp_path / "graft", "decoder", TopK(attention_k=2))
    assert "graftwork" in (tmp_path / "graft" / "config.json").read_text().lower()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "graft")
    restore(opened)
    opened.save_pretrained(tmp_path / "dense")
    assert "graftwork" not in (tmp_path / "dense" / "config.json").read_text().lower()
    assert not (tmp_path / "dense" / "graftwork.json").exists()
    expected = output(load(shipped_model("decoder"), dtype="float32").model)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
