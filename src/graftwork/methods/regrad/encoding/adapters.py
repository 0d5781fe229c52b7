"""Passages into trained adapters: the encoder that a bank for Parametric RAG is filled with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftwork.errors import DataError
from graftwork.methods.regrad.bank.files import RECORD, TRAINED_ADAPTER, text_key
from graftwork.methods.regrad.bank.records import Gradient
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining, trained_adapters
from graftwork.methods.regrad.encoding.encoder import Document, PassageEncoder
from graftwork.methods.regrad.text.pairs import Augmented, Pair
from graftwork.methods.regrad.text.prompting import answer_ids, document_ids, document_text, family_for, question_ids
from graftwork.retrieval.retriever import Passage


@dataclass
class AdapterEncoder(PassageEncoder):
    """Trains an adapter for every passage, from the model's own on; what a record holds is the difference.

    Wording, batches, commits and what happens after a stop are those of gradients. A record's text is all that it was
    trained on, so that a passage whose pairs have changed is another text.

    Args:
        training: How adapters are trained.
        pairs: Rewrite and pairs of every passage, by its id; None where the settings need none.
    """

    training: AdapterTraining = field(default_factory=AdapterTraining)
    pairs: Mapping[str, Augmented] | None = None
    record: ClassVar[str] = TRAINED_ADAPTER

    def __post_init__(self) -> None:
        """Refuse settings and pairs that do not go together.

        Raises:
            ConfigError: If pairs are needed and missing, or given and not needed.
        """
        PassageEncoder.__post_init__(self)
        self.training.check_pairs(self.pairs is not None)

    def document(self, passage: Passage) -> Document:
        """A passage as the tokens of its texts.

        Raises:
            DataError: If there are no pairs for it, or nothing to predict.
        """
        text = document_text(self.config.document_template, passage.title, passage.text)
        try:
            if self.pairs is None:
                texts = [document_ids(self.tokenizer, self.config, passage.title, passage.text)]
            else:
                about = self.pairs.get(passage.id)
                if about is None:
                    raise DataError("found no pairs; expected some in the pairs file. Add them, or leave it out.")
                texts = self._texts(passage, about)
                text = json.dumps([text, passage.title, passage.text, about.row("")], ensure_ascii=False)
        except DataError as error:
            raise DataError(f"passage {passage.id!r}: {error}") from None
        ids = tuple(token for own, _ in texts for token in own)
        lengths = tuple(len(own) for own, _ in texts)
        return Document(passage.id, text, text_key(text), ids, any(cut for _, cut in texts), lengths)

    def gradients(self, batch: Sequence[Document]) -> list[Gradient]:
        """Differences of one batch, each as if trained alone."""
        values, losses = trained_adapters(self.model, [document.texts for document in batch], self.training)
        return [
            Gradient(one.id, one.text, row, len(one.ids), float(loss), one.truncated)
            for one, row, loss in zip(batch, values.float().cpu().numpy(), losses.tolist(), strict=True)
        ]

    def width(self, document: Document) -> int:
        """Tokens of a passage that are differentiated at once."""
        return max(document.lengths) * min(self.training.texts_per_update, len(document.lengths))

    @property
    def fingerprint(self) -> dict[str, str]:
        """What trained adapters of this model depend on; pairs are part of each record's text."""
        found = {**super().fingerprint, RECORD: TRAINED_ADAPTER, "training": str(self.training)}
        if self.training.texts != "passage":
            found["question wording"] = f"{family_for(self.config, 'open').digest()}, {self.config.answer_end}"
        return found

    @property
    def recorded(self) -> dict[str, Any]:
        """Nothing: step sizes have no part in trained adapters."""
        return {}

    def _texts(self, passage: Passage, about: Augmented) -> list[tuple[list[int], bool]]:
        """All that one passage is trained on, and of each text whether it was cut."""
        told = [passage.text, *([about.rewrite] if about.rewrite.strip() else [])]
        if self.training.texts == "joined":
            return [self._asked(pair, passage.title, text) for pair in about.pairs for text in told]
        plain = [document_ids(self.tokenizer, self.config, passage.title, text) for text in told]
        return [*plain, *(self._asked(pair) for pair in about.pairs)]

    def _asked(self, pair: Pair, title: str = "", text: str = "") -> tuple[list[int], bool]:
        """A question with its answer, behind the passage if there is one, which is cut where all is too long."""
        family, limit, cut = family_for(self.config, "open"), self.config.max_document_tokens, False
        answer = answer_ids(self.tokenizer, self.config, pair.answer)
        while True:
            shown = [(title, text)] if text.strip() else []
            ids = [*question_ids(self.tokenizer, family, pair.question, passages=shown), *answer]
            if len(ids) <= limit:
                return ids, cut
            tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not shown or len(tokens) <= len(ids) - limit:
                raise DataError(
                    f"found a question of {len(ids)} tokens with its answer; expected at most {limit} "
                    "(max_document_tokens). Shorten it."
                )
            text, cut = self.tokenizer.decode(tokens[: len(tokens) - (len(ids) - limit)]), True
