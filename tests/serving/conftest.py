"""Two models to put behind a server: the toy that has learned to recall, and a decoder whose answers are long."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install 'graftwork[serve]'")

from graftwork.grafting.converted import Converted
from graftwork.methods.regrad.encoding.encoder import PassageEncoder
from regrad_engine import adapted_decoder, encoder_of, passages
from regrad_toy import learn, toy_tokenizer
from serving.servers import TOLD, Place, fill, told

STEPS = 80
"""Updates after which the toy recalls well; case L1 itself is tested beside the method."""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The toy after meta-training, and where forty entities live."""
    folder = tmp_path_factory.mktemp("toy")
    model, method = learn(folder / "learning", steps=STEPS)
    Converted(model, (method,), (), toy_tokenizer()).save(folder / "run")
    place = Place(folder / "run", folder / "bank", folder / "index")
    fill(place, PassageEncoder(model, toy_tokenizer(), method.config), [told(entity) for entity in TOLD])
    return place


@pytest.fixture(scope="session")
def decoder() -> Converted:
    """Steps so large that every passage changes the answer."""
    return adapted_decoder(initial_step_size=30.0)


@pytest.fixture(scope="session")
def decoder_place(decoder: Converted, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("decoder")
    place = Place(folder, folder / "bank", folder / "index")
    fill(place, encoder_of(decoder), passages(decoder, 24))
    return place
