"""Converted decoders: families, padding, packing, generation with a recurrent state, and attention transfer."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from graftwork.core.example import Example, Examples
from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import save
from graftwork.methods.cald import Cald
from graftwork.methods.cald.phases import AttentionTransfer
from graftwork.methods.cald.recurrence import RecurrentLayer, transferring
from graftwork.pipeline.loading import load
from graftwork.pipeline.training import train_phases
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.attention import seam_modules
from graftwork.surgery.modules import GRAFT
from tiny_models import BOS, EOS, PAD, word_tokenizer

GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": None},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "GPTNeoX": {},
}
KINDS = ("elu", "softmax", "gated")


def decoder(family="Llama", dtype=torch.float64, **changes):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **{**FAMILIES[family], **changes},
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()


def latent_decoder():
    """DeepSeek-V3 with keys of width 12 and values of width 6, without experts."""
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=24,
        first_k_dense_replace=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).to(torch.float64).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_be_narrower_than_keys(kind):
    batch = left_padded()
    real = batch["attention_mask"].bool()
    dense = logits(latent_decoder(), **batch)
    whole = linear(latent_decoder(), window=20, feature_map=kind)
    torch.testing.assert_close(logits(whole, **batch)[real], dense[real], rtol=0, atol=1e-6)
    short, cache, steps = linear(latent_decoder(), feature_map=kind), DynamicCache(), []
    ids = batch["input_ids"][:1]
    for number in range(ids.shape[1]):
        steps.append(logits(short, input_ids=ids[:, number : number + 1], past_key_values=cache))
    torch.testing.assert_close(torch.cat(steps, 1), logits(short, input_ids=ids), rtol=0, atol=1e-8)


def linear(model, **settings):
    return convert(model, Cald(**{"mixer": "linear", "window": 3, **settings})).model


def left_padded():
    ids = torch.randint(3, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :9] = 0
    # as `generate` numbers them; feature maps of rotated queries and keys depend on the position itself
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pad_pack_and_generate_as_they_compute_in_one_pass(family):
    model, batch = decoder(family), left_padded()
    real = batch["attention_mask"].bool()
    dense = logits(model, **batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # a window over the whole text is softmax attention
    torch.testing.assert_close(logits(linear(model, window=20), **batch)[real], dense[real], rtol=0, atol=1e-6)
    for kind in KINDS:
        student = linear(model, feature_map=kind)
        found = logits(student, **batch)
        assert (found - dense)[real].abs().max() > 1e-2
        alone = logits(student, input_ids=batch["input_ids"][2:, 9:])
        torch.testing.assert_close(found[2:, 9:], alone, rtol=0, atol=1e-6)
        positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
        packed = logits(student, input_ids=batch["input_ids"][:1], position_ids=positions, use_cache=False)
        parts = [logits(student, input_ids=batch["input_ids"][:1, part]) for part in (slice(0, 8), slice(8, 20))]
        torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=0, atol=1e-6)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
        cached = student.generate(**inputs, **options, do_sample=False)
        whole = student.generate(**inputs, **options, do_sample=False, use_cache=False)
        assert torch.equal(cached.sequences, whole.sequences)
        for mine, theirs in zip(cached.logits, whole.logits, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        assert all(isinstance(layer, RecurrentLayer) for layer in cached.past_key_values.layers)
        static = student.generate(**inputs, max_new_tokens=9, min_new_tokens=9, cache_implementation="static")
        assert torch.equal(static, whole.sequences)
    restore(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(model, **batch), dense, rtol=0, atol=0)


def test_beam_search_reorders_the_states_and_some_layers_may_stay_dense():
    inputs = {name: left_padded()[name] for name in ("input_ids", "attention_mask")}
    student = linear(decoder(), layers="1")
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cached = student.generate(**inputs, **options)
    assert torch.equal(cached, student.generate(**inputs, **options, use_cache=False))
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(**inputs, past_key_values=cache)
    assert [isinstance(layer, RecurrentLayer) for layer in cache.layers] == [False, True]


def test_the_state_does_not_grow_and_a_prompt_may_come_in_pieces():
    student, ids = linear(decoder()), left_padded()["input_ids"]
    cache, sizes, parts = DynamicCache(config=student.config), set(), []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        parts.append(logits(student, input_ids=ids[:, start:stop], past_key_values=cache))
        sizes.add(tuple(layer.state_bytes() for layer in cache.layers))
        assert cache.get_seq_length() == stop
    torch.testing.assert_close(torch.cat(parts, 1), logits(student, input_ids=ids), rtol=0, atol=1e-5)
    assert len(sizes) == 1


def test_what_a_state_cannot_do_is_refused():
    model, ids = decoder(), left_padded()["input_ids"]
    filled = DynamicCache(config=model.config)
    logits(model, input_ids=ids, past_key_values=filled)
    student = linear(model)
    with pytest.raises(UnsupportedModelError, match="keys of dense attention"):
        student(input_ids=ids, past_key_values=filled)
    cache = DynamicCache(config=student.config)
    logits(student, input_ids=ids, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="cannot forget single tokens"):
        cache.layers[0].crop(-1)
    window = torch.ones(20, 20, dtype=torch.bool).tril().triu(-3)[None, None]
    with pytest.raises(UnsupportedModelError, match="neither causal nor"):
        student(input_ids=ids[:1], attention_mask=window, use_cache=False)
    with pytest.raises(UnsupportedModelError, match="sliding window, and a recurrent state"):
        linear(decoder("Mistral", sliding_window=4))
    bert = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    with pytest.raises(UnsupportedModelError, match="mixer linformer for an encoder"):
        linear(transformers.BertForMaskedLM(bert))


def test_a_student_is_copied_and_saved_with_its_mixer(tmp_path):
    converted = convert(decoder(), Cald(mixer="linear", window=3), tokenizer=word_tokenizer())
    ids = left_padded()["input_ids"]
    with torch.no_grad():
        for graft in seam_modules(converted.model).values():
            graft.query_map.mul_(1.5)
    expected = logits(converted.model, input_ids=ids)
    torch.testing.assert_close(logits(copy.deepcopy(converted.model), input_ids=ids), expected, rtol=0, atol=0)
    save(converted, tmp_path / "run")
    assert torch.equal(logits(load(tmp_path / "run", strict=True).model, input_ids=ids), expected)


def texts(rows=40):
    made = [" ".join(f"w{4 + (3 * row + step * (1 + row % 5)) % 60}" for step in range(23)) for row in range(rows)]
    examples = tuple(Example(str(number), text, "") for number, text in enumerate(made))
    return Examples("text", "train", examples, rows, 0, "here", running_text=True)


def train(model, folder, *, lora=None, **settings):
    converted = convert(model, Cald(mixer="linear", window=3, **settings), tokenizer=word_tokenizer())
    torch.manual_seed(0)  # of a new adapter
    training = TrainingSettings(
        tasks=("text",),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        max_input_tokens=24,
        lora=lora,
    )
    trained, _ = train_phases(converted, training, [texts()], RunFolder(folder), seed=0, overwrite=False)
    return trained.model


def restored(model):
    restore(model)
    return model


def losses(folder, phase):
    return [row["loss"] for row in read_lines(Path(folder) / "train" / phase / "log.jsonl") if "loss" in row]


def test_attention_transfer_compares_with_the_dense_layers_and_trains_the_mixers_only(tmp_path):
    dense = decoder(dtype=torch.float32)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    ids = left_padded()["input_ids"]
    recorded = {}

    def record(name):
        return lambda module, args, output: recorded.__setitem__(name, args[0])

    hooks = [layer.self_attn.o_proj.register_forward_hook(record(i)) for i, layer in enumerate(dense.model.layers)]
    expected = logits(dense, input_ids=ids)
    targets = [recorded[0], recorded[1]]
    student = linear(dense)
    with transferring(student) as errors:
        # the dense outputs are passed on
        torch.testing.assert_close(logits(student, input_ids=ids), expected, rtol=0, atol=1e-5)
        outputs = [recorded[0], recorded[1]]
    for mine, theirs in zip(outputs, targets, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    # layer 0 has the same input with and without transfer
    logits(student, input_ids=ids)
    error = (recorded[0] - targets[0]).square().sum() / targets[0].square().sum()
    torch.testing.assert_close(errors[0].detach(), error, rtol=1e-4, atol=0)
    for hook in hooks:
        hook.remove()
    restore(student)
    trained = train(dense, tmp_path, transfer_steps=30, transfer_learning_rate=0.05, trained="mixer")
    for name, value in trained.state_dict().items():
        if GRAFT not in name:
            assert torch.equal(value, before[name]), name
    assert len(losses(tmp_path, "transfer")) == 30
    rows = word_tokenizer()([row.input for row in texts().rows[:20]], return_tensors="pt")["input_ids"]
    means = []
    for student in (linear(restored(copy.deepcopy(trained))), trained):
        with transferring(student) as errors:
            logits(student, input_ids=rows)
        means.append(float(torch.stack(errors).mean()))
    assert means[1] < 0.95 * means[0], means
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.long
def test_a_teacher_guides_an_adapter_whose_transfer_survives_a_stop(tmp_path):
    pytest.importorskip("peft")
    dense = decoder(dtype=torch.float32)
    dense.save_pretrained(tmp_path / "teacher")
    settings = {"transfer_steps": 4, "guide": "target", "teacher": str(tmp_path / "teacher")}
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    whole = train(copy.deepcopy(dense), tmp_path / "whole", lora=lora, **settings)
    row = next(read_lines(tmp_path / "whole" / "train" / "distill" / "log.jsonl"))
    assert row["output"] > 0
    begin = AttentionTransfer.finish

    def stop(*args):
        begin(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionTransfer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            train(copy.deepcopy(dense), tmp_path / "stopped", lora=lora, **settings)
    resumed = train(copy.deepcopy(dense), tmp_path / "stopped", lora=lora, **settings)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=1e-6)


def test_settings_without_effect_are_refused():
    for settings, message in (
        ({"mixer": "linear", "rank": 8}, "rank is 8 and mixer is 'linear'"),
        ({"mixer": "feature_map", "freeze_steps": 2}, "freeze_steps is 2 and mixer is 'feature_map'"),
        ({"mixer": "feature_map", "share": "kv"}, "share is 'kv'"),
        ({"window": 8}, "window is 8 and mixer is 'linformer'"),
        ({"mixer": "linear", "feature_map": "elu", "window": None, "transfer_steps": 5}, "nothing to train"),
        ({"mixer": "linear", "transfer_learning_rate": 1e-3}, "no attention transfer"),
        ({"mixer": "linear", "trained": "mixer", "freeze_steps": 2}, "never trains anything else"),
        ({"mixer": "feature_map", "trained": "mixer"}, "has no parameters"),
        ({"mixer": "linear", "window": 0}, "window is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Cald(**settings)
