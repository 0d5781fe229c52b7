"""Edges of the conversion of encoders: labels of a teacher, longest inputs, half precision, and unused snapshots."""

import copy
import shutil

import huggingface_hub
import pytest
import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.errors import CheckpointMismatchError, ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald, weights
from graftwork.methods.cald.functional import SlotRule, TokenWeights, compress
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.metrics.fake_tensors import fake_tensors
from graftwork.surgery.attention import seam_modules
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
    monkeypatch.setattr(
        weights, "load_dense", lambda m, file, rule: (loaded.append(file.parent.name), original(m, file))
    )
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1}, "seed is 1, which has no effect: it needs initialization gaussian or svd"),
        ({"seed": 1, "initialization": "identity", "rank": 16}, "seed is 1"),
        ({"teacher_learning_rate": 1.0}, "it needs guide trajectory"),
        ({"guide": "target", "teacher": "x", "save_teacher": True}, "it needs guide trajectory"),
        ({"guide": "target", "teacher": "x", "snapshots": "y"}, "it needs guide waypoint"),
        ({"guide": "trajectory", "teacher_mode": "train"}, "it needs guide target, hybrid or waypoint"),
        ({"guide": "target", "teacher": "x", "temperature": 3.0}, "it needs output_weight above 0"),
        ({"layer_norm": "rmsnorm"}, "layer_norm is 'rmsnorm', which has no effect: it needs a teacher"),
    ],
)
def test_a_setting_without_effect_is_refused(settings, words):
    found = model()
    with pytest.raises(ConfigError, match=words):
        convert(found, Cald(**settings))
    assert not seam_modules(found)


def test_converting_again_keeps_trained_matrices_if_the_mixers_are_the_same():
    converted = convert(model(), Cald(rank=4, guide="unguided"))
    with torch.no_grad():
        for graft in seam_modules(converted.model).values():
            for matrix in graft.matrices():
                matrix.normal_()
    trained = {name: value.clone() for name, value in converted.model.state_dict().items()}

    def same():
        state = converted.model.state_dict()
        return all(torch.equal(value, trained[name]) for name, value in state.items())

    again = convert(converted, Cald(rank=4, guide="trajectory", freeze_steps=2))
    assert again.methods[0].config.guide == "trajectory"
    assert same()
    with pytest.raises(UnsupportedModelError):
        convert(again, Cald(rank=4, layers="9"))
    assert same()
    convert(again, Cald(rank=4, initialization="gaussian"))
    assert not same()


def test_copies_and_replicas_have_their_own_shared_matrix():
    source = convert(model(), Cald(rank=4, share="layer")).model
    ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = source(input_ids=ids).logits
    copied = copy.deepcopy(source)
    with torch.no_grad():
        for graft in seam_modules(source).values():
            graft.matrices()[0].zero_()
    # the copy does not read the matrix of the original
    torch.testing.assert_close(copied(input_ids=ids).logits, expected)
    loaded = convert(model(), Cald(rank=4, share="layer")).model
    with torch.no_grad():
        next(iter(seam_modules(loaded).values())).projection.zero_()
    loaded.load_state_dict(copied.state_dict())
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)


def test_a_shared_matrix_on_another_device_is_moved_and_an_offloaded_one_refused():
    config, options = Cald(rank=2, share="layer").config, {"scaling": 1.0, "dropout": 0.0, "position_bias": None}
    with fake_tensors():
        like = torch.zeros(1, device="cuda:0")
        first = LinformerAttention(config, 2, 8, 1, like=like, generator=torch.Generator())
        second = LinformerAttention(
            config, 2, 8, 1, like=torch.zeros(1, device="cuda:1"), generator=torch.Generator(), owner=first
        )
        states = [torch.zeros(1, 1, 4, 2, device="cuda:1") for _ in range(3)]
        assert second(second, *states, None, **options).device == torch.device("cuda:1")
    real = [torch.zeros(1, 1, 4, 2) for _ in range(3)]
    owner = LinformerAttention(config, 2, 8, 1, like=torch.zeros(1), generator=torch.Generator())
    user = LinformerAttention(config, 2, 8, 1, like=torch.zeros(1), generator=torch.Generator(), owner=owner)
    user(user, *real, None, **options)
    owner.projection = torch.nn.Parameter(owner.projection.to("meta"))
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        user(user, *real, None, **options)


def test_a_teacher_is_read_from_the_cache_of_the_hub(dense, tmp_path, monkeypatch):
    revision = "1" * 40
    place = tmp_path / "cache" / "models--user--teacher"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots" / revision).mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(dense / "model" / name, place / "snapshots" / revision / name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = train(start(guide="target", teacher="user/teacher"), tmp_path / "run", values(max_steps=2))
    expected = train(start(guide="target", teacher=str(dense)), tmp_path / "other", values(max_steps=2))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    recorded = "".join(each.read_text() for each in (tmp_path / "run" / "train" / "distill").glob("*.json"))
    assert f"snapshots/{revision}" in recorded
    with pytest.raises(CheckpointMismatchError, match="HF_HUB_OFFLINE is set"):
        weights.weights_file("user/other")
