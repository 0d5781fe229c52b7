"""Stepwise replacement of layers during training."""

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald
from graftwork.methods.cald.phases import Distill
from graftwork.surgery.attention import seam_modules
from methods.cald.runs import KilledError, assert_close, during_batch, kill, model, start, train, values
from methods.cald.test_decoders import decoder

SETTINGS = {"guide": "trajectory", "replacement_steps": 10}


def flags(found):
    return [graft.replaced for graft in seam_modules(found).values()]


def test_layers_are_replaced_in_turn_and_a_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    seen, original = [], Distill.step

    def step(self, found, batch):
        seen.append(flags(found))
        return original(self, found, batch)

    monkeypatch.setattr(Distill, "step", step)
    expected = train(start(**SETTINGS), tmp_path / "whole", values())
    # two layers in ten updates: the second one after five
    assert seen == [[True, False]] * 5 + [[True, True]] * 5
    assert flags(expected) == [True, True]
    with during_batch(6, kill), pytest.raises(KilledError):
        train(start(**SETTINGS), tmp_path / "cut", values())
    seen.clear()
    resumed = train(start(**SETTINGS), tmp_path / "cut", values())
    # from the checkpoint after update 4
    assert seen == [[True, False]] + [[True, True]] * 5
    assert_close(resumed, expected, 0)
    with pytest.raises(ConfigError, match="replacement_steps is 11, and the training has 10 updates"):
        train(start(guide="unguided", replacement_steps=11), tmp_path / "long", values())


@pytest.mark.parametrize("kind", ["linformer", "feature_map", "linear"])
@torch.no_grad()
def test_a_layer_before_its_turn_is_dense(kind):
    build, mixer = (decoder, {"window": 3}) if kind == "linear" else (model, {"rank": 4} if kind == "linformer" else {})
    ids = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    both = convert(build(), Cald(mixer=kind, **mixer)).model
    first = convert(build(), Cald(mixer=kind, layers="0", **mixer)).model
    whole = both(input_ids=ids, attention_mask=mask).logits
    list(seam_modules(both).values())[1].replaced = False
    real = mask.bool() if kind == "linear" else slice(None)
    found = both(input_ids=ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(found, first(input_ids=ids, attention_mask=mask).logits[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[real], found, atol=1e-4)
