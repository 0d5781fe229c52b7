"""Text encoders: vectors of passages and questions by a transformer with mean pooling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from graftwork.core.devices import place
from graftwork.core.native import first_line
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LONGEST = 512
"""Maximum number of tokens of a text; longer texts are cut."""
_BATCH = 32


class TextEncoder:
    """Maps texts to unit vectors: the mean of the last hidden states over all tokens, divided by its norm.

    Source: mean pooling of `sentence-transformers`, whose models without further layers give the same vectors.

    Args:
        name: Folder or hub id of an encoder, such as sentence-transformers/all-MiniLM-L6-v2.
        device: Device; None for the accelerator if there is one.

    Raises:
        ConfigError: If there is no such model, or it has a decoder.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        auto_model: Any = AutoModel
        auto_tokenizer: Any = AutoTokenizer
        self.name = name
        self._placement = place(device=device, dtype="float32")
        try:
            self._tokenizer: Any = auto_tokenizer.from_pretrained(name, trust_remote_code=False)
            model = auto_model.from_pretrained(name, trust_remote_code=False, **self._placement.options())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"The encoder {name} cannot be loaded: {first_line(error)}. Name a folder or hub id of a model with "
                "its tokenizer."
            ) from None
        if model.config.is_encoder_decoder:
            raise ConfigError(f"Found the encoder–decoder {name}; expected an encoder, such as all-MiniLM-L6-v2.")
        self._model: Any = model.eval()
        self._longest = min(LONGEST, int(self._tokenizer.model_max_length))

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the unit vector of each text, [texts dimension]."""
        import numpy as np
        import torch

        result = np.zeros((len(texts), self.dimension), np.float32)
        # texts of similar length share a batch
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(self._placement.device)
            with torch.no_grad():
                states = self._model(**batch).last_hidden_state  # [rows tokens dimension]
            mask = batch["attention_mask"][:, :, None].to(states.dtype)  # [rows tokens 1]
            means = (states * mask).sum(1) / mask.sum(1)  # [rows dimension]
            result[rows] = torch.nn.functional.normalize(means, dim=-1).float().cpu().numpy()
        return result

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._model.config.hidden_size)

    @cached_property
    def digest(self) -> str:
        """Digest of all weights: encoders with another digest give other vectors."""
        hasher = blake2b(digest_size=16)
        for name, tensor in sorted(self._model.state_dict().items()):
            hasher.update(name.encode())
            hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()
