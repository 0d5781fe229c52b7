"""Merging of the small data files that appends leave, and removal of deleted records.

Both run under the writer lock and end in a commit; readers keep the versions that they have open.
"""

from __future__ import annotations

from typing import Any

from graftwork.methods.regrad.bank import files
from graftwork.methods.regrad.bank.records import remove

MERGE_FRAGMENTS = 256
"""Number of small fragments that triggers a merge: every commit rewrites the list of all fragments before it."""
_MERGED_ROWS, _MERGED_BYTES = 4096, 1 << 30
"""Size from which a fragment is not merged again, so that a record is rewritten a bounded number of times."""


def is_merge_due(records: Any, ids: Any, stride: int, fragments: int | None = None) -> bool:
    """True if one of the datasets of a bank has too many small fragments.

    Args:
        records: Lance dataset of the records.
        ids: Lance dataset of the ids.
        stride: Number of bytes of one encoded gradient.
        fragments: Number of small fragments from which a merge is due; `MERGE_FRAGMENTS` if omitted.
    """
    return any(
        sum(one.physical_rows < rows for one in dataset.get_fragments()) >= (fragments or MERGE_FRAGMENTS)
        for dataset, rows in ((records, _merged_rows(stride)), (ids, _MERGED_ROWS))
    )


def merge(records: Any, ids: Any, stride: int) -> None:
    """Merge the small fragments of both datasets, and cover all rows by the indexes.

    Args:
        records: Lance dataset of the records.
        ids: Lance dataset of the ids.
        stride: Number of bytes of one encoded gradient.
    """
    for dataset, rows in ((records, _merged_rows(stride)), (ids, _MERGED_ROWS)):
        # first, because Lance does not merge fragments inside the index with those outside
        dataset.optimize.optimize_indices()
        dataset.optimize.compact_files(target_rows_per_fragment=rows)
        dataset.checkout_latest()


def _merged_rows(stride: int) -> int:
    return max(2, min(_MERGED_ROWS, _MERGED_BYTES // max(1, stride)))


def remove_deleted(records: Any, ids: Any, *, rebuild: bool = False) -> None:
    """Remove records that no id refers to, and the deleted rows of both datasets from their files.

    Args:
        records: Lance dataset of the records.
        ids: Lance dataset of the ids.
        rebuild: Build the indexes anew; otherwise they keep deleted keys.
    """
    used = set(ids.to_table(columns=["key"])["key"].to_pylist())
    orphans = [key for key in records.to_table(columns=["key"])["key"].to_pylist() if key not in used]
    remove(records, "key", orphans)
    for dataset, column in ((records, "key"), (ids, "id")):
        dataset.optimize.optimize_indices()
        dataset.optimize.compact_files(materialize_deletions_threshold=0)
        dataset.checkout_latest()
        if rebuild:
            dataset.create_scalar_index(column, "BTREE", replace=True)


def holds_deleted(dataset: Any) -> bool:
    """True if files of a dataset contain deleted rows."""
    return any(one.num_deletions for one in dataset.get_fragments())


def is_removal_due(records: Any, ids: Any) -> bool:
    """True if files contain deleted rows, or records that no id refers to."""
    if holds_deleted(records) or holds_deleted(ids):
        return True
    return int(records.count_rows()) > len(set(ids.to_table(columns=["key"])["key"].to_pylist()))


def clean(dataset: Any, tag_lifetime: Any, *, all_tags: bool = False) -> None:
    """Remove the files of old versions, except those that a reader has open.

    Args:
        dataset: Lance dataset.
        tag_lifetime: Age after which a reader's tag counts as stale.
        all_tags: Remove the versions of readers too; they then move to the newest state.
    """
    if all_tags:
        files.drop_reader_tags(dataset)
    files.drop_stale_tags(dataset, tag_lifetime)
    files.clean_up(dataset)
