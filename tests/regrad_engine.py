"""The shipped decoder with an adapter, random passages, and a program that fills a bank and can be killed.

`python regrad_engine.py BANK PASSAGES WINDOW` encodes that number of passages and commits after every window; with a
fourth argument it trains adapters instead of computing gradients.
"""

from __future__ import annotations

import random
import sys
from typing import Any

from graftwork.demo import shipped_model
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining
from graftwork.methods.regrad.encoding.adapters import AdapterEncoder
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.pipeline.loading import load_model
from graftwork.retrieval.retriever import Passage

SETTINGS: dict[str, Any] = {"rank": 2, "layers": "2-3", "b_std": 0.02, "initial_step_size": 3.0}
"""Settings with a step size large enough to change the answers of an untrained adapter."""


def adapted_decoder(**settings: Any) -> Converted:
    model, tokenizer = load_model(shipped_model("decoder"), dtype="float32")
    return convert(Converted(model, tokenizer=tokenizer), ReGrad(**{**SETTINGS, **settings}))


def encoder_of(converted: Converted, **options: Any) -> PassageEncoder:
    config: Any = converted.methods[-1].config
    return PassageEncoder(converted.model, converted.tokenizer, config, **options)


def trainer_of(converted: Converted, **options: Any) -> AdapterEncoder:
    """Return an encoder that trains adapters on passages only."""
    config: Any = converted.methods[-1].config
    training = AdapterTraining("passage", learning_rate=1e-2)
    return AdapterEncoder(converted.model, converted.tokenizer, config, training=training, **options)


def words(converted: Converted) -> list[str]:
    vocabulary: Any = converted.tokenizer
    known = sorted(token.removeprefix("▁") for token in vocabulary.get_vocab() if token.startswith("▁"))
    return [word for word in known if word.isalpha()]


def passages(converted: Converted, count: int, *, shortest: int = 5, longest: int = 30, seed: int = 0) -> list[Passage]:
    """Return random passages of words that the tokenizer has.

    Args:
        converted: Model with its tokenizer.
        count: Number of passages.
        shortest: Minimum number of words.
        longest: Maximum number of words.
        seed: Seed of the words.
    """
    draw, known = random.Random(seed), words(converted)
    return [
        Passage(f"p{number}", " ".join(draw.choices(known, k=draw.randint(shortest, longest))), f"title {number}")
        for number in range(count)
    ]


def main() -> None:
    folder, count, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    converted = adapted_decoder()
    encoder = (trainer_of if sys.argv[4:] else encoder_of)(converted, batch_size=4)
    bank = encoder.open_bank(folder)
    print("ready", flush=True)
    encode_passages(encoder, bank, passages(converted, count), window=window)
    print("done", flush=True)


if __name__ == "__main__":
    main()
