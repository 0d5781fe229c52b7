"""ReGrad recipes contain the authors' configuration files and their main table."""

from importlib.resources import files

import pytest

from graftwork.methods.regrad.config import ReGradConfig
from graftwork.pipeline.start import build_method
from graftwork.settings.recipe import load_recipe
from graftwork.tasks.multihop import DOMAINS

FOLDER = files("graftwork") / "recipes" / "regrad"
NAMES = sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir())
# rank, layers, widths and size of one gradient, from the authors' peft_config.json: r·(inputs + outputs) per tensor
SIZES = {
    "llama-3.2-1b-instruct": (16, range(8, 16), 2048, 8192, 3_932_160),
    "llama-3.2-3b-instruct": (8, range(14, 28), 3072, 8192, 3_784_704),
    "llama-3.1-8b-instruct": (4, range(16, 32), 4096, 14336, 3_538_944),
}
# sums over the published columns of the supported data sets: blind, with context
SUMS = {
    ("llama-3.2-1b-instruct", "general"): (112.51, 130.15),
    ("llama-3.2-1b-instruct", "law"): (242.6, 247.6),
    ("llama-3.2-3b-instruct", "general"): (122.82, 141.73),
    ("llama-3.2-3b-instruct", "law"): (246.6, 250.7),
    ("llama-3.1-8b-instruct", "general"): (131.15, 147.85),
    ("llama-3.1-8b-instruct", "law"): (251.3, 254.3),
}


def test_every_size_and_domain_has_a_blind_and_a_context_recipe():
    kinds = ("", "_with_context")
    assert sorted(f"{size}_{domain}{kind}" for size in SIZES for domain in DOMAINS for kind in kinds) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_contain_the_authors_configuration(name):
    size, domain, *context = name.split("_")
    recipe = load_recipe(f"regrad/{name}")
    assert recipe.train is not None
    assert recipe.method is not None
    config: ReGradConfig = build_method(recipe.method).config
    rank, layers, hidden, intermediate, numbers = SIZES[size]
    assert recipe.model.lower() == f"meta-llama/{size}"
    assert (config.rank, config.scaling, config.layers) == (rank, 2.0, f"{layers[0]}-{layers[-1]}")
    assert 3 * len(layers) * rank * (hidden + intermediate) == numbers
    assert (config.step_size_mode, config.initial_step_size, config.blind) == ("tie", 0.01, not context)
    assert config.select_every == (100 if domain in ("med", "law") else 1000)
    assert len(config.select) == len(DOMAINS[domain])
    assert (config.passages, config.bank, config.on_missing) == (3, f"banks/{name}", "encode")
    train = recipe.train
    assert train.tasks == tuple(f"multihop/{task}" for task in DOMAINS[domain])
    assert (train.learning_rate, train.num_train_epochs, train.max_grad_norm) == (4e-4, 1.0, 0.5)
    assert (train.weight_decay, train.warmup_ratio, train.sequences_per_step) == (0.01, 0.1, 16)
    found = sum(entry.value for entry in recipe.published)
    expected = SUMS.get((size, domain))
    if expected is not None:
        assert found == pytest.approx(expected[bool(context)])
    # no numbers are published for the sports data sets and IDQUAD
    assert len(recipe.published) == {"general": 3, "law": 3, "med": 1, "sports": 0}[domain]
