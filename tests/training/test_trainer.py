"""Training of the phases of a method: resuming, gradient accumulation, adapters, and files on disk."""

import json
import random
from contextlib import contextmanager

import pytest
import torch

from graftwork.core import faults
from graftwork.core.example import Example, Examples
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, DiskFullError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.topk import TopK
from graftwork.methods.topk.modules import TopKAttention, TopKFeedForward
from graftwork.pipeline import training as pipeline
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings
from graftwork.tasks import loading
from graftwork.tasks.task import Task
from graftwork.training.arguments import training_arguments
from graftwork.training.checkpoints import last_checkpoint
from graftwork.training.encoding import IGNORED_LABEL, EncodedExamples, PadBatch, padding_id
from graftwork.training.phases import Finetune, ParameterGroup, Phase
from graftwork.training.sampling import LengthGroups
from graftwork.training.trainer import PhaseData, PhaseTrainer, train_phase
from tiny_models import TINY, tiny_model, word_tokenizer

ROWS = 10
STEPS = 7
"""Two passes over ten rows in batches of two end after ten steps, so seven steps cross one border of epochs."""

WORDS = Task(name="words", source=lambda data, split: None, format=lambda record: None)


def text(generator, length):
    return " ".join(f"w{generator.randint(4, 63)}" for _ in range(length))


def examples(lengths=(3, 9), target=3):
    generator = random.Random(0)
    rows = [Example(str(i), text(generator, generator.randint(*lengths)), text(generator, target)) for i in range(ROWS)]
    return Examples("words", "train", tuple(rows), ROWS, 0, "here")


def settings(**changes):
    values = {
        "tasks": ("words",),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
    }
    return TrainingSettings(**{**values, **changes})


def start(name="t5", dropout=0.0, method=None):
    key = {"t5": "dropout_rate", "llama": "attention_dropout"}[name]
    model = tiny_model(name, dtype=torch.float32, **{key: dropout})
    method = method or TopK(attention_k=3, feed_forward_k=6)
    return convert(model, method, tokenizer=word_tokenizer())


def run(converted, folder, values, seed=3, **options):
    trained, _ = train_phases(converted, values, [examples()], RunFolder(folder), seed=seed, overwrite=False, **options)
    return trained.model


class KilledError(Exception):
    """Simulated end of a process."""


@contextmanager
def kill(forwards):
    """Stop the training in the context after a number of forward passes."""
    count = iter(range(forwards))
    step = PhaseTrainer.training_step

    def counted(self, *args, **options):
        if next(count, None) is None:
            raise KilledError
        return step(self, *args, **options)

    PhaseTrainer.training_step = counted
    try:
        yield
    except KilledError:
        return
    finally:
        PhaseTrainer.training_step = step
    raise AssertionError("the training ended before it was killed")


def assert_equal_weights(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def assert_still_topk(model):
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(TopKFeedForward) == TINY["t5"].feed_forward
    assert kinds.count(TopKAttention) == TINY["t5"].attention


@pytest.mark.parametrize(
    ("dropout", "values"),
    [
        (0.0, {}),
        (0.1, {}),
        pytest.param(
            0.1,
            {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
            marks=pytest.mark.long,
        ),
        pytest.param(0.1, {"gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param(0.1, {"save_steps": 5}, marks=pytest.mark.long),
        (0.1, {"lora": {"r": 2, "target_modules": ["q", "wi"], "lora_dropout": 0.1}}),
    ],
    ids=["plain", "dropout", "grouped and accumulated", "checkpointed", "border of epochs", "lora"],
)
def test_a_killed_and_resumed_training_has_equal_weights(tmp_path, dropout, values):
    values = settings(**values)
    expected = run(start(dropout=dropout), tmp_path / "whole", values)
    stopped = (values.save_steps + 1) * values.gradient_accumulation_steps
    with kill(stopped):
        run(start(dropout=dropout), tmp_path / "cut", values)
    place = tmp_path / "cut" / "train" / "finetune"
    assert last_checkpoint(place).name == f"checkpoint-{values.save_steps}"
    resumed = run(start(dropout=dropout), tmp_path / "cut", values)
    assert_equal_weights(resumed, expected)
    assert_still_topk(resumed)
    steps = [row["step"] for row in map(json.loads, (place / "log.jsonl").read_text().splitlines()) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def other_examples():
    """Return as many examples with answers that the training data cannot predict."""
    generator = random.Random(1)
    rows = [Example(str(i), text(generator, 5), text(generator, 3)) for i in range(6)]
    return [Examples("words", "dev", tuple(rows), 6, 0, "there")]


def validation_losses(folder):
    lines = (folder / "train" / "finetune" / "log.jsonl").read_text().splitlines()
    return {row["step"]: row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row}


@pytest.mark.parametrize("packing", [False, True])
def test_early_stopping_keeps_the_checkpoint_with_the_lowest_validation_loss(tmp_path, packing):
    values = settings(
        max_steps=60, save_steps=2, validation="dev", early_stopping=3, save_total_limit=40, packing=packing
    )
    trained = run(start(), tmp_path, values, validation=other_examples())
    losses = validation_losses(tmp_path)
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 3 * values.save_steps < values.max_steps
    kept = load(tmp_path / "train" / "finetune" / f"checkpoint-{best}", methods=start().methods)
    assert_equal_weights(trained, kept.model)
    # the logged validation loss is the mean over all target tokens, independent of batching
    model = start().model
    model.load_state_dict(kept.model.state_dict())
    batches = [batch_of(other_examples()[0].rows[first : first + 2]) for first in (0, 2, 4)]
    counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
    total = sum(count * float(model(**batch).loss.detach()) for count, batch in zip(counts, batches, strict=True))
    assert losses[best] == pytest.approx(total / sum(counts), rel=1e-4)


def batch_of(rows):
    converted = start()
    encoded = EncodedExamples(
        rows, converted.tokenizer, encoder_decoder=True, max_input_tokens=512, max_target_tokens=100
    )
    return PadBatch(padding_id(converted.tokenizer))([encoded[index] for index in range(len(rows))])


def test_a_resumed_training_keeps_the_early_stopping_counter(tmp_path):
    values = settings(max_steps=60, save_steps=2, validation="dev", early_stopping=3)
    expected = run(start(), tmp_path / "whole", values, validation=other_examples())
    last = max(validation_losses(tmp_path / "whole"))
    with kill(last - 1):
        run(start(), tmp_path / "cut", values, validation=other_examples())
    assert_equal_weights(run(start(), tmp_path / "cut", values, validation=other_examples()), expected)
    assert validation_losses(tmp_path / "cut") == validation_losses(tmp_path / "whole")


@pytest.mark.parametrize("validated", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_training_that_was_killed_after_its_last_step_takes_no_further_one(tmp_path, validated):
    # the last step is inside an epoch; at a border of epochs, the Trainer would stop by itself
    values = settings(save_steps=1, lr_scheduler_type="constant")
    options = {}
    if validated:
        stopping = {"validation": "dev", "early_stopping": 2, "save_total_limit": 40}
        values = settings(max_steps=60, save_steps=2, lr_scheduler_type="constant", **stopping)
        options = {"validation": other_examples()}
    expected = run(start(), tmp_path / "whole", values, **options)
    with faults.handled_by(faults.Fault("training.ended", "full")), pytest.raises(DiskFullError):
        run(start(), tmp_path / "cut", values, **options)
    assert_equal_weights(run(start(), tmp_path / "cut", values, **options), expected)
    names = [{path.name for path in (tmp_path / name / "train/finetune").glob("check*")} for name in ("cut", "whole")]
    assert names[0] == names[1]


@pytest.mark.long
def test_a_masked_language_model_resumes_with_the_same_masks(tmp_path):
    lines = [Example(str(number), row.input, "") for number, row in enumerate(examples((5, 9)).rows)]
    texts = [Examples("words", "train", tuple(lines), ROWS, 0, "here", running_text=True)]
    values = settings(max_steps=5, save_steps=2, max_input_tokens=8)

    def masked(folder):
        tokenizer = word_tokenizer()
        tokenizer.add_special_tokens({"mask_token": "<unk>"})
        model = convert(tiny_model("roberta", dtype=torch.float32), TopK(feed_forward_k=6), tokenizer=tokenizer)
        return train_phases(model, values, texts, RunFolder(folder), seed=3, overwrite=False)[0].model

    expected = masked(tmp_path / "whole")
    with kill(3):
        masked(tmp_path / "cut")
    assert_equal_weights(masked(tmp_path / "cut"), expected)


def test_early_stopping_needs_validation_data(tmp_path):
    values = TrainingSettings(mixture="movie_rationales_100_explanations", early_stopping=2, validation="nowhere")
    with pytest.raises(ConfigError, match="Found no task with split 'nowhere' among movie_rationales_explanations"):
        loading.load_validation(values, tmp_path, 0)


def test_a_decoder_resumes_to_the_same_weights(tmp_path):
    values = settings(train_sampling_strategy="group_by_length")
    expected = run(start("llama", 0.1), tmp_path / "whole", values)
    with kill(4):
        run(start("llama", 0.1), tmp_path / "cut", values)
    assert_equal_weights(run(start("llama", 0.1), tmp_path / "cut", values), expected)


@pytest.mark.parametrize("damage", ["missing", pytest.param("truncated", marks=pytest.mark.long)])
def test_an_incomplete_newest_checkpoint_is_skipped(tmp_path, damage):
    values = settings(save_steps=2, save_total_limit=3)
    expected = run(start(), tmp_path / "whole", values)
    with kill(5):
        run(start(), tmp_path / "cut", values)
    place = tmp_path / "cut" / "train" / "finetune"
    assert last_checkpoint(place).name == "checkpoint-4"
    state = place / "checkpoint-4" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
        (place / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    else:
        state.write_text(state.read_text()[:40])
    assert last_checkpoint(place).name == "checkpoint-2"
    assert_equal_weights(run(start(), tmp_path / "cut", values), expected)


def test_folders_that_are_not_checkpoints_are_skipped(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_tensorboard_files_are_in_the_phase_folder(tmp_path):
    run(start(), tmp_path, settings(max_steps=1))
    assert list((tmp_path / "train" / "finetune" / "tensorboard").glob("events.out.tfevents.*"))


class Remembering(Finetune):
    """Fine-tuning that records the gradients of every optimiser step."""

    def __init__(self):
        self.seen = []

    def watch(self, trainer_class, monkeypatch):
        clip = trainer_class._clip_grad_norm

        def remember(trainer, model):
            self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return clip(trainer, model)

        monkeypatch.setattr(trainer_class, "_clip_grad_norm", remember)


def first_gradients(tmp_path, monkeypatch, batch, accumulation):
    phase = Remembering()
    phase.watch(PhaseTrainer, monkeypatch)
    converted = start()
    data = EncodedExamples(
        examples(lengths=(5, 5)).rows[:8],
        converted.tokenizer,
        encoder_decoder=True,
        max_input_tokens=9,
        max_target_tokens=9,
    )
    values = settings(max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    collate = PadBatch(padding_id(converted.tokenizer))
    train_phase(converted.model, phase, PhaseData(data, collate), tmp_path / f"{batch}", values, seed=3)
    monkeypatch.undo()
    return phase.seen[0]


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path, monkeypatch):
    large = first_gradients(tmp_path, monkeypatch, batch=8, accumulation=1)
    small = first_gradients(tmp_path, monkeypatch, batch=2, accumulation=4)
    assert large.keys() == small.keys()
    assert max(gradient.abs().max() for gradient in large.values()) > 1e-2
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-4, atol=1e-6)


def train(monkeypatch, folder, converted, values, **options):
    monkeypatch.setattr(loading, "load_tasks", lambda *args, **kwargs: [(WORDS, examples())])
    return pipeline.train(converted, values, run=folder, **options)


def test_a_finished_training_is_not_repeated_and_its_weights_are_used(monkeypatch, tmp_path, caplog):
    expected = train(monkeypatch, tmp_path, start(), settings())
    written = (tmp_path / "model" / "model.safetensors").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(PhaseTrainer, "training_step", never)
    again = train(monkeypatch, tmp_path, start(), settings())
    assert "finished" in caplog.text
    assert_equal_weights(again.converted.model, expected.converted.model)
    assert not again.converted.model.training
    assert again.phases == expected.phases
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == written
    assert_equal_weights(load(tmp_path, strict=True).model, expected.converted.model)


@pytest.mark.parametrize("change", ["settings", "method", "seed"])
def test_different_settings_in_the_same_folder_need_overwrite(monkeypatch, tmp_path, change):
    train(monkeypatch, tmp_path, start(), settings(max_steps=2))
    values = settings(max_steps=2, learning_rate=1e-3) if change == "settings" else settings(max_steps=2)
    method = TopK(feed_forward_k=2) if change == "method" else None
    options = {"seed": 9} if change == "seed" else {}
    words = {"settings": "learning_rate was 0.01, is 0.001", "method": "methods", "seed": "seed"}[change]
    with pytest.raises(ConfigError, match=words):
        train(monkeypatch, tmp_path, start(method=method), values, **options)
    trained = train(monkeypatch, tmp_path, start(method=method), values, overwrite=True, **options)
    assert trained.phases["finetune"]["train_loss"] > 0


def test_lora_training_saves_an_ordinary_checkpoint(monkeypatch, tmp_path):
    lora = {"r": 2, "target_modules": ["q", "wi", "wo"]}
    converted = start()
    before = {name: value.clone() for name, value in converted.model.state_dict().items()}
    trained = train(monkeypatch, tmp_path, converted, settings(lora=lora, max_steps=3)).converted
    assert_still_topk(trained.model)
    state = trained.model.state_dict()
    assert state.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], state[name])}
    assert changed
    assert all(name.split(".")[-2] in lora["target_modules"] for name in changed)
    plain, _ = load_model(str(tmp_path / "model"))
    assert_equal_weights(plain, trained.model)
    assert_equal_weights(load(tmp_path, strict=True).model, trained.model)


def test_an_unconverted_model_can_be_trained(monkeypatch, tmp_path):
    model = tiny_model("t5", dtype=torch.float32)
    before = model.shared.weight.clone()
    train(monkeypatch, tmp_path, Converted(model, tokenizer=word_tokenizer()), settings(max_steps=1))
    assert not torch.equal(model.shared.weight, before)
    assert load(tmp_path).methods == ()


class NormOnly(Phase):
    """Phase with a single trained parameter and a step counter."""

    name = "norm"

    def parameters(self, model):
        return (ParameterGroup([model.decoder.final_layer_norm.weight], {"lr": 0.5}),)

    def step(self, model, batch):
        return {"loss": model(**batch).loss}

    def finish(self, model, folder):
        (folder / "collected").write_text("done")


def test_a_phase_chooses_its_parameters_and_finishes(tmp_path):
    model = tiny_model("t5", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = EncodedExamples(
        examples().rows, word_tokenizer(), encoder_decoder=True, max_input_tokens=9, max_target_tokens=9
    )
    numbers = train_phase(model, NormOnly(), PhaseData(data, PadBatch(0)), tmp_path, settings(max_steps=1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder.final_layer_norm.weight"}
    assert (tmp_path / "collected").read_text() == "done"
    assert numbers["train_loss"] > 0


def test_a_phase_without_held_out_data_ignores_validation_and_early_stopping(tmp_path):
    data = EncodedExamples(
        examples().rows, word_tokenizer(), encoder_decoder=True, max_input_tokens=9, max_target_tokens=9
    )
    values = settings(max_steps=2, save_steps=1, validation="dev", early_stopping=1, load_best_model_at_end=True)
    final = train_phase(tiny_model("t5"), NormOnly(), PhaseData(data, PadBatch(0)), tmp_path, values)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in logged) == 2
    assert not [name for line in logged for name in line if name.startswith("eval_")]
    assert "best_step" not in final


def test_length_groups_depend_only_on_seed_and_epoch():
    rows = [{"input_ids": [0] * length} for length in range(1, 41)]
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = LengthGroups(rows, 4, seed)
            torch.manual_seed(7 * epoch)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            torch.manual_seed(99)
            assert list(sampler) == orders[seed, epoch]
            assert sorted(orders[seed, epoch]) == list(range(40))
    assert len({tuple(order) for order in orders.values()}) == 4


def test_a_decoder_learns_the_target_only_and_ends_with_end_of_sequence():
    data = EncodedExamples(
        [Example("0", "w5 w6", "w7")], word_tokenizer(), encoder_decoder=False, max_input_tokens=9, max_target_tokens=9
    )
    assert data[0] == {"input_ids": [2, 5, 6, 7, 1], "labels": [IGNORED_LABEL] * 3 + [7, 1]}


def test_a_truncated_target_keeps_the_end_of_sequence_token():
    data = EncodedExamples(
        [Example("0", "w5 w6 w7", "w7 w8 w9")],
        word_tokenizer(),
        encoder_decoder=True,
        max_input_tokens=2,
        max_target_tokens=3,
    )
    assert data[0] == {"input_ids": [5, 6], "labels": [7, 8, 1]}


def test_batches_are_padded_and_masked():
    rows = [{"input_ids": [5, 6, 7], "labels": [8]}, {"input_ids": [9], "labels": [4, 3]}]
    right, left = PadBatch(0)(rows), PadBatch(0, side="left")(rows)
    assert right["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[8, IGNORED_LABEL], [4, 3]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 9]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_unknown_training_argument_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'adam_beta1'"):
        training_arguments(settings(arguments={"adam_beta_1": 0.9}), tmp_path, 0)


def test_a_model_without_a_tokenizer_cannot_be_trained(tmp_path):
    with pytest.raises(ConfigError, match="without a tokenizer"):
        run(Converted(tiny_model("t5")), tmp_path, settings())
