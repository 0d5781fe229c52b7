"""Passages into gradients into a bank: batches by length, commits in groups, only what is missing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank import GradientBank
from graftwork.methods.regrad.bank_errors import DuplicatePassageError, listed
from graftwork.methods.regrad.bank_files import holds_bank, text_key
from graftwork.methods.regrad.bank_places import Place
from graftwork.methods.regrad.bank_records import Appended, Gradient, check_fingerprint
from graftwork.methods.regrad.fingerprint import fingerprint, recorded_step_sizes
from graftwork.methods.regrad.gradients import passage_gradients
from graftwork.methods.regrad.modules import layout
from graftwork.methods.regrad.wording import document_ids, document_text
from graftwork.progress import Progress
from graftwork.retrieval.retriever import Passage
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import padding_id

if TYPE_CHECKING:
    from torch import nn

    from graftwork.methods.regrad.config import ReGradConfig

WINDOW = 2048
"""Passages that are sorted by length together. Windows are cut from the whole work list, whatever is done already, so
that a batch holds the same passages, and gives the same numbers, after a stop."""
COMMIT_SECONDS = 15.0
"""Longest that finished gradients wait for their commit."""
COMMIT_BYTES = 256 << 20
"""Most that waits for a commit."""
_SHOWN = 5


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """What encoding did."""

    written: int = 0
    """Gradients computed and kept."""
    aliased: int = 0
    """Ids of texts that had a gradient."""
    skipped: int = 0
    """Ids that were there already."""
    replaced: int = 0
    """Ids that stood for another text before."""
    rejected: int = 0
    """Passages with nothing to learn from."""
    reasons: tuple[str, ...] = ()
    """Why, of the first ones."""
    tokens: int = 0
    seconds: float = 0.0
    passages_per_second: float = 0.0
    bytes_per_second: float = 0.0


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
        for document in sorted(documents, key=lambda one: (-len(one.ids), one.key)):
            # the first of a batch is its longest
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (len(batches[-1]) + 1) * len(batches[-1][0].ids) > self.tokens_per_batch:
                batches.append([])
            batches[-1].append(document)
        return batches

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

    def check(self, bank: GradientBank) -> None:
        """Compare a bank with this model.

        Raises:
            FingerprintMismatchError: If its gradients are another model's.
        """
        check_fingerprint(bank.manifest.fingerprint, self.fingerprint)

    def open_bank(self, location: str | Path | Place, *, precision: str | None = None) -> GradientBank:
        """The bank of this model, open for writing; made if there is none.

        Args:
            location: The bank: a folder, or an address in an object store.
            precision: How a new bank keeps numbers: float32, bfloat16 (by default) or int8.

        Raises:
            FingerprintMismatchError: If the bank there is another model's.
            ConfigError: If it keeps numbers otherwise than asked for.
        """
        named = self.fingerprint
        if not holds_bank(location):
            return GradientBank.create(
                location, fingerprint=named, layout=layout(self.model), precision=precision or "bfloat16",
                recorded={"step_sizes": recorded_step_sizes(self.model)},
            )  # fmt: skip
        bank = GradientBank(location, "a")
        self.check(bank)
        if precision not in (None, bank.precision):
            raise ConfigError(
                f"Found a bank in {location} that keeps numbers as {bank.precision}; expected {precision}. Leave the "
                "precision out, or build another bank."
            )
        return bank


class BankWriter:
    """Collects gradients and commits them in groups, whole batches at a time.

    Args:
        bank: Where they go.
        replace: Let an id that is there stand for its new text.
        progress: Told of every passage that is safe on disk.
    """

    def __init__(self, bank: GradientBank, *, replace: bool = False, progress: Progress | None = None) -> None:
        self.bank, self.replace, self.progress = bank, replace, progress
        self.total, self.tokens, self.rejected = Appended(), 0, 0
        self.reasons: list[str] = []
        self._waiting: list[Gradient] = []
        self._started = self._committed = time.monotonic()

    def add(self, gradients: Sequence[Gradient]) -> None:
        """Take a batch, and commit what waits if it is much or has waited for long."""
        self._waiting += gradients
        self.tokens += sum(gradient.tokens for gradient in gradients)
        size = len(self._waiting) * self.bank.manifest.stride
        if size >= COMMIT_BYTES or time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def skip(self, count: int) -> None:
        """Count passages that were there already."""
        self.total = _plus(self.total, Appended(skipped=count))

    def reject(self, reason: str) -> None:
        """Count a passage that cannot be encoded."""
        self.rejected += 1
        if len(self.reasons) < _SHOWN:
            self.reasons.append(reason)

    def commit(self) -> None:
        """Have everything that was added safe on disk."""
        if self._waiting:
            self.total = _plus(self.total, self.bank.append(self._waiting, replace=self.replace))
            if self.progress is not None:
                done = self.result()
                self.progress.describe(
                    f"encode ({done.passages_per_second:.0f} passages/s, {done.bytes_per_second / 1e6:.2f} MB/s)"
                )
                self.progress.advance(len(self._waiting))
        self._waiting, self._committed = [], time.monotonic()

    def result(self) -> Encoded:
        """What was done up to now."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        count = self.total.written
        return Encoded(
            count, self.total.aliased, self.total.skipped, self.total.replaced, self.rejected, tuple(self.reasons),
            self.tokens, round(seconds, 3), round(count / seconds, 2),
            round(count * self.bank.manifest.stride / seconds),
        )  # fmt: skip


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
    return Gradient(
        document.id, document.text, gradient.values, gradient.tokens, gradient.loss, gradient.truncated
    )  # fmt: skip


def share_of(id: str, worker: int, workers: int) -> bool:
    """Whether a passage belongs to this worker, of so many."""
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little") % workers == worker


def count_missing(encoder: PassageEncoder, bank: GradientBank, passages: Iterable[Passage]) -> int:
    """How many passages have no gradient under their id."""
    missing, rest = 0, iter(passages)
    while part := [passage.id for passage in islice(rest, 10 * WINDOW)]:
        missing += len(part) - len(bank.keys(part))
    return missing


def _plus(one: Appended, other: Appended) -> Appended:
    return Appended(
        one.written + other.written, one.aliased + other.aliased, one.skipped + other.skipped,
        one.replaced + other.replaced,
    )  # fmt: skip
