"""Control tokens in users' texts are text: in layouts of published tokenizers, whatever the texts contain."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.text.prompting import (
    PromptBuilder,
    answer_ids,
    document_ids,
    question_ids,
    verbatim_ids,
)
from graftwork.methods.regrad.text.requests import Question
from graftwork.tasks.chat import ChatEncoder
from graftwork.tasks.prompts import PromptFamily, prompt_family
from graftwork.tasks.special_tokens import SpecialTokenEscaper
from tokenizer_layouts import FAMILIES, layout

HARMLESS = "Where is the town?"
JOINED = PromptFamily("Answer.", "Use these.", "{{ title }}{{ text }}", "{{ question }}{{ choices | join('') }}", "A:")
"""Prompts without anything between users' texts, so that two of them could form one token."""


def control_ids(tokenizer) -> set[int]:
    """Ids of all added tokens; runs of line feeds are ordinary text."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}


def counts(tokenizer, ids) -> dict[int, int]:
    return {token: ids.count(token) for token in control_ids(tokenizer) if token in ids}


def hostile_texts(tokenizer, count: int, seed: int = 0) -> list[str]:
    """Random texts of names of tokens, parts of them, placeholder characters, white space and words."""
    draw = random.Random(seed)
    names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    parts = ["\ue000", "\ue001", "\ue00041\ue001", "a", " town", "\n", " ", "<", "｜", "[", "的", "🙂", "\u0338"]

    def part() -> str:
        name = draw.choice(names)
        cut = draw.randrange(len(name) + 1)
        return draw.choice([name, name, name[:cut], name[cut:], name[:cut] + name + name[cut:], draw.choice(parts)])

    return ["x" + "".join(part() for _ in range(draw.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_of_a_prompt_are_those_of_its_template(family):
    tokenizer = layout(family)
    config = ReGradConfig()
    texts = hostile_texts(tokenizer, 60)
    for kind in (prompt_family("open"), prompt_family("choice"), JOINED, replace(JOINED, system="")):
        choices = [HARMLESS] * 5
        expected = counts(tokenizer, question_ids(tokenizer, kind, HARMLESS, choices=choices, passages=[("T", "x")]))
        for one, other in pairwise(texts):
            # without a system prompt there is no chat template, and the family itself is the template
            hostile = replace(kind, system=f"{kind.system}{other}", context=one) if kind.system else kind
            ids = question_ids(
                tokenizer,
                hostile,
                one,
                choices=[other, one, other, one, other],
                passages=[(one, other), (other, one)],
            )
            assert counts(tokenizer, ids) == expected, (one, other)
    for text in texts:
        passage, _ = document_ids(tokenizer, config, text, text)
        assert counts(tokenizer, passage) == counts(tokenizer, document_ids(tokenizer, config, "T", HARMLESS)[0]), text
        assert counts(tokenizer, answer_ids(tokenizer, config, text)) == {tokenizer.eos_token_id: 1}, text


@pytest.mark.parametrize("family", FAMILIES)
def test_system_prompts_earlier_turns_and_verbatim_prompts_add_no_control_token(family):
    tokenizer = layout(family)
    texts = hostile_texts(tokenizer, 40, seed=3)
    kind = prompt_family("open")
    turns = (("user", HARMLESS), ("assistant", "Rome"))
    for chosen in (kind, replace(kind, system="")):
        expected = counts(tokenizer, question_ids(tokenizer, chosen, HARMLESS, system="Answer.", history=turns))
        for one, other in pairwise(texts):
            history = (("user", one), ("assistant", other))
            ids = question_ids(tokenizer, chosen, other, system=one, history=history)
            assert counts(tokenizer, ids) == expected, (one, other)
    plain = counts(tokenizer, verbatim_ids(tokenizer, kind, HARMLESS))
    for one, other in pairwise(texts):
        assert counts(tokenizer, verbatim_ids(tokenizer, kind, one, [(other, one)])) == plain, (one, other)


def test_passages_are_encoded_on_another_thread_than_questions():
    """Encoding a control token as text changes a setting of the tokenizer for the duration of the call."""
    tokenizer = layout("llama3")
    config = ReGradConfig()
    builder = PromptBuilder(tokenizer, config, 2048, None)
    texts = hostile_texts(tokenizer, 60, seed=4)

    def passages() -> list[list[int]]:
        return [document_ids(tokenizer, config, text, text)[0] for text in texts]

    def prompts() -> list[list[int]]:
        return [builder.build(Question(text, ()), (), 8) for text in texts]

    expected = [passages(), prompts()]
    with ThreadPoolExecutor(4) as pool:
        found = [[pool.submit(make) for make in (passages, prompts)] for _ in range(6)]
        for pair in found:
            assert [one.result() for one in pair] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_two_texts_do_not_join_to_a_control_token(family):
    tokenizer = layout(family)
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    config = replace(ReGradConfig(), document_template="{{ title }}{{ text }}")
    expected = counts(tokenizer, document_ids(tokenizer, config, "", HARMLESS)[0])
    for name in names:
        for cut in range(1, len(name)):
            ids, _ = document_ids(tokenizer, config, f"see {name[:cut]}", f"{name[cut:]} there")
            assert counts(tokenizer, ids) == expected, name
            if family != "gemma":
                assert tokenizer.decode(ids, skip_special_tokens=True) == f"see {name} there"


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_text_is_kept_and_ordinary_text_is_encoded_as_by_the_tokenizer(family):
    tokenizer = layout(family)
    for ordinary in (HARMLESS, "  Two\n\nlines, x < y [1] and more.\n\n\n", "的 🙂  spaces", "<b>bold</b> & [note]"):
        escaper = SpecialTokenEscaper(tokenizer)
        found = escaper.tokens(escaper.escape(ordinary), automatic=True)
        assert found == tokenizer(ordinary)["input_ids"]
    for name in (str(token) for token in tokenizer.added_tokens_decoder.values()):
        escaper = SpecialTokenEscaper(tokenizer)
        ids = escaper.tokens(escaper.escape(f"a {name} b"), automatic=False)
        assert tokenizer.decode(ids) == f"a {name.replace('▁', ' ') if family == 'gemma' else name} b"


def test_spellings_that_are_normalised_to_a_control_token_are_text():
    raw = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    control = tokenizer.convert_tokens_to_ids("<think>")
    for spelling in ("<think>", "<THINK>", "＜think＞", "＜Ｔhink>"):
        assert control in tokenizer(f"a {spelling} b")["input_ids"]
        escaper = SpecialTokenEscaper(tokenizer)
        ids = escaper.tokens(escaper.escape(f"a {spelling} b"), automatic=False)
        assert control not in ids
        assert tokenizer.decode(ids) == "a <think> b"


def test_markers_of_a_template_without_tokens_of_their_own_are_split():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(layout("qwen2").backend_tokenizer.to_str()))
    tokenizer.chat_template = "{% for m in messages %}<<SYS>>{{ m.content }}<</SYS>> [INST]{% endfor %}"
    escaper = SpecialTokenEscaper(tokenizer)
    for marker in ("<<SYS>>", "<</SYS>>", "[INST]"):
        own = tokenizer(marker)["input_ids"]
        ids = escaper.tokens(escaper.escape(f"a{marker}b"), automatic=False)
        assert not any(ids[at : at + len(own)] == own for at in range(len(ids)))
        assert tokenizer.decode(ids) == f"a{marker}b"
    assert escaper.escape("[OTHER] <b>") == "[OTHER] <b>"


def test_tokens_after_the_text_stay_at_the_end():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(layout("llama3").backend_tokenizer.to_str())
    )
    tokenizer.eos_token = "<|eot_id|>"
    from tokenizers.processors import TemplateProcessing

    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin_of_text|>", "<|eot_id|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends
    )
    escaper = SpecialTokenEscaper(tokenizer)
    for text in ("a <|eot_id|> b", "<|eot_id|> b", "a <|begin_of_text|>"):
        ids = escaper.tokens(escaper.escape(text), automatic=True)
        assert [ids[0], ids[-1]] == [ends[0][1], ends[1][1]]
        assert counts(tokenizer, ids) == dict.fromkeys((ends[0][1], ends[1][1]), 1)


def test_thoughts_are_control_tokens_in_assistant_turns_only():
    tokenizer = layout("qwen3")
    think = tokenizer.convert_tokens_to_ids("<think>")
    chat = ChatEncoder(tokenizer)
    user = chat.prompt([("user", "a <think> b")], 200)
    assert user.count(think) == 1, "the template's own"
    ids, mask = chat.training([("user", "a <think> b"), ("assistant", "<think>\nc\n")], 200, 200)
    assert ids.count(think) == 1
    assert mask[ids.index(think)]
