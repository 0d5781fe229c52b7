"""Conversion of encoders: parameters, sharing, padding, saving, and errors."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from graftwork.cli.app import run as command
from graftwork.errors import CheckpointMismatchError, ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.cald import Cald
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.methods.cald.weights import load_reference
from graftwork.pipeline.loading import load
from graftwork.surgery.modules import GRAFT
from tiny_models import forget_digests, word_tokenizer

LAYERS, HEADS, POSITIONS = 3, 4, 66
SHARES = ["none", "kv", "layer", "head"]


def tiny(seed=0, **changes):
    """Classifier of the size "Tiny" of the specification."""
    values = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(*lengths, to=None, side="right", seed=1):
    generator = torch.Generator().manual_seed(seed)
    longest = to or max(lengths)
    rows, masks = [], []
    for length in lengths:
        row = torch.randint(3, 100, (length,), generator=generator)
        pads, ones = torch.ones(longest - length, dtype=torch.long), torch.ones(length, dtype=torch.long)
        pair = [(row, pads), (ones, 0 * pads)]
        rows.append(torch.cat(pair[0] if side == "right" else pair[0][::-1]))
        masks.append(torch.cat(pair[1] if side == "right" else pair[1][::-1]))
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def grafts(model):
    return [module for module in model.modules() if isinstance(module, LinformerAttention)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("form", ["auto", "projected", "compressed"])
def test_identity_initialisation_gives_the_dense_logits_up_to_the_rank(form):
    model = tiny()
    batches = [ids(n) for n in range(1, 13)] + [ids(n, to=n + 4) for n in (1, 5, 8)] + [ids(12, 5, 1)]
    dense = [logits(model, batch) for batch in batches]
    convert(model, Cald(rank=12, initialization="identity", form=form))
    for batch, expected in zip(batches, dense, strict=True):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=2e-6)
    longer = ids(20)
    assert (logits(model, longer) - logits(tiny(), longer)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("share", "extra"),
    [("none", 3_158_016), ("kv", 1_579_008), ("layer", 131_584), ("head", 2 * 12 * 12 * 514 * 256)],
)
def test_roberta_base_gains_the_expected_number_of_parameters(share, extra):
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )
    assert count(model) == 124_647_170
    convert(model, Cald(share=share))
    assert count(model) - 124_647_170 == extra


@pytest.mark.parametrize("share", SHARES)
def test_a_shared_matrix_stays_one_tensor_in_copies_casts_and_files(share, tmp_path):
    converted = convert(tiny(), Cald(rank=8, share=share), tokenizer=word_tokenizer())
    distinct = {"none": 2 * LAYERS, "kv": LAYERS, "layer": 1, "head": 2 * LAYERS}[share]
    per = POSITIONS * 8 * (HEADS if share == "head" else 1)
    batch = ids(11, 7)
    expected = logits(converted.model, batch)
    save(converted, tmp_path / "run")
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")
    learned = {name: tensor for name, tensor in stored.items() if GRAFT in name}
    assert sum(tensor.numel() for tensor in learned.values()) == distinct * per
    again = load(tmp_path / "run", strict=True).model
    assert torch.equal(logits(again, batch), expected)
    for model in (converted.model, copy.deepcopy(converted.model), again, copy.deepcopy(again).to(torch.float64)):
        matrices = {id(matrix) for graft in grafts(model) for matrix in graft.matrices()}
        assert len(matrices) == distinct
        names = [name for name, parameter in model.named_parameters() if id(parameter) in matrices]
        assert len(names) == distinct
        assert [name for name in model.state_dict() if GRAFT in name] == names


def test_trained_matrices_are_restored_and_modified_ones_detected(tmp_path):
    converted = convert(tiny(), Cald(rank=8, share="layer"), tokenizer=word_tokenizer())
    with torch.no_grad():
        grafts(converted.model)[0].projection.mul_(-0.5)
    save(converted, tmp_path / "run")
    again = load(tmp_path / "run").model
    assert torch.equal(grafts(again)[2].matrices()[1], grafts(converted.model)[0].projection)
    file = tmp_path / "run" / "model" / "model.safetensors"
    forget_digests(tmp_path / "run")
    tensors = load_file(file)
    name = next(name for name in tensors if GRAFT in name)
    kept = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=f"missing: {name}"):
        load(tmp_path / "run")
    save_file({**tensors, name: kept + 1}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match="answers a fixed input differently"):
        load(tmp_path / "run")


@pytest.mark.parametrize("share", SHARES)
def test_transformers_opens_a_student_with_its_matrices(share, tmp_path):
    converted = convert(tiny(), Cald(rank=8, share=share), tokenizer=word_tokenizer())
    with torch.no_grad():
        for parameter in grafts(converted.model)[0].parameters():
            parameter.mul_(-0.5)
    save(converted, tmp_path / "run")
    found = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    expected = {name: value for name, value in converted.model.state_dict().items() if GRAFT in name}
    assert expected
    for name, value in expected.items():
        assert torch.equal(found.state_dict()[name], value), name


def test_two_models_in_one_process_share_no_matrix():
    first = convert(tiny(), Cald(rank=8, share="layer")).model
    second = convert(tiny(), Cald(rank=5, positions=70, share="layer")).model
    assert grafts(second)[0].projection.shape == (70, 5)
    third = convert(tiny(), Cald(rank=8, share="layer")).model
    pointers = [{parameter.data_ptr() for parameter in model.parameters()} for model in (first, second, third)]
    assert not pointers[0] & pointers[1]
    assert not pointers[0] & pointers[2]
    assert torch.equal(grafts(first)[0].projection, grafts(third)[0].projection)


def test_conversion_leaves_dense_weights_unchanged():
    model = tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = ids(9, 4)
    with torch.no_grad():
        embedded = model(**batch, output_hidden_states=True).hidden_states
    convert(model, Cald(rank=8))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], embedded[0])
    assert len(states) == LAYERS + 1
    assert not torch.allclose(states[1], embedded[1])


@pytest.mark.parametrize(
    "settings", [{}, {"initialization": "segment_mean"}, {"share": "head"}, {"form": "compressed"}]
)
def test_amount_and_side_of_padding_do_not_change_the_output(settings):
    model = convert(tiny(), Cald(rank=8, **settings)).model
    both = ids(10, 6)
    alone = {name: value[1:, :6] for name, value in both.items()}
    short = logits(model, alone)
    torch.testing.assert_close(logits(model, both)[1:], short, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, ids(10, 6, to=15)), logits(model, both), rtol=0, atol=1e-6)
    left = ids(10, 6, side="left")
    with torch.no_grad():
        states = [model.roberta(**batch)[0][batch["attention_mask"].bool()] for batch in (left, both)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)
    both["attention_mask"][1] = 0
    assert logits(model, both).isfinite().all()


@pytest.mark.parametrize("form", ["projected", "compressed"])
def test_equivalent_forms_of_a_mask_give_the_same_output(form):
    model = convert(tiny(), Cald(rank=4, form=form)).model
    batch = ids(10, 6)
    keep = batch["attention_mask"].bool()
    n = keep.shape[1]
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    forms = {
        "integers": keep.long(),
        "booleans": keep,
        "additive row": additive[:, None, None],
        "additive square": additive[:, None, None].expand(-1, 1, n, n),
        "boolean square": keep[:, None, None].expand(-1, 1, n, n),
    }
    expected = logits(model, batch)
    for name, mask in forms.items():
        found = logits(model, {"input_ids": batch["input_ids"], "attention_mask": mask})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    whole = {"input_ids": batch["input_ids"][:1]}
    torch.testing.assert_close(logits(model, whole), expected[:1], rtol=0, atol=1e-6)
    causal = torch.ones(n, n).tril().bool().expand(2, 1, n, n)
    with pytest.raises(UnsupportedModelError, match="queries attend to different keys"):
        logits(model, {"input_ids": batch["input_ids"], "attention_mask": causal})


def test_a_student_saved_by_the_authors_code_loads(tmp_path):
    for share in ("none", "kv", "layer"):
        source = convert(tiny(3), Cald(rank=8, share=share)).model
        with torch.no_grad():
            for matrix in {id(m): m for graft in grafts(source) for m in graft.matrices()}.values():
                matrix.normal_()
        state = {name: value for name, value in source.state_dict().items() if GRAFT not in name}
        for number, graft in enumerate(grafts(source)):
            for word, matrix in zip(("proj_k", "proj_v"), graft.matrices(), strict=True):
                state[f"roberta.encoder.layer.{number}.attention.self.{word}"] = matrix.detach().clone()
        torch.save(state, tmp_path / "pytorch_model.bin")
        model = convert(tiny(), Cald(rank=8, share=share)).model
        load_reference(model, tmp_path)
        assert torch.equal(logits(model, ids(9, 5)), logits(source, ids(9, 5)))
    other = convert(tiny(), Cald(rank=4, share="layer")).model
    with pytest.raises(CheckpointMismatchError, match=r"proj_k \[66, 8\] instead of \[66, 4\]"):
        load_reference(other, tmp_path)
    state["roberta.encoder.layer.1.attention.self.proj_v"] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatchError, match="are one matrix in this model"):
        load_reference(convert(tiny(), Cald(rank=8, share="layer")).model, tmp_path)


def test_layers_may_have_different_ranks_or_stay_dense():
    model = convert(tiny(), Cald(rank=(4, 6), layers="0,2")).model
    assert [graft.rank for graft in grafts(model)] == [4, 6]
    with pytest.raises(ConfigError, match="2 numbers for 3 layers"):
        convert(tiny(), Cald(rank=(4, 6)))


REFUSED = {
    "is 'foo'. Expected Share: input should be 'none', 'kv'": {"share": "foo"},
    "expected whole numbers from 1": {"rank": 0},
    "all layers share one matrix": {"share": "layer", "rank": (4, 8, 4)},
    "compressed once per head": {"share": "head", "form": "compressed"},
    "assigns no positions to slots": {"length_rule": "slot_mean", "initialization": "gaussian"},
    "which has no teacher, and layer_weight": {"guide": "unguided", "layer_weight": 1.0},
    "teacher is null": {"guide": "target"},
    "snapshots is null": {"guide": "waypoint"},
    "distill_steps is null": {"guide": "hybrid", "teacher": "somewhere"},
    "teacher_update_cycle is 0": {"guide": "trajectory", "teacher_update_cycle": 0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_incompatible_settings_are_refused_in_one_line(words):
    with pytest.raises(ConfigError) as refused:
        Cald(**REFUSED[words])
    assert words.lower() in str(refused.value).lower()
    assert "\n" not in str(refused.value)


def test_aliases_of_share():
    assert Cald(share="key_value").config == Cald(share="kv").config
    assert Cald(share="headwise").config == Cald(share="none").config


def test_a_decoder_is_refused_and_left_unchanged():
    model = tiny(is_decoder=True)
    before = dict(model.named_modules())
    with pytest.raises(UnsupportedModelError, match=r"configured as a decoder.*Nothing was changed"):
        convert(model, Cald(rank=8))
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("kind", ["DebertaV2", "MPNet"])
def test_encoders_that_do_not_call_the_attention_interface_are_refused(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    with pytest.raises(UnsupportedModelError, match="does not call the attention interface"):
        convert(getattr(transformers, f"{kind}Model")(config), Cald(rank=8))


def test_lora_on_keys_and_values_affects_the_compressed_form():
    from peft import LoraConfig, get_peft_model

    outputs = {}
    for form in ("projected", "compressed"):
        model = convert(tiny(), Cald(rank=4, form=form)).model
        adapted = get_peft_model(model, LoraConfig(target_modules=["key", "value"], r=2)).eval()
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        outputs[form] = logits(adapted, ids(9, 5))
    torch.testing.assert_close(outputs["compressed"], outputs["projected"], rtol=1e-4, atol=1e-5)
    assert (outputs["compressed"] - logits(convert(tiny(), Cald(rank=4)).model, ids(9, 5))).abs().max() > 1e-3


def test_the_command_imports_a_student_of_the_authors_into_a_run(tmp_path, capsys):
    source = convert(tiny(3), Cald(rank=8)).model
    state = {name: value for name, value in source.state_dict().items() if GRAFT not in name}
    for number, graft in enumerate(grafts(source)):
        for word, matrix in zip(("proj_k", "proj_v"), graft.matrices(), strict=True):
            state[f"roberta.encoder.layer.{number}.attention.self.{word}"] = matrix.detach().clone()
    torch.save(state, tmp_path / "pytorch_model.bin")
    convert(tiny(), Cald(rank=8), tokenizer=word_tokenizer()).save(tmp_path / "run")
    assert command(["import", "cald", str(tmp_path), str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert torch.equal(logits(load(tmp_path / "run").model, ids(9, 5)), logits(source, ids(9, 5)))
