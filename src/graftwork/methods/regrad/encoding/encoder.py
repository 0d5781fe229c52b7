"""Encoding of passages to gradients: length-sorted batches, resumable, only missing passages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.changes import added
from graftwork.methods.regrad.bank.errors import DuplicatePassageError, FingerprintMismatchError, listed
from graftwork.methods.regrad.bank.files import GRADIENT, RECORD, TRAINED_ADAPTER, TRAINING_FIELDS, holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import FloatArray
from graftwork.methods.regrad.bank.records import Gradient, check_fingerprint
from graftwork.methods.regrad.bank.writing import BankWriter, Encoded
from graftwork.methods.regrad.encoding.fingerprint import earlier_base, fingerprint, recorded_step_sizes
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
"""Number of passages that are sorted by length together. Windows are cut from the whole work list, independently of
existing gradients, so that a resumed run forms the same batches and computes the same numbers."""

BATCH_TOKENS = {"cpu": 1024}
"""Number of tokens in a batch by type of device: the activations of more leave the cache of a CPU, which is slower."""
ACCELERATOR_BATCH_TOKENS = 4096
"""The same for all other devices."""


@dataclass(frozen=True, slots=True)
class Document:
    """A formatted and tokenized passage."""

    id: str
    text: str
    """Output of the document template; passages with equal texts share one gradient."""
    key: str
    """Key of the text's record."""
    ids: tuple[int, ...]
    truncated: bool
    lengths: tuple[int, ...] = ()
    """Lengths of the texts that `ids` concatenates; empty for a single text."""

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Token ids of each text."""
        ends = list(accumulate(self.lengths or (len(self.ids),)))
        return [self.ids[start:end] for start, end in pairwise([0, *ends])]


@dataclass
class PassageEncoder:
    """Batched computation of passages' gradients.

    Args:
        model: The converted model, with the adapter that will answer questions.
        tokenizer: Tokenizer of the model.
        config: Settings of the conversion.
        batch_size: Maximum number of passages in a batch.
        tokens_per_batch: Maximum number of tokens in a batch, including padding; a longer passage forms its own batch.
            None takes that of the model's device in `BATCH_TOKENS`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: ReGradConfig
    batch_size: int = 16
    tokens_per_batch: int | None = None
    _device: torch.device = field(init=False)
    record: ClassVar[str] = GRADIENT
    """Kind of the records that this encoder computes."""

    def __post_init__(self) -> None:
        """Validate the batch limits.

        Raises:
            ConfigError: If a limit is below 1.
        """
        self._device = pretrained(self.model).device
        if self.tokens_per_batch is None:
            self.tokens_per_batch = BATCH_TOKENS.get(self._device.type, ACCELERATOR_BATCH_TOKENS)
        for name in ("batch_size", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number from 1.")

    def document(self, passage: Passage) -> Document:
        """Format and tokenize a passage.

        Raises:
            DataError: If fewer than two tokens remain, so that no token is predicted.
        """
        text = document_text(self.config.document_template, passage.title, passage.text)
        try:
            ids, cut = document_ids(self.tokenizer, self.config, passage.title, passage.text)
        except DataError as error:
            raise DataError(f"passage {passage.id!r}: {error}") from None
        return Document(passage.id, text, text_key(text), tuple(ids), cut)

    def keyed(self, passages: Sequence[Passage]) -> dict[str, tuple[Passage, str]]:
        """Map id to passage and the key of its text."""
        template = self.config.document_template
        return {one.id: (one, text_key(document_text(template, one.title, one.text))) for one in passages}

    def batches(self, documents: Sequence[Document]) -> list[list[Document]]:
        """Group documents of similar length, longest first."""
        batches: list[list[Document]] = []
        most = self.tokens_per_batch or 0
        for document in sorted(documents, key=lambda one: (-self.width(one), one.key)):
            # the first document of a batch is its longest
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (len(batches[-1]) + 1) * self.width(batches[-1][0]) > most:
                batches.append([])
            batches[-1].append(document)
        return batches

    def width(self, document: Document) -> int:
        """Return the number of a document's tokens in one forward pass."""
        return len(document.ids)

    def gradients(self, batch: Sequence[Document]) -> list[Gradient]:
        """Compute the gradients of one batch; each is independent of the others in the batch."""
        width = max(len(document.ids) for document in batch)
        ids = torch.full((len(batch), width), padding_id(self.tokenizer), dtype=torch.long)  # [rows tokens]
        mask = torch.zeros_like(ids)
        for row, document in enumerate(batch):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
            mask[row, : len(document.ids)] = 1
        values, losses = passage_gradients(self.model, ids.to(self._device), mask.to(self._device))
        return gradient_rows(batch, values, losses)

    def encode(self, passages: Sequence[Passage]) -> list[Gradient]:
        """Compute the gradients of a few passages, in their order.

        Raises:
            DataError: If one of them has fewer than two tokens.
        """
        documents = [self.document(passage) for passage in passages]
        found = {one.id: one for batch in self.batches(documents) for one in self.gradients(batch)}
        return [found[document.id] for document in documents]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprint of gradients of the model in its current state."""
        return fingerprint(self.model, self.tokenizer, self.config)

    @property
    def recorded(self) -> dict[str, Any]:
        """State recorded with a new bank that may change without invalidating gradients."""
        return {"step_sizes": recorded_step_sizes(self.model)}

    def check(self, bank: GradientBank) -> None:
        """Verify that a bank to be read belongs to this model; settings of adapter training are not compared.

        Raises:
            FingerprintMismatchError: If its records belong to another model.
        """
        found = bank.manifest.fingerprint
        trained = TRAINING_FIELDS if bank.manifest.record == TRAINED_ADAPTER else ()
        own = {**self.fingerprint, **earlier_base(self.model, found)}
        own = {name: value for name, value in own.items() if name not in TRAINING_FIELDS}
        check_fingerprint(found, {**own, **{name: found[name] for name in trained if name in found}})

    def check_adds(self, bank: GradientBank) -> None:
        """Verify that a bank contains the kind of records that this encoder computes.

        Raises:
            FingerprintMismatchError: If it contains records of another kind.
        """
        if bank.manifest.record != self.record:
            raise FingerprintMismatchError(RECORD, bank.manifest.record, self.record)

    def open_bank(self, location: str | Path | Backend, *, precision: str | None = None) -> GradientBank:
        """Open a bank of this model for writing, or create it.

        Args:
            location: The bank: a folder, or an address in an object store.
            precision: Storage format of a new bank: float32, bfloat16 (the default) or int8.

        Raises:
            FingerprintMismatchError: If the bank belongs to another model, or contains records of another kind.
            ConfigError: If the bank has another precision.
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
        found = bank.manifest.fingerprint
        check_fingerprint(found, {**named, **earlier_base(self.model, found)})
        if precision not in (None, bank.precision):
            raise ConfigError(
                f"Found a bank in {location} of precision {bank.precision}; expected {precision}. Omit the precision, "
                "or build another bank."
            )
        return bank


def gradient_rows(batch: Sequence[Document], values: Tensor, losses: Tensor) -> list[Gradient]:
    """Convert the result of one batch to gradients.

    Args:
        batch: Documents of the batch.
        values: Flat gradients, `values` [rows numbers].
        losses: Mean losses, `losses` [rows].
    """
    numbers: FloatArray = values.float().cpu().numpy()
    return [
        Gradient(one.id, one.text, row, len(one.ids), float(loss), one.truncated)
        for one, row, loss in zip(batch, numbers, losses.cpu(), strict=True)
    ]


def encode_passages(
    encoder: PassageEncoder,
    bank: GradientBank,
    passages: Iterable[Passage],
    *,
    replace: bool = False,
    window: int = WINDOW,
    total: int = 0,
    known: GradientBank | None = None,
    index: Any = None,
) -> Encoded:
    """Append the missing gradients of passages to a bank.

    A run that is killed at any moment and repeated produces the same records as an uninterrupted run.

    Args:
        encoder: The encoder.
        bank: Bank that receives the gradients; open for writing.
        passages: All passages, streamed; must keep their order between runs.
        replace: Let existing ids refer to their new texts.
        window: Number of passages sorted by length together; must not change between runs.
        total: Number of missing passages for the progress bar; 0 if unknown.
        known: Another bank whose passages are skipped.
        index: Index that receives the passages of each window together with the bank; None for no index.

    Raises:
        DuplicatePassageError: If an id refers to another text and `replace` is off.
    """
    with Progress("encode", total) as progress:
        writer = BankWriter(bank, replace=replace, progress=progress)
        rest = iter(passages)
        while part := list(islice(rest, window)):
            with nullcontext() if index is None else added(bank, index, encoder.keyed(part)):
                for batch in missing_gradients(encoder, part, writer, known):
                    writer.add(batch)
                # later windows then find these texts independently of the timing of other commits
                writer.commit()
        return writer.result()


def missing_gradients(
    encoder: PassageEncoder, passages: Sequence[Passage], writer: BankWriter, known: GradientBank | None = None
) -> Iterator[list[Gradient]]:
    """Yield the gradients of a window that the bank lacks, batch by batch.

    Batches are formed from the whole window and then reduced to missing passages, so that a resumed run computes the
    same numbers.

    Args:
        encoder: The encoder.
        passages: The window.
        writer: Writer of the bank; counts existing and rejected passages.
        known: Another bank whose passages are skipped.
    """
    documents = group_by_text(encoder, passages, writer)
    missing = missing_documents([one for same in documents.values() for one in same], writer, known)
    wanted = {document.id for document in missing}
    held = writer.bank.holds(dict.fromkeys(document.key for document in missing))
    for batch in encoder.batches([same[0] for same in documents.values()]):
        named = [document for first in batch for document in documents[first.key] if document.id in wanted]
        fresh = {document.key for document in named} - held
        found: dict[str, Gradient] = {}
        if fresh:
            rows = encoder.gradients([first for first in batch if first.key in fresh])
            found = {text_key(row.text): row for row in rows}
        if named:
            yield [with_id(document, found.get(document.key)) for document in named]


def group_by_text(
    encoder: PassageEncoder, passages: Sequence[Passage], writer: BankWriter
) -> dict[str, list[Document]]:
    """Group passages by record key; passages that cannot be encoded are counted as rejected."""
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
    """Return the documents that neither bank contains; the others are counted as skipped.

    Raises:
        DuplicatePassageError: If an id refers to another text and the writer does not replace.
    """
    ids = [document.id for document in documents]
    existing: Mapping[str, str] = {**(known.keys(ids) if known is not None else {}), **writer.bank.keys(ids)}
    other = [document.id for document in documents if existing.get(document.id, document.key) != document.key]
    if other and not writer.replace:
        raise DuplicatePassageError(
            f"Found another text for {listed(other)}, which the bank has already. Give new texts new ids, or "
            "allow them to replace the old ones."
        )
    missing = [document for document in documents if existing.get(document.id) != document.key]
    writer.skip(len(documents) - len(missing))
    return missing


def with_id(document: Document, gradient: Gradient | None) -> Gradient:
    """Return a copy of a text's gradient under the document's id; without values if the bank already has the record."""
    if gradient is None:
        return Gradient(document.id, document.text, (), len(document.ids), truncated=document.truncated)
    return Gradient(document.id, document.text, gradient.values, gradient.tokens, gradient.loss, gradient.truncated)


def belongs_to(id: str, worker: int, workers: int) -> bool:
    """Return True if the passage is assigned to this worker (0 ≤ worker < workers)."""
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little") % workers == worker


def count_missing(encoder: PassageEncoder, bank: GradientBank, passages: Iterable[Passage]) -> int:
    """Return the number of passages whose id has no gradient."""
    missing, rest = 0, iter(passages)
    while part := [passage.id for passage in islice(rest, 10 * WINDOW)]:
        missing += len(part) - len(bank.keys(part))
    return missing
