"""Encoder of trained adapters, for banks of Parametric RAG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from graftwork.errors import DataError
from graftwork.methods.regrad.bank.files import RECORD, TRAINED_ADAPTER, text_key
from graftwork.methods.regrad.bank.records import Gradient
from graftwork.methods.regrad.encoding.adapter_training import AdapterTraining, trained_adapters
from graftwork.methods.regrad.encoding.encoder import Document, PassageEncoder, gradient_rows
from graftwork.methods.regrad.text.pairs import Augmented, Pair
from graftwork.methods.regrad.text.prompting import answer_ids, document_ids, document_text, family_for, question_ids
from graftwork.retrieval.retriever import Passage


@dataclass
class AdapterEncoder(PassageEncoder):
    """Trains an adapter for every passage, starting at the model's own; a record contains the difference.

    Formatting, batching, commits and resuming are inherited. A record's text contains everything that the adapter was
    trained on, so a passage with changed pairs counts as another text.

    Args:
        training: Training settings.
        pairs: Rewrite and pairs of every passage, by its id; None if the training texts use none.
    """

    training: AdapterTraining = field(default_factory=AdapterTraining)
    pairs: Mapping[str, Augmented] | None = None
    record: ClassVar[str] = TRAINED_ADAPTER

    def __post_init__(self) -> None:
        """Validate the settings and pairs.

        Raises:
            ConfigError: If pairs are missing or unused.
        """
        PassageEncoder.__post_init__(self)
        self.training.check_pairs(self.pairs is not None)

    def document(self, passage: Passage) -> Document:
        """Format and tokenize the training texts of a passage.

        Raises:
            DataError: If the passage has no pairs, or a text has fewer than two tokens.
        """
        text = document_text(self.config.document_template, passage.title, passage.text)
        try:
            if self.pairs is None:
                texts = [document_ids(self.tokenizer, self.config, passage.title, passage.text)]
            else:
                about = self.pairs.get(passage.id)
                if about is None:
                    raise DataError("found no pairs; expected some in the pairs file. Add them, or remove the passage.")
                texts = self._texts(passage, about)
                text = json.dumps([text, passage.title, passage.text, about.row("")], ensure_ascii=False)
        except DataError as error:
            raise DataError(f"passage {passage.id!r}: {error}") from None
        ids = tuple(token for own, _ in texts for token in own)
        lengths = tuple(len(own) for own, _ in texts)
        return Document(passage.id, text, text_key(text), ids, any(cut for _, cut in texts), lengths)

    def gradients(self, batch: Sequence[Document]) -> list[Gradient]:
        """Train the adapters of one batch; each is independent of the others in the batch."""
        values, losses = trained_adapters(self.model, [document.texts for document in batch], self.training)
        return gradient_rows(batch, values, losses)

    def width(self, document: Document) -> int:
        """Return the number of a document's padded tokens in one forward pass."""
        return max(document.lengths) * min(self.training.texts_per_update, len(document.lengths))

    @property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprint of trained adapters of this model; pairs are part of each record's text instead."""
        found = {**super().fingerprint, RECORD: TRAINED_ADAPTER, "training": str(self.training)}
        if self.training.texts != "passage":
            found["question wording"] = f"{family_for(self.config, 'open').digest()}, {self.config.answer_end}"
        return found

    @property
    def recorded(self) -> dict[str, Any]:
        """Empty: trained adapters do not depend on step sizes."""
        return {}

    def _texts(self, passage: Passage, about: Augmented) -> list[tuple[list[int], bool]]:
        """Token ids of each training text, and True for a text that was cut."""
        versions = [passage.text, *([about.rewrite] if about.rewrite.strip() else [])]
        if self.training.texts == "joined":
            return [self._question_and_answer(pair, passage.title, text) for pair in about.pairs for text in versions]
        plain = [document_ids(self.tokenizer, self.config, passage.title, text) for text in versions]
        return [*plain, *(self._question_and_answer(pair) for pair in about.pairs)]

    def _question_and_answer(self, pair: Pair, title: str = "", text: str = "") -> tuple[list[int], bool]:
        """Token ids of passage, question and answer; the passage is optional and cut if the text is too long."""
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
            kept = tokens[: len(tokens) - (len(ids) - limit)]
            text, cut = str(self.tokenizer.decode(kept)), True  # pyright: ignore[reportUnknownMemberType]
