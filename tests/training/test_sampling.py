"""Mixture schedules and packed rows."""

from collections import Counter
from itertools import islice

import pytest
import torch

from graftwork.core.example import Example
from graftwork.errors import ConfigError, UnknownNameError
from graftwork.methods.wt5.phases import FinetuneExplanations, explanation_tokens
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.lengths import sequences_per_step
from graftwork.settings.training import TrainingSettings
from graftwork.training.arguments import training_arguments
from graftwork.training.encoding import EncodedExamples, PadBatch
from graftwork.training.packing import PackBatch, PackedExamples, check_packing, forward
from graftwork.training.phases import Finetune
from graftwork.training.sampling import BLOCK, MixtureSampler, MixtureSchedule, PackedSampler
from graftwork.training.trainer import PhaseTrainer
from tiny_models import PAD, assert_same, gradients, tiny_model, word_tokenizer

SIZES, SHARES = [7, 40], [0.25, 0.75]


def test_tasks_are_sampled_in_proportion_to_their_shares():
    tasks = Counter(MixtureSchedule(SIZES, SHARES, seed=0).tasks(0, 20_000))
    # four standard deviations of a binomial
    assert abs(tasks[0] - 5000) < 4 * (20_000 * 0.25 * 0.75) ** 0.5


def test_each_task_is_shuffled_per_pass():
    stream = MixtureSchedule(SIZES, SHARES, seed=0)[0:5000]
    small = [index for index in stream if index < 7]
    laps = [small[start : start + 7] for start in range(0, len(small) - 6, 7)]
    assert all(sorted(lap) == list(range(7)) for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 50
    assert set(stream) == set(range(47))


@pytest.mark.parametrize("start", [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
def test_any_slice_of_the_schedule_can_be_computed_alone(start):
    whole = MixtureSchedule(SIZES, SHARES, seed=3)[0 : 4 * BLOCK]
    assert MixtureSchedule(SIZES, SHARES, seed=3)[start : start + 50] == whole[start : start + 50]
    assert MixtureSchedule(SIZES, SHARES, seed=4)[start : start + 50] != whole[start : start + 50]


def test_epochs_of_a_mixture_are_consecutive():
    schedule = MixtureSchedule(SIZES, SHARES, seed=0)
    sampler = MixtureSampler(schedule, 30)
    found = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found += list(sampler)
    assert len(sampler) == 30
    assert found == schedule[0:90]


def test_a_task_with_share_zero_is_never_sampled():
    assert set(MixtureSchedule([3, 3], [0.0, 1.0], seed=0).tasks(0, 1000)) == {1}


LENGTHS = [(3 + index % 5, 2 + index % 3) for index in range(47)]


def packed(epoch=0, multiple=1, room=(16, 12)):
    sampler = PackedSampler(MixtureSchedule(SIZES, SHARES, seed=0), LENGTHS, room, multiple)
    sampler.set_epoch(epoch)
    return sampler, list(sampler)


def test_packed_rows_respect_the_limits_and_contain_every_sample_once():
    sampler, rows = packed(multiple=4)
    assert len(rows) == len(sampler)
    assert len(rows) % 4 == 0
    for row in rows:
        assert sum(LENGTHS[index][0] for index in row) <= 16
        assert sum(LENGTHS[index][1] for index in row) <= 12
    assert sum(len(row) for row in rows) > 2 * len(rows)
    endless = PackedSampler(MixtureSchedule(SIZES, SHARES, seed=0), LENGTHS, (16, 12))
    many = Counter(index for row, *_ in islice(endless._rows(0, []), 400) for index in row)
    drawn = Counter(MixtureSchedule(SIZES, SHARES, seed=0)[0 : sum(many.values()) + 16 * 6])
    assert not many - drawn


def test_packed_epochs_are_consecutive():
    (sampler, first), (_, second), (_, third) = packed(0), packed(1), packed(2)
    assert [row for row, *_ in islice(sampler._rows(0, []), 3 * len(sampler))] == first + second + third
    for epoch, expected in ((1, second), (2, third), (0, first), (2, third)):
        sampler.set_epoch(epoch)
        assert list(sampler) == expected


def test_a_packed_epoch_does_not_draw_the_examples_of_earlier_ones_again(monkeypatch):
    sampler, _ = packed(0)
    drawn = []
    stream = PackedSampler._stream
    monkeypatch.setattr(
        PackedSampler, "_stream", lambda self, first: ((drawn.append(i), i)[1] for i in stream(self, first))
    )
    counts = []
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        drawn.clear()
        list(sampler)
        counts.append(len(drawn))
    assert max(counts) < 1.5 * counts[0]


@pytest.fixture
def rows():
    texts = [("w4 w5 w6", "w7 w8"), ("w9 w10 w11 w12 w13", "w14"), ("w15", "w16 w17 w18"), ("w20 w21", "w22 w23")]
    return [Example(str(i), source, target) for i, (source, target) in enumerate(texts)]


def encoded(rows):
    return EncodedExamples(rows, word_tokenizer(), encoder_decoder=True, max_input_tokens=32, max_target_tokens=32)


PACKS = [(0, 1, 2), (3,)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5"])
def test_packed_and_padded_rows_have_equal_loss_and_gradients(rows, name, attention):
    model = tiny_model(name, attention=attention)
    data = encoded(rows)
    single = PadBatch(PAD)([data[index] for index in range(4)])
    expected = Finetune().step(model, single)["loss"]
    expected.backward()
    before = gradients(model)
    model.zero_grad()
    batch = PackBatch(PAD)([PackedExamples(data, PAD)[pack] for pack in PACKS])
    assert (batch["segment_ids"] == 0).any(), "one row is shorter, so padding is tested too"
    found = Finetune().step(model, batch)["loss"]
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients(model), before, tolerance=1e-12)


def test_logits_of_packed_and_single_examples_are_equal(rows):
    model, data = tiny_model("t5"), encoded(rows)
    batch = PackBatch(PAD)([PackedExamples(data, PAD)[pack] for pack in PACKS])
    logits = forward(model, batch).logits
    for row, pack in enumerate(PACKS):
        for number, index in enumerate(pack, start=1):
            alone = forward(model, PadBatch(PAD)([data[index]])).logits[0]
            own = logits[row][batch["decoder_segment_ids"][row] == number]
            torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)


def test_packing_works_with_gradient_checkpointing_and_another_method(rows):
    from graftwork.grafting.conversion import convert
    from graftwork.methods.topk import TopK

    data = encoded(rows)
    batch = PackBatch(PAD)([PackedExamples(data, PAD)[pack] for pack in PACKS])
    model = tiny_model("t5").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    convert(model, TopK(attention_k=3, feed_forward_k=6))
    single = PadBatch(PAD)([data[index] for index in range(4)])
    torch.manual_seed(0)
    model.eval()
    torch.testing.assert_close(forward(model, batch).loss, forward(model, single).loss, rtol=1e-12, atol=1e-12)


def test_packing_is_refused_for_absolute_positions():
    with pytest.raises(ConfigError, match="packing is on for BartForConditionalGeneration"):
        check_packing(tiny_model("bart"), 64)


def test_the_loss_separates_labels_from_explanations(rows):
    separator = (30, 31)
    labels = torch.tensor([[5, 30, 31, 6, 7, 1, -100], [5, 30, 6, 1, -100, -100, -100]])
    assert explanation_tokens(labels, separator)[0].tolist() == [False, *[True] * 6]
    assert not explanation_tokens(labels, separator)[1, :4].any()
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    packed_labels = torch.tensor([[5, 30, 31, 1, 6, 1, -100]])
    assert explanation_tokens(packed_labels, separator, segments)[0].tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_loss_weights_apply_to_each_part(rows):
    model, data = tiny_model("t5"), encoded(rows)
    batch = PadBatch(PAD)([data[index] for index in range(4)])
    plain = FinetuneExplanations()
    plain.separator = tuple(word_tokenizer()("w17", add_special_tokens=False)["input_ids"])
    values = plain.step(model, batch)
    torch.testing.assert_close(values["loss"], Finetune().step(model, batch)["loss"])
    # of 12 target tokens, w17 w18 and the end are a reason
    total = int((batch["labels"] != -100).sum())
    both = (values["label_loss"] * (total - 3) + values["explanation_loss"] * 3) / total
    torch.testing.assert_close(both, values["loss"].detach())
    weighted = FinetuneExplanations(explanation_weight=2.0)
    weighted.separator = plain.separator
    expected = (values["label_loss"] * (total - 3) + 2 * values["explanation_loss"] * 3) / (total + 3)
    torch.testing.assert_close(weighted.step(model, batch)["loss"].detach(), expected)


def test_z_loss_is_the_squared_log_of_the_softmax_denominator(rows):
    model, data = tiny_model("t5"), encoded(rows)
    batch = PadBatch(PAD)([data[0]])
    logits = model(**batch).logits.float()
    added = 0.1 * logits.exp().sum(-1).log().square().mean()
    plain, with_z = FinetuneExplanations(), FinetuneExplanations(z_loss=0.1)
    plain.separator = with_z.separator = (63,)
    torch.testing.assert_close(with_z.step(model, batch)["loss"], plain.step(model, batch)["loss"] + added)


@pytest.mark.parametrize(
    ("profile", "sequences"), [("movie_rationales", 32), ("eraser_multi_rc", 64), ("esnli", 128), ("cos_e", 512)]
)
def test_r4_sequences_of_a_token_budget(profile, sequences):
    settings = TrainingSettings(("x",), lengths=profile, tokens_per_batch=65_536, per_device_train_batch_size=8)
    assert settings.passes() == (8, sequences // 8)
    evaluation = EvaluationSettings(lengths=profile, tokens_per_batch=65_536)
    assert evaluation.rows_at_once == sequences


def test_r4_a_remainder_is_rounded_down_and_refused_in_reference_mode():
    assert sequences_per_step(65_536, 3000, 512) == 21
    assert sequences_per_step(100, 3000, 512) == 1
    with pytest.raises(ConfigError, match="tokens_per_batch is 65536, which is no multiple of the longest side, 3000"):
        sequences_per_step(65_536, 3000, 512, exact=True)
    settings = TrainingSettings(("x",), max_input_tokens=3000, tokens_per_batch=65_536, per_device_train_batch_size=8)
    assert settings.passes() == (7, 3)
    with pytest.raises(ConfigError, match="21 sequences a step for 2 processes"):
        settings.passes(2)


def test_length_profiles_fill_unset_fields():
    settings = TrainingSettings(("x",), lengths="esnli", max_target_tokens=64)
    assert (settings.max_input_tokens, settings.max_target_tokens) == (512, 64)
    assert EvaluationSettings(lengths="cos_e").max_new_tokens == 96
    with pytest.raises(UnknownNameError, match="Unknown length profile 'movies'"):
        TrainingSettings(("x",), lengths="movies")


def test_r6_truncation_keeps_the_end_of_sequence_token():
    row = Example("0", "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13")
    tokenizer = word_tokenizer()
    tokenizer.add_eos_token = True
    data = EncodedExamples([row], tokenizer, encoder_decoder=True, max_input_tokens=6, max_target_tokens=6)
    assert data[0]["labels"] == [4, 5, 6, 7, 8, tokenizer.eos_token_id]


def test_adafactor_steps_match_t5_pretraining(tmp_path):
    settings = TrainingSettings(("x",), optim="adafactor", learning_rate=1e-3, max_grad_norm=None)
    arguments = training_arguments(settings, tmp_path, 0)
    assert arguments.max_grad_norm == 0
    model = tiny_model("t5")
    for scale in (True, False):
        trainer = PhaseTrainer(Finetune(), model=model, args=arguments, scale_parameter=scale)
        group = trainer.create_optimizer().param_groups[0]
        expected = {
            "lr": 1e-3,
            "scale_parameter": scale,
            "relative_step": False,
            "warmup_init": False,
            "clip_threshold": 1.0,
            "decay_rate": -0.8,
            "eps": (1e-30, 1e-3),
            "beta1": None,
        }
        assert {name: group[name] for name in expected} == expected
