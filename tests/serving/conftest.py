"""Two models to serve: the meta-trained toy with one-word answers, and a decoder with long answers."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install 'graftwork[serve]'")

from graftwork.grafting.converted import Converted
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from regrad_engine import adapted_decoder, encoder_of, passages
from regrad_toy import learn, toy_tokenizer
from serving.servers import ENTITIES, Place, fill, home_of

STEPS = 80
"""Updates after which the toy answers well; case L1 itself is tested with the method."""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Run folder of the meta-trained toy, with a bank and an index of forty passages."""
    folder = tmp_path_factory.mktemp("toy")
    model, method = learn(folder / "learning", steps=STEPS)
    Converted(model, (method,), (), toy_tokenizer()).save(folder / "run")
    place = Place(folder / "run", folder / "bank", folder / "index")
    fill(place, PassageEncoder(model, toy_tokenizer(), method.config), [home_of(entity) for entity in ENTITIES])
    return place


@pytest.fixture(scope="session")
def decoder() -> Converted:
    """Decoder with step sizes so large that every passage changes the answer."""
    return adapted_decoder(initial_step_size=30.0)


@pytest.fixture(scope="session")
def decoder_place(decoder: Converted, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("decoder")
    place = Place(folder, folder / "bank", folder / "index")
    fill(place, encoder_of(decoder), passages(decoder, 24))
    return place
