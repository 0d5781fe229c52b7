"""Passages into gradients into a bank: batches by length, commits in groups, only what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import DuplicatePassageError, FingerprintMismatchError, listed
from graftwork.methods.regrad.bank.files import GRADIENT, RECORD, TRAINED_ADAPTER, TRAINING_FIELDS, holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.records import Gradient, check_fingerprint
from graftwork.methods.regrad.bank.writing import BankWriter, Encoded
from graftwork.methods.regrad.encoding.fingerprint import fingerprint, recorded_step_sizes
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.modules import layout
from graftwork.methods.regrad.text.prompting import document_ids, document_text
from graftwork.retrieval.retriever import Passage
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from torch import nn

    from graftwork.methods.regrad.config import ReGradConfig

WINDOW = 2048
"""Passages that are sorted by length together. Windows are cut from the whole work list, whatever is done already, so
that a batch holds the same passages, and gives the same numbers, after a stop."""


@dataclass(frozen=True, slots=True)
class Document:
    """A passage as it is differentiated."""

    id: str
    text: str
    """Worded by the template; passages whose texts are equal share one gradient."""
    key: str
    """What names the text's record."""
    ids: tuple[int, ...]
    truncated: bool
    lengths: tuple[int, ...] = ()
    """Where `ids` holds several texts, one behind the other, their lengths."""

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The texts one by one."""
        ends = list(accumulate(self.lengths or (len(self.ids),)))
        return [self.ids[start:end] for start, end in pairwise([0, *ends])]


@dataclass
class PassageEncoder:
    """Computes gradients of passages in batches.

    Args:
        model: The converted model, at the adapter that questions will be answered with.
        tokenizer: Its tokenizer.
        config: The settings that it was converted with.
        batch_size: Passages differentiated at once, at most.
        tokens_per_batch: Tokens of a batch at most, padding counted; a longer passage goes by itself.
    """

    model: nn.Module
    tokenizer: Any
    config: ReGradConfig
    batch_size: int = 16
    tokens_per_batch: int = 4096
    _device: torch.device = field(init=False)
    record: ClassVar[str] = GRADIENT
    """What it makes of a passage."""

    def __post_init__(self) -> None:
        """Refuse impossible batches.

        Raises:
            ConfigError: If a batch could hold nothing.
        """
        for name in ("batch_size", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")
        self._device = pretrained(self.model).device

    def document(self, passage: Passage) -> Document:
        """A passage as tokens.

        Raises:
            DataError: If less than two tokens are left, so that there is nothing to predict.
        """
        text = document_text(self.config.document_template, passage.title, passage.text)
        try:
            ids, cut = document_ids(self.tokenizer, self.config, passage.title, passage.text)
        except DataError as error:
            raise DataError(f"passage {passage.id!r}: {error}") from None
        return Document(passage.id, text, text_key(text), tuple(ids), cut)

    def batches(self, documents: Sequence[Document]) -> list[list[Document]]:
        """Documents of about one length together, the longest first."""
        batches: list[list[Document]] = []
        for document in sorted(documents, key=lambda one: (-self.width(one), one.key)):
            # the first of a batch is its longest
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (len(batches[-1]) + 1) * self.width(batches[-1][0]) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(document)
        return batches

    def width(self, document: Document) -> int:
        """Tokens of a passage that are differentiated at once."""
        return len(document.ids)

    def gradients(self, batch: Sequence[Document]) -> list[Gradient]:
        """Gradients of one batch, each as if computed alone."""
        width = max(len(document.ids) for document in batch)
        ids = torch.full((len(batch), width), padding_id(self.tokenizer), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, document in enumerate(batch):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
            mask[row, : len(document.ids)] = 1
        values, losses = passage_gradients(self.model, ids.to(self._device), mask.to(self._device))
        return [
            Gradient(one.id, one.text, row, len(one.ids), float(loss), one.truncated)
            for one, row, loss in zip(batch, values.cpu().numpy(), losses.tolist(), strict=True)
        ]

    def encode(self, passages: Sequence[Passage]) -> list[Gradient]:
        """Gradients of a few passages, in their order.

        Raises:
            DataError: If one of them has nothing to learn from.
        """
        documents = [self.document(passage) for passage in passages]
        found = {one.id: one for batch in self.batches(documents) for one in self.gradients(batch)}
        return [found[document.id] for document in documents]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What gradients of this model depend on, as it stands."""
        return fingerprint(self.model, self.tokenizer, self.config)

    @property
    def recorded(self) -> dict[str, Any]:
        """What stands beside a new bank and may change."""
        return {"step_sizes": recorded_step_sizes(self.model)}

    def check(self, bank: GradientBank) -> None:
        """Compare a bank that is read with this model; how its adapters were trained, if they were, it alone knows.

        Raises:
            FingerprintMismatchError: If its records are another model's.
        """
        found = bank.manifest.fingerprint
        trained = TRAINING_FIELDS if bank.manifest.record == TRAINED_ADAPTER else ()
        own = {name: value for name, value in self.fingerprint.items() if name not in TRAINING_FIELDS}
        check_fingerprint(found, {**own, **{name: found[name] for name in trained if name in found}})

    def check_adds(self, bank: GradientBank) -> None:
        """Make sure that what this makes is what a bank holds.

        Raises:
            FingerprintMismatchError: If it holds records of another kind.
        """
        if bank.manifest.record != self.record:
            raise FingerprintMismatchError(RECORD, bank.manifest.record, self.record)

    def open_bank(self, location: str | Path | Backend, *, precision: str | None = None) -> GradientBank:
        """The bank of this model, open for writing; made if there is none.

        Args:
            location: The bank: a folder, or an address in an object store.
            precision: How a new bank keeps numbers: float32, bfloat16 (by default) or int8.

        Raises:
            FingerprintMismatchError: If the bank there is another model's, or holds records of another kind.
            ConfigError: If it keeps numbers otherwise than asked for.
        """
        named = self.fingerprint
        if not holds_bank(location):
            return GradientBank.create(
                location,
                fingerprint=named,
                layout=layout(self.model),
                precision=precision or "bfloat16",
                recorded=self.recorded,
            )
        bank = GradientBank(location, "a")
        check_fingerprint(bank.manifest.fingerprint, named)
        if precision not in (None, bank.precision):
            raise ConfigError(
                f"Found a bank in {location} that keeps numbers as {bank.precision}; expected {precision}. Leave the "
                "precision out, or build another bank."
            )
        return bank


def encode_passages(
    encoder: PassageEncoder,
    bank: GradientBank,
    passages: Iterable[Passage],
    *,
    replace: bool = False,
    window: int = WINDOW,
    total: int = 0,
    known: GradientBank | None = None,
) -> Encoded:
    """Put the gradients of passages into a bank, those that are missing.

    Killed at any moment and called again, it ends with the bank of an uninterrupted call, record for record.

    Args:
        encoder: The model with its settings.
        bank: Where they go; open for writing.
        passages: The work list, in an order that stays the same; streamed.
        replace: Let an id that is there stand for its new text.
        window: Passages sorted by length together.
        total: Passages that are missing, if known, for telling the time left.
        known: Another bank whose passages are not encoded again.

    Raises:
        DuplicatePassageError: If an id stands for another text and was not to be replaced.
    """
    with Progress("encode", total) as progress:
        writer = BankWriter(bank, replace=replace, progress=progress)
        rest = iter(passages)
        while part := list(islice(rest, window)):
            for batch in plan(encoder, part, writer, known):
                writer.add(batch)
            # a later window then always finds these texts, whenever a commit came in between
            writer.commit()
        return writer.result()


def plan(
    encoder: PassageEncoder, passages: Sequence[Passage], writer: BankWriter, known: GradientBank | None = None
) -> Iterator[list[Gradient]]:
    """The gradients of a window that its bank lacks, batch by batch.

    Batches are made of everything, and only then cut to what is missing: that is what makes a repeated call compute the
    same numbers.
    """
    documents = by_text(encoder, passages, writer)
    missing = missing_documents([one for same in documents.values() for one in same], writer, known)
    wanted = {document.id for document in missing}
    held = writer.bank.holds(dict.fromkeys(document.key for document in missing))
    for batch in encoder.batches([same[0] for same in documents.values()]):
        named = [document for first in batch for document in documents[first.key] if document.id in wanted]
        fresh = {document.key for document in named} - held
        found = {}
        if fresh:
            rows = encoder.gradients([first for first in batch if first.key in fresh])
            found = {text_key(row.text): row for row in rows}
        if named:
            yield [under_own_id(document, found.get(document.key)) for document in named]


def by_text(encoder: PassageEncoder, passages: Sequence[Passage], writer: BankWriter) -> dict[str, list[Document]]:
    """Passages as documents, those of equal texts together; what cannot be encoded is counted."""
    documents: dict[str, list[Document]] = {}
    for passage in passages:
        try:
            document = encoder.document(passage)
        except DataError as error:
            writer.reject(str(error))
            continue
        documents.setdefault(document.key, []).append(document)
    return documents


def missing_documents(
    documents: Sequence[Document], writer: BankWriter, known: GradientBank | None = None
) -> list[Document]:
    """Those that no bank has; the others are counted.

    Raises:
        DuplicatePassageError: If an id stands for another text and was not to be replaced.
    """
    ids = [document.id for document in documents]
    there: Mapping[str, str] = {**(known.keys(ids) if known is not None else {}), **writer.bank.keys(ids)}
    other = [document.id for document in documents if there.get(document.id, document.key) != document.key]
    if other and not writer.replace:
        raise DuplicatePassageError(
            f"Found another text for {listed(other)}, which the bank has already. Give new texts new ids, or let them "
            "replace the old ones."
        )
    missing = [document for document in documents if there.get(document.id) != document.key]
    writer.skip(len(documents) - len(missing))
    return missing


def under_own_id(document: Document, gradient: Gradient | None) -> Gradient:
    """The gradient of a text under an id of it; without numbers if the bank has them."""
    if gradient is None:
        return Gradient(document.id, document.text, (), len(document.ids), truncated=document.truncated)
    return Gradient(document.id, document.text, gradient.values, gradient.tokens, gradient.loss, gradient.truncated)


def share_of(id: str, worker: int, workers: int) -> bool:
    """Whether a passage belongs to this worker, of so many."""
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little") % workers == worker


def count_missing(encoder: PassageEncoder, bank: GradientBank, passages: Iterable[Passage]) -> int:
    """How many passages have no gradient under their id."""
    missing, rest = 0, iter(passages)
    while part := [passage.id for passage in islice(rest, 10 * WINDOW)]:
        missing += len(part) - len(bank.keys(part))
    return missing
