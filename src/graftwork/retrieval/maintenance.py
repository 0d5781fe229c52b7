"""Build, update and search of an index in one call, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from graftwork.core.messages import say
from graftwork.errors import ConfigError
from graftwork.retrieval import Retriever, open_index
from graftwork.retrieval.corpus import CorpusReader, add_digest, find_corpus
from graftwork.retrieval.opening import BACKENDS, SERVERS, unknown_backend
from graftwork.retrieval.retriever import DamagedIndexError

_ADD_BATCH = 10_000


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
    verify: bool = False,
    retriever: str | None = None,
    encoder: str | None = None,
    split_tokens: int | None = None,
    overlap: int | None = None,
    tokenizer: str | None = None,
) -> Any:
    """Build or add, delete, then verify or search.

    Args:
        corpus: Corpus to index or to add; None for an existing index.
        output: Folder or alias of the index.
        backend: embedded, opensearch or elasticsearch.
        overwrite: Replace a complete index.
        add: Add the corpus to an existing embedded index.
        delete: Ids of passages to delete.
        queries: Queries to search for.
        k: Number of hits per query.
        allow_incomplete: Open an index whose build was not completed.
        verify: Read all files of an embedded index and compare them with its digests and checksums.
        retriever: bm25, dense or hybrid; None takes what the index was built for.
        encoder: Encoder with which vectors for dense or hybrid retrieval are built; None builds none.
        split_tokens: Maximum number of tokens of the passages that documents are split into; None splits none. The
            passages are written to `OUTPUT.passages.jsonl`, from which a bank can be built.
        overlap: Number of tokens that a passage repeats of the one before; None takes the default.
        tokenizer: Tokenizer that counts these tokens.

    Returns:
        Hits of the queries; a summary of the index without queries.

    Raises:
        ConfigError: If the arguments exclude each other or name no action.
    """
    if not output:
        raise ConfigError("Found no index to write or read. Name its folder with -o.")
    if backend not in BACKENDS:
        raise unknown_backend(backend)
    if backend in SERVERS and (add or delete):
        raise ConfigError("--add and --delete change embedded indexes. Build the index in the search server again.")
    if backend in SERVERS and verify:
        raise ConfigError("--verify reads the files of embedded indexes. Search servers verify their own.")
    if corpus is None and not (delete or queries or verify or encoder):
        raise ConfigError("Found nothing to do. Name a corpus to index, or --delete, --query, --verify or --encoder.")
    if encoder is not None and (backend in SERVERS or retriever not in ("dense", "hybrid")):
        raise ConfigError(
            f"Found --encoder with {backend} and retriever {retriever}; expected an embedded index and --retriever "
            "dense or hybrid, which use its vectors."
        )
    passages = corpus
    if split_tokens is None and (overlap is not None or tokenizer is not None):
        raise ConfigError("Found --overlap or --tokenizer without --split-tokens, which they belong to. Add it.")
    if split_tokens is not None:
        passages = _split(corpus, output, split_tokens, overlap, tokenizer)
    if passages is not None:
        _add(passages, output) if add else _build(passages, output, backend, overwrite)
    if delete:
        say(f"Deleted {_embedded(output).delete(delete)} of {len(delete)} passages.")
    if verify:
        say(f"Verified {verify_embedded(output)} files of {output}.")
    if encoder is not None:
        from graftwork.retrieval.vector_index import build_vectors

        say(f"Vectors of {len(build_vectors(output, encoder, str(retriever)))} passages are next to {output}.")
    index = open_index(output, backend, retriever=retriever, allow_incomplete=allow_incomplete)
    if warning := getattr(index, "warning", None):
        say(f"Warning: {warning}.")
    return _hits(index, queries, k) if queries else _contents(index)


def _split(corpus: str | None, output: str, tokens: int, overlap: int | None, tokenizer: str | None) -> str:
    from graftwork.retrieval.splitting import OVERLAP, split_corpus

    if corpus is None or tokenizer is None:
        raise ConfigError("Found --split-tokens without a corpus or --tokenizer; expected both. Name them.")
    file = Path(f"{output}.passages.jsonl")
    documents, passages = split_corpus(corpus, file, tokenizer, tokens, OVERLAP if overlap is None else overlap)
    say(f"Split {documents} documents into {passages} passages; wrote {file}")
    return str(file)


def _build(corpus: str, output: str, backend: str, overwrite: bool) -> None:
    if backend == "embedded":
        from graftwork.retrieval.embedded import build_embedded

        index: Any = build_embedded(corpus, output, overwrite=overwrite)
    else:
        from graftwork.retrieval import server_build

        build = {"elasticsearch": server_build.build_elasticsearch, "opensearch": server_build.build_opensearch}
        index = build[backend](corpus, output)
    malformed = index.record["source"]["malformed"]
    if malformed:
        say(f"Left out {malformed} malformed rows, such as: {'; '.join(index.record.get('complaints', []))}")
    say(f"Indexed {len(index)} passages; wrote {output}")


def _add(corpus: str, output: str) -> None:
    index, reader, added = _embedded(output), CorpusReader(find_corpus(corpus)), 0
    passages = iter(reader)
    while batch := list(islice(passages, _ADD_BATCH)):
        added += index.add(batch)
    say(f"Added {added} passages, replaced {reader.count - added}, left out {reader.malformed} malformed rows.")


def verify_embedded(folder: str | Path) -> int:
    """Read every file of an index, compare it with its digest and its checksum, and read every passage.

    Returns:
        Number of files.

    Raises:
        ConfigError: If the folder holds no index.
        IncompleteIndexError: If the index is incomplete or does not match its commit record.
        DamagedIndexError: If a file or the passages differ from the commit record.
    """
    from graftwork.retrieval.embedded import EmbeddedIndex
    from graftwork.retrieval.index_storage import committed_files

    index = EmbeddedIndex(folder, verify=True)
    total = 0
    for passage in index.all_passages():
        total = add_digest(total, passage)
    if "pending" not in index.record and f"{total:032x}" != index.record["source"]["digest"]:
        raise DamagedIndexError(
            f"{folder} holds other passages than its commit record lists. Restore the index from a copy, or build it "
            "again with --overwrite."
        )
    return len(committed_files(Path(folder)))


def _embedded(output: str) -> Any:
    # with its vectors, if it has some
    return open_index(output, "embedded")


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
