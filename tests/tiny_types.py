"""Tiny random models of every text model type of the installed transformers, built from their configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

VOCABULARY = 96
PAD, BOS, EOS = 0, 1, 2
LARGEST = 5_000_000
"""Number of parameters above which a configuration has not been shrunk."""

SHRUNK: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "embedding_dim", "hidden_dim", "n_embed"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_head"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_mtp_layers"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "attention_window_size"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "type_vocab_size": 2,
}
"""Values of configuration fields, by name, where a model type has them."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_ALL_HEADS = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    # latent attention: one key per query head
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"), _ALL_HEADS),
    **dict.fromkeys(("dots3_note", "dots3_note_text", "esmc", "longcat_flash", "minicpm3"), _ALL_HEADS),
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "glm4_moe_lite": _ALL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    # hybrids: one layer of each kind
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE),
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **_BERT},
        "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True, **_BERT},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "initializer_range": 0.02,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "youtu": _ALL_HEADS,
    "zaya": {"num_experts_per_tok": 1, "initializer_range": 0.05},
    "mpnet": {"relative_attention_num_buckets": 32},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}
"""Fields of model types whose configuration cannot be shrunk by name."""


_OTHER_MODALITIES = ("vision", "image", "audio", "speech", "video", "vq_config", "timm")
"""Words in field names of configurations of models that also read images or sound."""


def is_text_type(model_type: str) -> bool:
    """True if a configuration has no part for images or sound."""
    fields = dataclasses.fields(transformers.CONFIG_MAPPING[model_type])
    return not any(word in field.name for field in fields for word in _OTHER_MODALITIES if "layer" not in field.name)


def model_types() -> dict[str, str]:
    """Kind ("encoder", "decoder" or "both") of every text model type; types with a masked head are encoders."""
    kinds = {
        **dict.fromkeys(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "decoder"),
        **dict.fromkeys(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "encoder"),
        **dict.fromkeys(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "both"),
    }
    return {name: kinds[name] for name in sorted(kinds) if is_text_type(name)}


def _class_name(model_type: str, kind: str) -> str:
    mapping = {
        "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "both": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }[kind]
    found = mapping[model_type]
    return found if isinstance(found, str) else found[0]


def shrunk(config_class: Any, changes: dict[str, Any]) -> Any:
    """Build a configuration with small values; nested configurations are shrunk too."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in SHRUNK:
            values[field.name] = SHRUNK[field.name]
        elif isinstance(field.default, float) and ("dropout" in field.name or field.name.endswith(("_pdrop", "drop"))):
            values[field.name] = 0.0
    for name, nested in (getattr(config_class, "sub_configs", None) or {}).items():
        if nested is not transformers.AutoConfig and name not in changes:
            values[name] = shrunk(nested, {}).to_dict()
    return config_class(**{**values, **changes})


def build(model_type: str, kind: str) -> tuple[Any, Observed]:
    """Return a tiny model and its results: in float64, or in float32 if its code does not compute in float64.

    Raises:
        ValueError: If the results are not finite in either type.
    """
    for dtype in (torch.float64, torch.float32):
        try:
            model = _built(model_type, kind).to(dtype)
            size = sum(p.numel() for p in model.parameters())
            if size > LARGEST:
                raise ValueError(f"the model has {size:,} parameters; add fields that shrink it to OVERRIDES")
            observed = observe(model, kind)
        except RuntimeError:
            if dtype == torch.float32:
                raise
            continue
        if all(bool(each.isfinite().all()) for each in (observed.logits, *observed.gradients.values())):
            return model, observed
    raise ValueError("logits or gradients of the dense model are not finite")


def _built(model_type: str, kind: str) -> Any:
    """Return a tiny model in eval mode with biases and norms that are not trivial."""
    config = shrunk(transformers.CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    if kind == "both" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = BOS
    torch.manual_seed(0)
    model = getattr(transformers, _class_name(model_type, kind))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """Three rows of 11, 7 and 4 real tokens, padded on the left for decoders; labels of real tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths, longest = (11, 7, 4), 11
    ids = torch.randint(3, VOCABULARY, (3, longest), generator=generator)
    position = torch.arange(longest)
    real = torch.stack([position >= longest - n if kind == "decoder" else position < n for n in lengths])
    found = {"input_ids": ids.where(real, PAD), "attention_mask": real.long()}
    if kind == "both":
        labels = torch.randint(3, VOCABULARY, (3, 6), generator=generator)
        found["labels"] = labels.where(torch.arange(6) < torch.tensor([[6], [4], [3]]), -100)
        found["decoder_input_ids"] = torch.cat([torch.full((3, 1), BOS), labels[:, :-1]], dim=1)
    else:
        # a padded query predicts the first real token of a decoder; its attention, to no key, is undefined
        first = real & (position == longest - torch.tensor(lengths)[:, None]) if kind == "decoder" else ~real
        found["labels"] = found["input_ids"].where(real & ~first, -100)
    return found


@dataclasses.dataclass(frozen=True)
class Observed:
    """Logits at real positions, gradients by parameter, and generated tokens (empty for encoders)."""

    logits: Tensor
    gradients: dict[str, Tensor]
    generated: Tensor | None


def observe(model: nn.Module, kind: str) -> Observed:
    """Run a model: loss and gradients on a padded batch, and greedy generation with a cache."""
    owner: Any = model
    inputs = batch(kind)
    owner.zero_grad()
    output = owner(**inputs)
    output.loss.backward()
    real = inputs["labels"] != -100
    logits = output.logits[real].detach()
    gradients = {name: p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None}
    owner.zero_grad()
    generated = None
    if kind != "encoder":
        with torch.no_grad():
            generated = owner.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=5,
                do_sample=False,
                use_cache=True,
            )
    return Observed(logits, gradients, generated)
