"""Projected keys in the cache: a step projects its new tokens only, and a changed cache is projected again."""

import pytest
import torch

from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.modules import Projection, sparsefinder_modules
from tiny_models import VOCABULARY, tiny_model


def converted(name):
    model = convert(tiny_model(name), Sparsefinder(grouping="distance", threshold=3.0, window_size=2)).model
    for graft in sparsefinder_modules(model).values():
        graft.active.fill_(True)
    return model


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_decoding_step_projects_one_token(name, monkeypatch):
    model = convert(
        tiny_model(name),
        Sparsefinder(grouping="distance", threshold=3.0, stacks=("decoder",), attention_kinds=("self",)),
    ).model
    for graft in sparsefinder_modules(model).values():
        graft.active.fill_(True)
    lengths = []
    forward = Projection.forward

    def counted(self, tokens):
        lengths.append(tokens.shape[2])
        return forward(self, tokens)

    monkeypatch.setattr(Projection, "forward", counted)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
    model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    first = 1 if name == "bart" else 6
    grafts = len(sparsefinder_modules(model))
    # queries and keys of every layer, at the prompt and at seven steps; the cache of the first call is empty
    assert lengths[: 2 * grafts] == [first] * 2 * grafts
    assert len(lengths) == 2 * grafts * 8
    later = lengths[2 * grafts :]
    assert max(later[2 * grafts :]) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beam_search_reorders_the_cache_and_gives_the_uncached_answer(name):
    model = converted(name)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_cropped_cache_is_projected_again():
    model = converted("llama")
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(1))
    other = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(other[:, :1], past_key_values=cache)
        cache.crop(-5)
        found = model(other, past_key_values=cache).logits
        expected = model(torch.cat([ids[:, :5], other], 1)).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
