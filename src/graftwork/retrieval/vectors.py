"""Vectors of the passages of an embedded index, in a Lance dataset next to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.core.files import read_json, write_json
from graftwork.core.locks import locked
from graftwork.core.storage import writing
from graftwork.errors import MissingExtraError
from graftwork.retrieval.retriever import DamagedIndexError, IndexLockedError, Passage
from graftwork.retrieval.text_encoder import TextEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from graftwork.retrieval.embedded import EmbeddedIndex

RECORD_FILE = "vectors.json"
"""Record of the vectors: mode, encoder, and the state of the index that they belong to."""
_DATA = "vectors.lance"
_TOGETHER = 1024
"""Number of passages that are encoded and written together."""
_LOCK_SECONDS = 60.0


def vectors_folder(index: str | Path) -> Path:
    """Return the folder of the vectors of an index."""
    return Path(index).with_name(f"{Path(index).name}.vectors")


class VectorStore:
    """Vectors of passages by id, with the digest of the passage that each belongs to.

    The record names the state of the index. If it names another one, as after a kill between the two, `synchronize`
    compares all passages and encodes those that differ.

    Args:
        folder: Folder of the vectors.
        encoder: Encoder of new passages; must be the one of the record.

    Raises:
        DamagedIndexError: If record or data cannot be read.
        MissingExtraError: If Lance is not installed.
    """

    def __init__(self, folder: Path, encoder: TextEncoder) -> None:
        self.folder, self.encoder = folder, encoder
        self.record: dict[str, Any] = read_json(folder / RECORD_FILE)
        self._data: Any = None

    @classmethod
    def create(cls, folder: Path, encoder: TextEncoder, retriever: str) -> VectorStore:
        """Create an empty store, in place of another one.

        Args:
            folder: Folder of the vectors.
            encoder: Their encoder.
            retriever: Mode that searches use by default: dense or hybrid.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        record = {
            "retriever": retriever,
            "encoder": encoder.name,
            "encoder_digest": encoder.digest,
            "dimension": encoder.dimension,
            "index": None,
        }
        write_json(folder / RECORD_FILE, record)
        store = cls(folder, encoder)
        mode = "overwrite" if (folder / _DATA).exists() else "create"
        _lance().write_dataset(store._table({}, []), str(folder / _DATA), mode=mode)
        return store

    def is_current(self, index: EmbeddedIndex) -> bool:
        """True if the vectors belong to the present state of an index."""
        return self.record["index"] == state_of(index)

    def nearest(self, vector: NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """Ids of the passages with the largest inner products, and these; exact, and sorted by product and id."""
        query = {"column": "vector", "q": vector, "k": count, "metric": "dot", "use_index": False}
        table = self._open().to_table(columns=["id"], nearest=query)
        # Lance's distance is 1 − the product
        found = zip(table["id"].to_pylist(), table["_distance"].to_pylist(), strict=True)
        return sorted(((name, 1.0 - distance) for name, distance in found), key=lambda one: (-one[1], one[0]))

    def change(self, index: EmbeddedIndex, into: Sequence[Passage], out: Iterable[str], *, erase: bool = False) -> None:
        """Follow a change of the index: add vectors, replacing those of the same ids, and delete others.

        Args:
            index: The index after the change.
            into: New passages.
            out: Ids of deleted passages.
            erase: Remove deleted vectors from the files, and older states.
        """
        with self._locked(), writing(self.folder):
            data = self._newest()
            if gone := [*dict.fromkeys(out)]:
                for start in range(0, len(gone), 500):
                    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in gone[start : start + 500])
                    data.delete(f"id IN ({quoted})")
            self._write(data, into)
            if erase:
                data.optimize.compact_files(materialize_deletions_threshold=0)
                data.cleanup_old_versions(
                    older_than=timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
                )
            self.record = {**self.record, "index": state_of(index)}
            write_json(self.folder / RECORD_FILE, self.record)

    def synchronize(self, index: EmbeddedIndex) -> int:
        """Encode the passages of an index without a vector, or with that of another text, and delete all others.

        Returns:
            Number of encoded passages.
        """
        encoded = 0
        with self._locked(), writing(self.folder):
            data = self._newest()
            table = data.to_table(columns=["id", "digest"])
            held = dict(zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True))
            missing = (one for one in index.all_passages() if held.pop(one.id, None) != _digest(one))
            while part := list(islice(missing, _TOGETHER)):
                self._write(data, part)
                encoded += len(part)
        self.change(index, [], held)
        return encoded

    def set_retriever(self, retriever: str) -> None:
        """Record another mode."""
        self.record = {**self.record, "retriever": retriever}
        write_json(self.folder / RECORD_FILE, self.record)

    def refresh(self) -> None:
        """Move to the newest state."""
        self.record = read_json(self.folder / RECORD_FILE)
        self._data = None

    def _write(self, data: Any, passages: Sequence[Passage]) -> None:
        for start in range(0, len(passages), _TOGETHER):
            part = passages[start : start + _TOGETHER]
            vectors = self.encoder.vectors([f"{one.title}\n{one.text}" if one.title else one.text for one in part])
            table = self._table({one.id: _digest(one) for one in part}, vectors)
            data.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def _table(self, digests: Mapping[str, str], vectors: Any) -> Any:
        import numpy as np
        import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]

        arrow: Any = pa
        size = int(self.record["dimension"])
        schema = arrow.schema(
            [("id", arrow.string()), ("digest", arrow.string()), ("vector", arrow.list_(arrow.float32(), size))]
        )
        flat = np.asarray(vectors, np.float32).reshape(-1)  # [passages dimension] -> [passages*dimension]
        columns = [
            arrow.array(list(digests), arrow.string()),
            arrow.array(list(digests.values()), arrow.string()),
            arrow.FixedSizeListArray.from_arrays(arrow.array(flat, arrow.float32()), size),
        ]
        return arrow.Table.from_arrays(columns, schema=schema)

    def _open(self) -> Any:
        if self._data is None:
            try:
                self._data = _lance().dataset(str(self.folder / _DATA))
            except (OSError, ValueError) as error:
                raise DamagedIndexError(f"{self.folder} cannot be read: {error}. Build the vectors again.") from error
        return self._data

    def _newest(self) -> Any:
        # a stale handle would insert an id twice
        data = self._open()
        data.checkout_latest()
        return data

    def _locked(self) -> AbstractContextManager[None]:
        busy = f"Another process has been changing {self.folder} for {_LOCK_SECONDS:.0f} seconds. Wait for it to end."
        return locked(self.folder / ".lock", busy, timeout=_LOCK_SECONDS, reentrant=True, error=IndexLockedError)


def state_of(index: EmbeddedIndex) -> list[Any]:
    """Return what identifies the contents of an index: number and digest of its passages."""
    return [len(index), index.record["source"]["digest"]]


def _digest(passage: Passage) -> str:
    return f"{passage.digest():032x}"


def _lance() -> Any:
    try:
        import lance  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("pylance", "regrad") from None
    return lance
