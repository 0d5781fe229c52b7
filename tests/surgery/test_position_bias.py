"""T5 position biases reach every layer with their gradients, however the layers are run and whichever are converted."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import graftwork as gw
from graftwork.surgery.sites import attention_sites
from tiny_models import assert_same, loss_and_gradients, padded_batch, tiny_model

SELECTIONS = {
    "all": {},
    "one layer": {"layers": "1"},
    "first layer": {"layers": "0"},
    "encoder": {"stacks": ("encoder",)},
    "self": {"attention_kinds": ("self",)},
    "cross": {"attention_kinds": ("cross",)},
}
METHODS = {
    "topk": lambda **settings: gw.TopK(attention_k=64, **settings),
    "sparsefinder": lambda **settings: gw.Sparsefinder(alpha=1.0, **settings),
}


def bias_shapes(model, batch):
    shapes = {}
    for site in attention_sites(model):
        site.module.register_forward_hook(
            lambda module, inputs, output, path=site.path: shapes.update({path: tuple(output[1].shape)})
        )
    model(**batch)
    return shapes


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_of_the_dense_model(method, selection, reentrant):
    model, batch = tiny_model("t5", dropout_rate=0.0).train(), padded_batch("t5")
    _, expected = loss_and_gradients(model, batch)
    gw.convert(model, METHODS[method](**SELECTIONS[selection]))
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    _, found = loss_and_gradients(model, batch)
    assert_same(found, expected, tolerance=1e-9)


def test_the_bias_of_a_converted_stack_has_one_number_per_head_and_distance():
    batch = padded_batch("t5")
    model = tiny_model("t5")
    gw.convert(model, gw.TopK(attention_k=3))
    shapes = bias_shapes(model, batch)
    queries = batch["labels"].shape[1]
    assert {shape for path, shape in shapes.items() if "encoder" in path} == {(1, 2, 1, 21)}
    assert {shape for path, shape in shapes.items() if "EncDecAttention" in path} == {(1, 1, 1, 1)}
    assert shapes["decoder.block.0.layer.0.SelfAttention"] == (1, 2, 1, 2 * queries - 1)


def test_the_bias_of_a_partly_converted_stack_is_that_of_transformers():
    batch = padded_batch("t5")
    model = tiny_model("t5")
    gw.convert(model, gw.TopK(attention_k=3, layers="1"))
    assert {shape for path, shape in bias_shapes(model, batch).items() if "encoder" in path} == {(1, 2, 11, 11)}


@pytest.mark.parametrize("name", ["UMT5", "SwitchTransformers", "LongT5"])
def test_relatives_of_t5_have_the_same_rules(name):
    """The rules are asked of the modules: umt5 has a bias in every layer, the others in the first."""
    from graftwork.surgery.modules import add_module
    from graftwork.surgery.position_bias import BiasByDistance, share_position_bias
    from graftwork.surgery.sites import AttentionSite

    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_decoder_layers=2
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    modules = [module for module in model.decoder.modules() if hasattr(module, "compute_bias")]
    sites = [
        AttentionSite(str(number), module, "decoder", number // 2, "cross" if number % 2 else "self")
        for number, module in enumerate(modules)
    ]
    assert len(sites) == 4
    assert add_module
    share_position_bias(model, "test", sites, [sites[2]])
    lazy = [isinstance(module.__dict__.get("compute_bias"), BiasByDistance) for module in modules]
    assert lazy == [False, False, name == "UMT5", False]
    share_position_bias(model, "test", sites, [sites[0], sites[2]])
    lazy = [isinstance(module.__dict__.get("compute_bias"), BiasByDistance) for module in modules]
    assert lazy == [True, False, True, False]


class Moved(AlignDevicesHook):
    """Moves arguments as between two devices: every tensor that a device move would find becomes a new tensor."""

    def pre_forward(self, module, *args, **kwargs):
        def move(value):
            return value * 1 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_moving_the_arguments_of_every_layer_changes_nothing(method, selection):
    model, batch = tiny_model("t5", dropout_rate=0.0).train(), padded_batch("t5")
    _, expected = loss_and_gradients(model, batch)
    gw.convert(model, METHODS[method](**SELECTIONS[selection]))
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            add_hook_to_module(block, Moved())
    _, found = loss_and_gradients(model, batch)
    assert_same(found, expected, tolerance=1e-9)


PROCESS = """
import sys, torch, torch.distributed as dist
import graftwork as gw
from tiny_models import padded_batch, tiny_model
settings = eval(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_model("t5", dropout_rate=0.0).train()
gw.convert(model, gw.TopK(attention_k=3, **settings))
wrapped = torch.nn.parallel.DistributedDataParallel(model)
batch = padded_batch("t5", seed=rank)
wrapped(**batch).loss.backward()
if rank == 0:
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for seed in (0, 1):
        (model(**padded_batch("t5", seed=seed)).loss / 2).backward()
    worst = max(float((p.grad - together[name]).abs().max()) for name, p in model.named_parameters())
    print("worst", worst)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.parametrize("selection", ["all", "one layer", "self"])
def test_gradients_of_two_processes_are_those_of_one(selection, tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path]), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launch, repr(SELECTIONS[selection])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split("worst")[1]) < 1e-12
