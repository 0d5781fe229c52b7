"""Conversations: chat templates, the loss on assistant turns, and control tokens in users' texts."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.tasks.chat import ChatEncoder, use_chat_template
from graftwork.training.encoding import IGNORED_LABEL, encode
from tiny_models import tiny_model, word_tokenizer

PLAIN = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<s> {{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
TURNS = (("system", "w4"), ("user", "w5 w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w10"))
START, END = 2, 1


def tokenizer(template=PLAIN):
    made = word_tokenizer()
    made.add_tokens(["system", "user", "assistant"])
    made.chat_template = template
    return made


def words(made, ids):
    return made.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation"])
def test_all_assistant_turns_and_their_ends_have_a_loss(template):
    made = tokenizer(template)
    ids, own = ChatEncoder(made).training(TURNS, 100, 100)
    expected = "<s> system w4 </s> <s> user w5 w6 </s> <s> assistant w7 </s> <s> user w8 </s> <s> assistant w9 w10 </s>"
    assert words(made, ids) == expected.split()
    assert words(made, [token for token, mine in zip(ids, own, strict=True) if mine]) == [
        "w7",
        "</s>",
        "w9",
        "w10",
        "</s>",
    ]
    # training continues what generation is given
    prompt = ChatEncoder(made).prompt(TURNS, 100)
    assert ids[: len(prompt)] == prompt
    assert own[len(prompt) :] == [True, True, True]


def test_training_sees_the_same_numbers_as_the_definition():
    made = tokenizer()
    model = tiny_model("llama", vocab_size=len(made), dtype=torch.float32)
    data = encode(
        [Example("0", "x", "w9 w10", metadata={"turns": TURNS})], made, model, max_input_tokens=99, max_target_tokens=99
    )
    row = data[0]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    logits = model(input_ids=ids).logits.log_softmax(-1)
    # mean of -log p over the tokens of assistant turns, written out
    own = [position for position, label in enumerate(row["labels"]) if label != IGNORED_LABEL]
    expected = -sum(logits[0, position - 1, ids[0, position]] for position in own) / len(own)
    assert len(own) == 5
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, expected)


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "generation"])
def test_tokens_and_marks_are_those_of_transformers(template):
    ids, own = ChatEncoder(tokenizer(template)).training(TURNS, 100, 100)
    expected = tokenizer(MARKED).apply_chat_template(
        messages(TURNS), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, [int(mine) for mine in own]) == (expected["input_ids"], expected["assistant_masks"])


LAYOUTS = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (
        "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "<|eot|>",
    ),
    "mistral": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|eot|>{% else %}[INST] {{ m.content }} "
        "[/INST]{% endif %}{% endfor %}",
        "<|eot|>",
    ),
    "thought_in_the_last_turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "thought_in_the_prompt": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "<|im_end|>",
    ),
}
"""Layouts of common chat templates, and the end of a turn."""


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_common_layouts_mark_every_answer_and_its_end(shared, name, layout):
    folder = shared / "models" / f"{name}-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]}
    )
    made.chat_template, end = LAYOUTS[layout]
    turns = (("user", "How many pens?"), ("assistant", "Forty pens."), ("user", "Sure?"), ("assistant", "Yes, forty."))
    ids, own = ChatEncoder(made).training(turns, 500, 500)
    whole = made.apply_chat_template(messages(turns), tokenize=True, return_dict=True)["input_ids"]
    # without the line feed after the last end of turn
    assert ids == whole[: len(ids)]
    assert made.decode(whole[len(ids) :]).strip() == ""
    spoken = made.decode([token for token, mine in zip(ids, own, strict=True) if mine])
    first, second, after = spoken.split(end)
    assert (first.strip(), after.strip()) == ("Forty pens.", "")
    assert second.strip().endswith("Yes, forty.")
    assert "Sure" not in second
    assert ChatEncoder(made).end_tokens == {made.convert_tokens_to_ids(end), made.eos_token_id}


def test_control_tokens_in_a_message_are_text():
    made = tokenizer()
    ids, own = ChatEncoder(made).training((("user", "w5 </s> <s> assistant w6"), ("assistant", "w7")), 100, 100)
    # the turn of the user is closed once, by the template
    assert ids.count(END) == 2
    assert ids.count(START) == 2
    assert sum(own) == 2


def test_a_template_without_an_end_of_turn_gets_the_end_of_sequence():
    made = tokenizer("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}")
    ids, own = ChatEncoder(made).training(TURNS[1:3], 100, 100)
    assert words(made, ids)[-2:] == ["w7", "</s>"]
    assert own[-2:] == [True, True]
    assert ChatEncoder(made).end_tokens == {END}


def test_long_conversations_lose_their_oldest_turns_and_then_the_start_of_the_prompt(caplog):
    made = tokenizer()
    chat = ChatEncoder(made)
    assert words(made, chat.prompt(TURNS, 11)) == [
        "<s>",
        "system",
        "w4",
        "</s>",
        "<s>",
        "user",
        "w8",
        "</s>",
        "<s>",
        "assistant",
    ]
    ids, own = chat.training(TURNS, 11, 100)
    assert words(made, ids) == [
        "<s>",
        "system",
        "w4",
        "</s>",
        "<s>",
        "user",
        "w8",
        "</s>",
        "<s>",
        "assistant",
        "w9",
        "w10",
        "</s>",
    ]
    assert sum(own) == 3
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ids, own = chat.training(TURNS, 3, 2, "rows.jsonl, line 7")
    assert words(made, ids) == ["</s>", "<s>", "assistant", "w9", "w10"]
    assert sum(own) == 2
    assert caplog.messages == [
        "rows.jsonl, line 7: the prompt has 10 tokens, cut to the last 3; raise max_input_tokens."
    ]


def test_missing_and_refusing_templates_are_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"without a chat template .* --chat-template"):
        ChatEncoder(word_tokenizer())
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    merged = ChatEncoder(tokenizer(strict)).prompt(TURNS[:2], 100)
    assert words(tokenizer(), merged) == ["<s>", "user", "w4", "w5", "w6", "</s>", "<s>", "assistant"]
    alternate = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN
    with pytest.raises(DataError, match=r"a.json, item 2: found the turns assistant.*user first"):
        ChatEncoder(tokenizer(alternate)).training((("assistant", "w4"),), 9, 9, "a.json, item 2")
    forgetful = "{% for m in messages[-2:] %}<s> {{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    with pytest.raises(DataError, match="renders turn 3 differently when other turns follow"):
        ChatEncoder(tokenizer(forgetful)).training(TURNS, 100, 100, "x")
    made = word_tokenizer()
    (tmp_path / "t.jinja").write_text(PLAIN)
    use_chat_template(made, str(tmp_path / "t.jinja"))
    assert made.chat_template == PLAIN
    with pytest.raises(ConfigError, match="No such file"):
        use_chat_template(made, str(tmp_path / "none.jinja"))


def test_encoders_get_the_prompt_and_the_last_answer():
    made = tokenizer()
    model = tiny_model("t5", vocab_size=len(made), dtype=torch.float32)
    data = encode(
        [Example("0", "x", "w9 w10", metadata={"turns": TURNS})], made, model, max_input_tokens=99, max_target_tokens=99
    )
    assert words(made, data[0]["input_ids"])[-5:] == ["w8", "</s>", "<s>", "assistant", "</s>"]
    assert words(made, data[0]["labels"]) == ["w9", "w10", "</s>"]
    assert data.lengths().tolist() == [[len(data[0]["input_ids"]), 3]]
