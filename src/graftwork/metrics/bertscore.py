"""BERTScore of generated texts, by the package bert-score with a model in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.core.readers import read_json_mapping
from graftwork.errors import ConfigError, MissingExtraError


def bert_score(texts: Sequence[str], references: Sequence[Sequence[str]], model: str, *, device: str) -> float:
    """Mean BERTScore F1, the best over the references of each text, in percent; not rescaled by a baseline.

    Source: Zhang et al. 2020, "BERTScore"; the package `bert-score`, with embeddings of the last layer.

    Args:
        texts: Generated texts.
        references: References of each text, at least one.
        model: Folder of an encoder with its tokenizer; nothing is downloaded.
        device: Device of the encoder.

    Raises:
        ConfigError: If the folder contains no encoder.
        MissingExtraError: If the package is not installed.
    """
    layers = _layers(model)
    try:
        import bert_score as package  # pyright: ignore
    except ImportError:
        raise MissingExtraError("bert-score", "bertscore") from None
    library: Any = package
    found: Any = library.score(
        list(texts), [list(own) for own in references], model_type=model, num_layers=layers, device=device
    )
    return 100 * float(found[2].mean())


def _layers(model: str) -> int:
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"bertscore is {model}, which is no folder of a model. Expected one with config.json, weights and "
            "tokenizer; download an encoder such as roberta-large, and give its folder."
        )
    layers = read_json_mapping(path).get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"{path}: found no num_hidden_layers; expected the folder of an encoder. Give another one.")
    return layers
