"""Tiny random models of every supported family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from graftwork.surgery.families import FAMILIES

VOCABULARY = 64
LAYERS = 2
WIDTH = 16
PAD, EOS, BOS = 0, 1, 2

_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_ENCODER = {
    **_SHARED,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_LLAMA = {**_ENCODER, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
_T5 = {
    **_SHARED,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": LAYERS,
    "num_heads": 2,
    "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
_BART = {
    **_SHARED,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "init_std": 0.3,
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Tiny:
    """Specification of a tiny model: class, configuration, and the number of sites that surgery finds."""

    model_class: str
    config: Mapping[str, Any]
    kind: str
    """"encoder", "decoder" or "both"."""
    attention: int = LAYERS
    feed_forward: int = LAYERS
    width: int = 24
    """Number of hidden units of a feed-forward layer."""

    @property
    def decodes(self) -> bool:
        return self.kind != "encoder"


TINY: dict[str, Tiny] = {
    "bert": Tiny("BertForMaskedLM", _ENCODER, "encoder"),
    "roberta": Tiny("RobertaForMaskedLM", _ENCODER, "encoder"),
    "xlm-roberta": Tiny("XLMRobertaForMaskedLM", _ENCODER, "encoder"),
    "camembert": Tiny("CamembertForMaskedLM", _ENCODER, "encoder"),
    "electra": Tiny("ElectraForMaskedLM", {**_ENCODER, "embedding_size": WIDTH}, "encoder"),
    "distilbert": Tiny(
        "DistilBertForMaskedLM",
        {
            **_SHARED,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        },
        "encoder",
    ),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        {
            **_SHARED,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_inner": 24,
            "n_positions": 64,
            "initializer_range": 0.3,
        },
        "decoder",
    ),
    "llama": Tiny("LlamaForCausalLM", _LLAMA, "decoder"),
    "mistral": Tiny("MistralForCausalLM", {**_LLAMA, "sliding_window": 4, "head_dim": 8}, "decoder"),
    "qwen2": Tiny("Qwen2ForCausalLM", _LLAMA, "decoder"),
    "t5": Tiny("T5ForConditionalGeneration", _T5, "both", attention=3 * LAYERS, feed_forward=2 * LAYERS),
    "t5-gated": Tiny(
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        "both",
        attention=3 * LAYERS,
        feed_forward=2 * LAYERS,
    ),
    "mt5": Tiny("MT5ForConditionalGeneration", _T5, "both", attention=3 * LAYERS, feed_forward=2 * LAYERS),
    "bart": Tiny("BartForConditionalGeneration", _BART, "both", attention=3 * LAYERS, feed_forward=2 * LAYERS),
    "opt": Tiny(
        "OPTForCausalLM",
        {
            **_SHARED,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 64,
            "init_std": 0.3,
        },
        "decoder",
    ),
}
"""One entry per model, by family or by family and variant ("t5-gated")."""

ENCODERS = [name for name, tiny in TINY.items() if tiny.kind == "encoder"]
DECODERS = [name for name, tiny in TINY.items() if tiny.kind == "decoder"]
GENERATORS = [name for name, tiny in TINY.items() if tiny.decodes]


def family_of(name: str) -> str:
    return name if name in FAMILIES else name.partition("-")[0]


def tiny_model(
    name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> Any:
    """Return a model in eval mode; float64 makes comparisons exact and near ties irrelevant for selections."""
    tiny = TINY[name]
    model_class = getattr(transformers, tiny.model_class)
    config = model_class.config_class(**{**tiny.config, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # biases and norms start at 0 and 1, which would hide an omitted one
            if parameter_name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch(name: str, *, seed: int = 1) -> dict[str, Tensor]:
    """Return three rows of 11, 7 and 4 real tokens; decoders are padded on the left, other models on the right."""
    kind = TINY[name].kind
    generator = torch.Generator().manual_seed(seed)
    lengths, longest = (11, 7, 4), 11
    ids = torch.randint(3, VOCABULARY, (3, longest), generator=generator)
    position = torch.arange(longest)
    real = torch.stack([position >= longest - n if kind == "decoder" else position < n for n in lengths])
    batch = {"input_ids": ids.where(real, PAD), "attention_mask": real.long()}
    if kind == "both":
        labels = torch.randint(3, VOCABULARY, (3, 6), generator=generator)
        batch["labels"] = labels.where(torch.arange(6) < torch.tensor([[6], [4], [3]]), -100)
    else:
        batch["labels"] = batch["input_ids"].where(real, -100)
    return batch


def real_positions(name: str, batch: Mapping[str, Tensor]) -> Tensor:
    """Mask of the logit positions that belong to real tokens."""
    return batch["labels"] != -100 if TINY[name].kind == "both" else batch["attention_mask"].bool()


def real_logits(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[real_positions(name, batch)]


def loss_and_gradients(model: nn.Module, *batches: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss summed over batches and all gradients, starting from zero gradients."""
    model.zero_grad()
    loss = torch.stack([model(**batch).loss for batch in batches]).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def anatomy(model: nn.Module) -> dict[str, tuple[int, type, bool]]:
    """Return identity, class and training mode of every module by path."""
    return {path: (id(module), type(module), module.training) for path, module in model.named_modules()}


def is_learned(name: str) -> bool:
    """True if a parameter belongs to a method, whose learned state is in a child module named graftwork_…"""
    return any(part.startswith("graftwork_") for part in name.split("."))


def word_tokenizer() -> Any:
    """Return a word-level tokenizer with the words w4 … w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<s>", "<unk>"] + [f"w{index}" for index in range(4, VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def forget_digests(run: Path) -> None:
    """Remove all digests of files from the manifest of a run, as runs of earlier versions have none."""
    file = run / "model" / "graftwork.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    del manifest["files"], manifest["sha256"]
    file.write_text(json.dumps(manifest), encoding="utf-8")
