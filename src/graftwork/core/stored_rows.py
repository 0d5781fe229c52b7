"""Examples in a memory-mapped Arrow table, and sequences of examples that are not copied."""

from __future__ import annotations

import json
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from graftwork.core.cache import ROWS, cache_folder, cache_limit, mark_used, remove_oldest
from graftwork.core.digests import file_digest
from graftwork.core.example import AUXILIARY, Example
from graftwork.core.files import read_json, write_record
from graftwork.core.storage import writing
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

IN_MEMORY = 20_000
"""Number of examples up to which they are kept as objects; more are written to a table."""
BATCH = 1000
"""Number of examples that are converted between objects and columns at once."""
COLUMNS = ("key", "input", "target", "pair", "answers", "metadata")


class StoredRows(Sequence[Example]):
    """Examples of a memory-mapped Arrow table; objects are made on access, and slices are views.

    Args:
        file: Arrow file that `store_rows` wrote.
        names: Names of the metadata fields that occur in it.
        indices: Rows of the file in the order of this sequence; None for all.
    """

    def __init__(self, file: Path, names: Sequence[str], indices: Sequence[int] | np.ndarray | None = None) -> None:
        import numpy as np

        self.file = file
        self.names = tuple(names)
        self._table = _open(file)
        self._indices = None if indices is None else np.asarray(indices, dtype=np.int64)
        self._owner: StoredRows | None = None

    def __len__(self) -> int:
        return len(self._table) if self._indices is None else len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...

    def __getitem__(self, index: int | slice) -> Example | StoredRows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        position = range(len(self))[index]
        return next(self._read(position, position + 1))

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), BATCH):
            yield from self._read(start, min(start + BATCH, len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(cast("Sequence[Any]", other))
            and all(mine == theirs for mine, theirs in zip(self, cast("Sequence[Any]", other), strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.file, self.names, self._indices)

    @property
    def key(self) -> str | None:
        """Digest of the rows and their order; None if the table is removed with this sequence."""
        if self.file.name.startswith("."):
            return None
        chosen = b"" if self._indices is None else self._indices.tobytes()
        return sha256(self.file.stem.encode() + chosen).hexdigest()

    def select(self, indices: Sequence[int]) -> StoredRows:
        """Return a view of the rows at the positions, in their order."""
        import numpy as np

        chosen = np.asarray(indices, dtype=np.int64)
        view = StoredRows.__new__(StoredRows)
        view.file, view.names, view._table = self.file, self.names, self._table
        view._indices = chosen if self._indices is None else self._indices[chosen]
        # a temporary file is removed with the sequence that was made of it
        view._owner = self
        return view

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the values of some columns of every row, without making examples."""
        for start in range(0, len(self), BATCH):
            part = self._columns(start, min(start + BATCH, len(self)))
            yield from zip(*(part[name] for name in names), strict=True)

    def _columns(self, start: int, stop: int) -> Mapping[str, list[Any]]:
        where = slice(start, stop) if self._indices is None else self._indices[start:stop]
        return cast("Mapping[str, list[Any]]", self._table[where])

    def _read(self, start: int, stop: int) -> Iterator[Example]:
        part = self._columns(start, stop)
        for key, text, target, pair, answers, metadata in zip(*(part[name] for name in COLUMNS), strict=True):
            fields: dict[str, Any] = {} if metadata is None else _decoded(json.loads(metadata))
            yield Example(key, text, target, tuple(answers), fields, pair)


class JoinedRows(Sequence[Example]):
    """Sequences of examples, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self._ends, position)
        return self.parts[part][position - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Example]:
        return chain.from_iterable(self.parts)


class MappedRows(Sequence[Example]):
    """Examples of a table, each changed by a function on access.

    Args:
        rows: Examples before the change.
        change: The function.
    """

    def __init__(self, rows: Sequence[Example], change: Callable[[Example], Example]) -> None:
        self.rows = rows
        self.change = change

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return tuple(map(self.change, self.rows[index]))
        return self.change(self.rows[index])

    def __iter__(self) -> Iterator[Example]:
        return map(self.change, self.rows)


def map_rows(rows: Sequence[Example], change: Callable[[Example], Example]) -> Sequence[Example]:
    """Return changed examples: those of a table on access, others as a tuple.

    Args:
        rows: Examples.
        change: Returns the changed example.
    """
    if isinstance(rows, StoredRows | JoinedRows):
        return MappedRows(rows, change)
    return tuple(map(change, rows))


def with_auxiliary(rows: Iterable[Example]) -> Iterator[Example]:
    """Yield every example, followed by its second one if it has any."""
    for row in rows:
        yield row
        if AUXILIARY in row.metadata:
            yield row.metadata[AUXILIARY]


def join_rows(parts: Iterable[Sequence[Example]]) -> Sequence[Example]:
    """Concatenate sequences of examples; those in tables are not read."""
    found = list(parts)
    if any(isinstance(part, StoredRows | JoinedRows | MappedRows) for part in found):
        return found[0] if len(found) == 1 else JoinedRows(found)
    return [row for part in found for row in part]


def select_rows(rows: Sequence[Example], indices: Sequence[int]) -> Sequence[Example]:
    """Rows at the positions, in their order: a view of a table, else a tuple."""
    if isinstance(rows, StoredRows):
        return rows.select(indices)
    return tuple(rows[index] for index in indices)


def has_metadata(rows: Sequence[Example], name: str) -> bool:
    """True if some example has a metadata field; tables are not read for it."""
    if isinstance(rows, StoredRows):
        return name in rows.names
    if isinstance(rows, JoinedRows):
        return any(has_metadata(part, name) for part in rows.parts)
    return any(name in row.metadata for row in rows)


def keys_of(rows: Sequence[Example]) -> list[str]:
    """Keys of all rows."""
    return [key for (key,) in rows.columns("key")] if isinstance(rows, StoredRows) else [row.key for row in rows]


def texts_of(rows: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """Yield the text and the target of every row, and of its second example if it has one."""
    if isinstance(rows, StoredRows):
        for text, pair, target in rows.columns("input", "pair", "target"):
            yield (text if pair is None else f"{text} {pair}"), target
    elif isinstance(rows, JoinedRows):
        for part in rows.parts:
            yield from texts_of(part)
    else:
        yield from ((row.text, row.target) for row in with_auxiliary(rows))


def rows_digest(rows: Iterable[Sequence[str]]) -> str:
    """SHA-256 of `json.dumps([list(row) for row in rows])`, without the whole text in memory."""
    hasher = sha256(b"[")
    for number, row in enumerate(rows):
        hasher.update((", " if number else "").encode() + json.dumps(list(row)).encode())
    hasher.update(b"]")
    return hasher.hexdigest()


def store_rows(make: Callable[[], Iterable[Example]], key: str | None = None) -> Sequence[Example]:
    """Return the examples of a stream: a tuple of up to `IN_MEMORY`, else a table in the cache.

    Rows with texts or metadata that a table would change (half a surrogate pair, objects) are kept in a tuple.

    Args:
        make: Starts the stream; called once more if a table would change the rows.
        key: Digest of the source and of everything else that the rows depend on, under which a table is kept for the
            next call. Without one it is removed together with the sequence.

    Raises:
        StorageError: If the disk is full.
    """
    if key is not None and (found := cached_rows(key)) is not None:
        return found
    stream = iter(make())
    first = tuple(islice(stream, IN_MEMORY + 1))
    if len(first) <= IN_MEMORY:
        return first
    folder = cache_folder() / ROWS
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if key is None or not cache_limit():
        file = Path(tempfile.mkstemp(prefix=".rows-", suffix=".arrow", dir=folder)[1])
    else:
        file = Path(tempfile.mkstemp(prefix=f".{key}-", suffix=".arrow", dir=folder)[1])
    try:
        with writing(file):
            names = _write(file, chain(first, stream))
    except _UnsuitableError:
        file.unlink(missing_ok=True)
        return tuple(make())
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    if key is None or not cache_limit():
        rows = StoredRows(file, names)
        weakref.finalize(rows, _remove, file)
        return rows
    target = folder / f"{key}.arrow"
    with writing(target):
        # the record comes last: a table without one is not used
        file.replace(target)
        write_record(target.with_suffix(".json"), {"names": list(names), "table": file_digest(target)})
    remove_oldest(ROWS, keep=target)
    return StoredRows(target, names)


def cached_rows(key: str) -> StoredRows | None:
    """Rows of an earlier `store_rows` with the same key; None if there are none or the files are damaged."""
    target = cache_folder() / ROWS / f"{key}.arrow"
    record = target.with_suffix(".json")
    if not (target.exists() and record.exists()):
        return None
    try:
        known = read_json(record)
        if file_digest(target) != known["table"]:
            return None
        rows = StoredRows(target, known["names"])
    except (GraftworkError, OSError, KeyError, TypeError):
        return None
    mark_used(target)
    mark_used(record)
    return rows


class _UnsuitableError(Exception):
    """A row cannot be read back from a table as it was."""


def _write(file: Path, rows: Iterator[Example]) -> tuple[str, ...]:
    """Write rows to an Arrow file, in batches; return the names of their metadata fields."""
    from datasets import Features, List, Value  # pyright: ignore[reportMissingTypeStubs]
    from datasets.arrow_writer import ArrowWriter  # pyright: ignore[reportMissingTypeStubs]

    text = Value("large_string")
    features = Features({**dict.fromkeys(COLUMNS, text), "answers": List(text)})
    names: dict[str, None] = {}
    writer: Any
    with ArrowWriter(features=features, path=str(file), writer_batch_size=BATCH) as writer:
        while batch := list(islice(rows, BATCH)):
            encoded = [_encoded(row.metadata) for row in batch]
            for row in batch:
                names.update(dict.fromkeys(row.metadata))
            table: dict[str, list[Any]] = {
                "key": [row.key for row in batch],
                "input": [row.input for row in batch],
                "target": [row.target for row in batch],
                "pair": [row.pair for row in batch],
                "answers": [list(row.answers) for row in batch],
                "metadata": encoded,
            }
            try:
                writer.write_batch(table)
            except UnicodeEncodeError as error:
                raise _UnsuitableError from error
        writer.finalize()
    return tuple(names)


def _encoded(metadata: Mapping[str, Any]) -> str | None:
    if not metadata:
        return None
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise _UnsuitableError from error
    if _decoded(json.loads(text)) != metadata:
        raise _UnsuitableError
    return text


def _decoded(value: Any) -> Any:
    """Value of JSON with tuples for arrays; the metadata of examples is immutable."""
    if isinstance(value, list):
        return tuple(map(_decoded, cast("list[Any]", value)))
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in cast("dict[str, Any]", value).items()}
    return value


def _open(file: Path) -> Dataset:
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    return datasets.Dataset.from_file(str(file))


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
