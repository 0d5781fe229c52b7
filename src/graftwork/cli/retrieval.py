"""`graftwork index` and the part of `graftwork prepare` that finds passages for questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.messages import say
from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, UnknownNameError
from graftwork.retrieval import Retriever, open_index
from graftwork.retrieval.corpus import CorpusReader, find_corpus

_ADDED_AT_ONCE = 10_000


def index_passages(
    corpus: str | None,
    output: str,
    backend: str,
    *,
    overwrite: bool,
    add: bool,
    delete: Sequence[str],
    queries: Sequence[str],
    k: int,
    allow_incomplete: bool,
) -> Any:
    """Do what was asked, in the order build or add, delete, search; returns hits, or what the index holds."""
    if not output:
        raise ConfigError("Found no index to write or read. Name its folder with -o.")
    if backend not in ("embedded", "elasticsearch"):
        raise ConfigError(f"Found backend {backend!r}; expected embedded or elasticsearch.")
    if backend == "elasticsearch" and (add or delete):
        raise ConfigError("--add and --delete change embedded indexes. Build the index in Elasticsearch anew.")
    if corpus is None and not (delete or queries):
        raise ConfigError("Found nothing to do. Name a corpus to index, or --delete or --query.")
    if corpus is not None:
        _add(corpus, output) if add else _build(corpus, output, backend, overwrite)
    if delete:
        say(f"Took out {_embedded(output).delete(delete)} of {len(delete)} passages.")
    index = open_index(output, backend, allow_incomplete=allow_incomplete)
    if warning := getattr(index, "warning", None):
        say(f"Warning: {warning}.")
    return _hits(index, queries, k) if queries else _contents(index)


def augment_questions(
    tasks: Sequence[str],
    *,
    input: str,
    output: str,
    split: str,
    index: str | None,
    backend: str,
    top_k: int,
    start: int | None,
    end: int | None,
    merge: Sequence[str],
    held_out: Sequence[str],
) -> list[dict[str, Any]]:
    """Write `<output>/<set>/<split>.json` for every task; a slice of it under a name of its own."""
    from graftwork.tasks.augmentation import Augmented, augment, check_leakage, merge_augmented
    from graftwork.tasks.multihop import DATASETS

    names = [name.removeprefix("multihop/") for name in tasks]
    if unknown := [name for name in names if name not in DATASETS]:
        raise UnknownNameError("multihop task", unknown[0], DATASETS)
    if merge and (len(names) != 1 or index is not None):
        raise ConfigError("--merge puts the slices of one task together. Name one task, and leave --index out.")
    if not merge and index is None:
        return [_questions(name, input, output, split) for name in names]
    written: list[Augmented] = []
    for name in names:
        cut = "" if merge or (start is None and end is None) else f".{start or 0}-{'end' if end is None else end}"
        path = Path(output) / name / f"{split}{cut}.json"
        if merge:
            written.append(merge_augmented([Path(file) for file in merge], path))
        else:
            retriever = open_index(str(index), backend)
            with Progress(f"passages for {name}", total=0) as progress:
                written.append(
                    augment(
                        DATASETS[name],
                        Path(input),
                        path,
                        retriever,
                        split=split,
                        top_k=top_k,
                        start=start,
                        end=end,
                        engine=backend,
                        progress=progress.advance,
                    )
                )
        check_leakage(path, [Path(file) for file in held_out])
    say(f"Wrote {', '.join(str(done.path) for done in written)}")
    return [to_plain(done) for done in written]


def _questions(name: str, input: str, output: str, split: str) -> dict[str, Any]:
    """Questions alone, in the text-to-text form that every task reader reads."""
    from graftwork.tasks import get_task
    from graftwork.tasks.sources import write_json_lines

    examples = get_task(f"multihop/{name}").load(Path(input), split)
    path = Path(output) / f"{name}_{split}.jsonl"
    write_json_lines(
        path,
        (
            {
                "dataset": name,
                "split": split,
                "id": row.key,
                "input": row.input,
                "ans": row.target,
                "all_answers": list(row.answers),
                "split_size": examples.size,
            }
            for row in examples.rows
        ),
    )
    say(f"Wrote {path}")
    return {"path": str(path), "questions": len(examples.rows), "passages": 0}


def _build(corpus: str, output: str, backend: str, overwrite: bool) -> None:
    if backend == "embedded":
        from graftwork.retrieval.embedded import build_embedded

        index: Any = build_embedded(corpus, output, overwrite=overwrite)
    else:
        from graftwork.retrieval.elasticsearch_build import build_elasticsearch

        index = build_elasticsearch(corpus, output)
    malformed = index.record["source"]["malformed"]
    if malformed:
        say(f"Left out {malformed} malformed rows, such as: {'; '.join(index.record.get('complaints', []))}")
    say(f"Indexed {len(index)} passages; wrote {output}")


def _add(corpus: str, output: str) -> None:
    index, reader, added = _embedded(output), CorpusReader(find_corpus(corpus)), 0
    passages = iter(reader)
    while batch := list(islice(passages, _ADDED_AT_ONCE)):
        added += index.add(batch)
    say(f"Added {added} passages, replaced {reader.count - added}, left out {reader.malformed} malformed rows.")


def _embedded(output: str) -> Any:
    from graftwork.retrieval.embedded import EmbeddedIndex

    return EmbeddedIndex(output)


def _hits(index: Retriever, queries: Sequence[str], k: int) -> list[dict[str, Any]]:
    return [
        {
            "query": query,
            "rank": hit.rank,
            "id": hit.id,
            "title": hit.title,
            "score": round(hit.score, 6),
            "text": hit.text,
        }
        for query, hits in zip(queries, index.search(queries, k), strict=True)
        for hit in hits
    ]


def _contents(index: Any) -> dict[str, Any]:
    return {"passages": len(index), "fingerprint": index.index_fingerprint(), "state": index.record["state"]}
