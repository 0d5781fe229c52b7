"""Small tokenizers whose files have the layout of published ones: kinds of added tokens, templates, prefixes."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Who wrote the book about the river? The river runs through the town of Rome, and the book was written there.",
    "Answer the question with the passages. Question: Where is the town? Answer: The town is in the north.",
    "system user assistant Passage number one, two and three: a title, a text; more of it, and the end of it.",
    "<<SYS>> [INST] <</SYS>> [INST] <<SYS>>",
] * 4
FAMILIES = ("llama3", "mistral3", "qwen2", "qwen3", "gemma", "deepseek")

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL3 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}{%- elif m['role'] == 'user' %}"
    "{{- '[INST]' + m['content'] + '[/INST]' }}{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
QWEN2 = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{%- for m in messages %}{%- set content = m['content'] %}"
    "{%- if m['role'] == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

_ADDED: dict[str, tuple[list[str], list[str], str, str | None, str]] = {
    "llama3": (
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        ],
        [],
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral3": (
        [
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"),
            *("<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[PREFIX]"),
        ],
        [],
        MISTRAL3,
        "<s>",
        "</s>",
    ),
    "qwen2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"], [], QWEN2, None, "<|im_end|>"),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
        QWEN3,
        None,
        "<|im_end|>",
    ),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        ["<mask>", "[multimodal]", "<unused0>", "<table>", "[toxicity]", "\n\n", "\n\n\n", "▁▁"],
        GEMMA,
        "<bos>",
        "<eos>",
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"],
        ["<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<｜fim▁hole｜>", "<think>", "</think>", "<｜tool▁sep｜>"],
        DEEPSEEK,
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
}


@cache
def layout(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the layout of a family; its merges are learned from a few sentences."""
    special, ordinary, template, bos, eos = _ADDED[family]
    raw = _pieces() if family == "gemma" else _bytes(nfc=family.startswith("qwen"))
    raw.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in ordinary])
    if bos is not None:
        prefix: Any = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, raw.token_to_id(bos))]
        )
        raw.post_processor = prefix
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


def _bytes(*, nfc: bool) -> Tokenizer:
    raw: Any = Tokenizer(models.BPE())
    if nfc:
        raw.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    return raw


def _pieces() -> Tokenizer:
    raw: Any = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    printable = [*map(chr, range(32, 127)), "\n", "▁"]
    pieces = ["<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=pieces, initial_alphabet=printable, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    # training makes the bytes special tokens; published files have them in the vocabulary only
    return Tokenizer.from_str(json.dumps({**json.loads(raw.to_str()), "added_tokens": []}))


def nllb_tokenizer(words: list[str], source: str | None, target: str | None) -> Any:
    """NLLB's tokenizer with a vocabulary of `words` and three languages, whose tokens follow the vocabulary.

    Args:
        words: Words of one token each.
        source: Code of the source language; None for the default, English.
        target: Code of the target language.
    """
    from transformers import NllbTokenizer

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return NllbTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        src_lang=source,
        tgt_lang=target,
        additional_special_tokens=["eng_Latn", "deu_Latn", "fra_Latn"],
    )
