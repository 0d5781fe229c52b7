"""Edges of the conversion of encoders: labels of a teacher, longest inputs, half precision, and unused snapshots."""

import pytest
import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald, weights
from graftwork.methods.cald.functional import SlotRule, TokenWeights, compress
from methods.cald.runs import LABELS, model, start, train, values
from tiny_models import word_tokenizer


def test_a_teacher_with_its_labels_in_another_order_is_refused(tmp_path):
    teacher = model()
    teacher.config.id2label = dict(enumerate(reversed(LABELS)))
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(CheckpointMismatchError, match="has the labels high, low, and the student low, high"):
        train(start(guide="target", teacher=str(tmp_path / "teacher")), tmp_path / "run", values(max_steps=1))
    teacher.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    teacher.save_pretrained(tmp_path / "unnamed")
    train(start(guide="target", teacher=str(tmp_path / "unnamed")), tmp_path / "other", values(max_steps=1))


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=33,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    return transformers.RobertaForSequenceClassification(config).eval()


def long_rows():
    texts = [" ".join(f"w{4 + (i * j) % 60}" for j in range(1, 60)) for i in range(1, 7)]
    rows = tuple(Example(str(i), text, LABELS[i % 2], (LABELS[i % 2],)) for i, text in enumerate(texts))
    return Examples("words", "train", rows, len(rows), 0, "here")


def test_roberta_has_fewer_positions_than_rows_everywhere(tmp_path):
    # 33 rows of position embeddings, of which one is of padding
    automatic = Cald(rank="auto:0.9").calibrate(roberta(), word_tokenizer(), long_rows().rows)
    assert max(automatic.config.ranks) <= 32
    converted = convert(roberta(), Cald(rank=4), tokenizer=word_tokenizer())
    with pytest.raises(ConfigError, match=r"Expected at most 32.*Set max_input_tokens to at most 32"):
        train(converted, tmp_path / "long", values(max_steps=1, max_input_tokens=33), long_rows())
    train(converted, tmp_path / "run", values(max_steps=1, max_input_tokens=32), long_rows())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_many_tokens_are_exact_to_half_precision(dtype):
    tokens = 2600
    x = torch.full((2, tokens, 3), 60.0, dtype=dtype)
    padding = torch.ones(2, tokens, dtype=torch.bool)
    padding[1, 257:] = False
    for length_rule in ("inv_sqrt", "slot_mean"):
        slots = torch.zeros(tokens, dtype=torch.long)
        rule = SlotRule(length_rule, slots, mask_empty=True)
        own = TokenWeights(padding, tokens, tokens)
        found = compress(x, torch.ones(tokens, 1, dtype=dtype), own, rule)
        assert found.dtype == dtype
        # 60 · L / √L, or the mean: 60
        root = torch.tensor([tokens, 257]).double().sqrt()
        expected = 60 * root if length_rule == "inv_sqrt" else torch.full((2,), 60.0).double()
        torch.testing.assert_close(found[:, 0, 0].double(), expected, rtol=2**-7, atol=0)
    assert own.counts(x).flatten().tolist() == [2600, 257]


def test_a_snapshot_after_the_last_guided_update_is_not_loaded(dense, tmp_path, monkeypatch):
    loaded = []
    original = weights.load_dense
    monkeypatch.setattr(weights, "load_dense", lambda m, file: (loaded.append(file.parent.name), original(m, file)))
    pattern = str(dense / "train" / "distill" / "checkpoint-*")
    converted = start(guide="waypoint", snapshots=pattern, distill_steps=4)
    train(converted, tmp_path / "run", values())
    # five snapshots for ten updates, of which four are guided
    assert loaded == ["checkpoint-2", "checkpoint-4"]


def test_a_trajectory_without_a_loss_on_its_teacher_is_refused():
    with pytest.raises(ConfigError, match="no loss would use the teacher"):
        Cald(guide="trajectory", layer_weight=0)


def test_the_published_initialisation_is_that_of_the_reference_mode():
    assert Cald().config.effective_initialization == "segment_mean"
    assert Cald(compat="reference").config.effective_initialization == "gaussian"
    converted = start()
    matrix = next(value for name, value in converted.model.named_parameters() if name.endswith("key_projection"))
    # 16 positions in 4 slots of neighbours
    assert torch.equal(matrix.argmax(1), torch.arange(16) // 4)
