"""Every method takes part in the contract tests with all of its families; other families are refused."""

import pytest
import torch
import transformers

from contract_settings import SETTINGS
from graftwork.core.config import build, to_plain
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.pipeline.start import build_method
from graftwork.settings.recipe import RunConfig, load_recipe, write_run
from graftwork.surgery.families import FAMILIES
from tiny_models import TINY, anatomy, family_of


def unsupported(model_type):
    """Model whose attention does not call the attention interface and whose feed-forward layers have no gate."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if model_type == "bloom":
        config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
        return transformers.BloomForCausalLM(config).eval()
    return transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**small, intermediate_size=24)).eval()


def test_every_method_has_contract_settings_and_tiny_models(method_class):
    assert method_class.name in SETTINGS
    assert method_class.families <= FAMILIES.keys()
    assert method_class.families <= {family_of(name) for name in TINY}


@pytest.mark.parametrize("kind", ["identity", "real"])
def test_settings_round_trip_through_a_run_file(method_class, kind, tmp_path):
    config = method_class(**getattr(SETTINGS[method_class.name], kind)(TINY["t5"])).config
    write_run(tmp_path / "run.yaml", RunConfig("model", {"name": method_class.name, **to_plain(config)}))
    again = build_method(load_recipe(tmp_path / "run.yaml").method)
    assert type(again) is method_class
    assert again.config == config
    assert build(method_class.config_class, to_plain(config), where="here") == config


def test_an_unknown_setting_is_refused_with_a_suggestion(method_class):
    known = next(iter(method_class.config_class.__dataclass_fields__))
    with pytest.raises(ConfigError, match=f"Did you mean '{known}'"):
        method_class(**{f"{known}x": 1})


@pytest.mark.parametrize("model_type", ["bloom", "deberta-v2"])
def test_an_unsupported_family_is_refused_without_changes(method_class, model_type):
    if (method_class.name, model_type) == ("wt5", "bloom"):
        pytest.skip("wt5 changes no module of a decoder, so that it accepts all of them")
    model = unsupported(model_type)
    ids = torch.arange(8)[None]
    before, state, logits = anatomy(model), set(model.__dict__), model(ids).logits
    with pytest.raises(UnsupportedModelError, match=r"(?s)(Bloom|Deberta).*Nothing was changed"):
        convert(model, method_class(**SETTINGS[method_class.name].real(TINY["bert"])))
    assert anatomy(model) == before
    assert set(model.__dict__) == state
    assert torch.equal(model(ids).logits, logits)
