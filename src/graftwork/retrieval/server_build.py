"""Loading of a corpus into a search server; an incomplete index never goes into service."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from graftwork.core.progress import Progress
from graftwork.errors import DataError
from graftwork.retrieval.analysis import ANALYSER
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.disk_space import check_disk_space
from graftwork.retrieval.retriever import Passage
from graftwork.retrieval.server_client import (
    ElasticsearchServer,
    OpenSearchServer,
    SearchClient,
    SearchServer,
    SearchServerError,
    ServerConnectionError,
    ServerResponseError,
    ServerTimeoutError,
    error_reason,
)
from graftwork.retrieval.server_index import (
    ElasticsearchIndex,
    OpenSearchIndex,
    SearchServerIndex,
    check_product,
    indexes_of,
    translated_errors,
    unfinished_indexes,
)
from graftwork.retrieval.server_record import (
    MAPPINGS,
    SCHEMA,
    check_analysis,
    commit_record,
    live_state,
    read_record,
    stored_digest,
    verification_error,
    write_record,
)

logger = logging.getLogger(__name__)

Index = TypeVar("Index", bound=SearchServerIndex)
_BUSY = (429, 503)
_EXISTS = 409
_MERGE_PAUSES = (0.0, 0.2, 1.0, 5.0, 15.0, 20.0, 30.0, 30.0)
"""Seconds before each merge: a server keeps deleted copies for replicas that it thinks might need them, for a while."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Settings of bulk loading."""

    batch: int = 500
    """Number of passages per request; lower it if the server rejects requests as too large."""
    retries: int = 8
    """Number of retries of rejected passages."""
    first_wait: float = 1.0
    """Seconds before the first retry; doubled for each further one, up to a minute."""
    replicas: int = 1
    """Number of replicas of each shard after loading; 0 for a single node."""
    shards: int = 1
    """Number of primary shards; 1 up to about 50 GB."""
    remove_old: bool = False
    """True deletes the previous index after the alias is switched; False keeps it for a rollback."""


def build_elasticsearch(
    corpus: str | Path, alias: str, server: ElasticsearchServer | None = None, *, loading: Loading | None = None
) -> ElasticsearchIndex:
    """Build an index of a corpus in Elasticsearch. See `build_on_server`."""
    return build_on_server(ElasticsearchIndex, corpus, alias, server, loading=loading)


def build_opensearch(
    corpus: str | Path, alias: str, server: OpenSearchServer | None = None, *, loading: Loading | None = None
) -> OpenSearchIndex:
    """Build an index of a corpus in OpenSearch. See `build_on_server`."""
    return build_on_server(OpenSearchIndex, corpus, alias, server, loading=loading)


def build_on_server(
    kind: type[Index],
    corpus: str | Path,
    alias: str,
    server: SearchServer | None = None,
    *,
    loading: Loading | None = None,
) -> Index:
    """Build an index of a corpus and put it into service; an interrupted build resumes.

    The new index has a versioned name. The alias is switched to it only after all passages were read back and their
    digest compared, and deleted copies of a resumed build were merged away, which would change the scores; until then
    the previous index remains in service.

    Args:
        kind: Class of the index.
        corpus: A `.tsv` or `.jsonl` file, a folder of them, or a glob pattern.
        alias: Alias of the index.
        server: Connection settings; None reads them from the environment.
        loading: Settings of bulk loading.

    Raises:
        DataError: If the corpus cannot be read or has no passage.
        DamagedIndexError: If the server analyses or scores passages differently.
        SearchServerError: If the server cannot be reached, rejects passages, stalls or has too little disk space.
        IncompleteIndexError: If the loaded passages differ from those sent.
    """
    how, target = loading or Loading(), server or kind.server_class.from_environment()
    reader = CorpusReader(find_corpus(corpus))
    client = target.connect()
    files: list[dict[str, Any]] = [{"name": path.name, "bytes": path.stat().st_size} for path in reader.files]
    with translated_errors(f"build {alias}", kind.server_class.product):
        check_product(client, kind.server_class.product)
        check_disk_space(client, sum(item["bytes"] for item in files))
        index, record = _begin(client, alias, files, how)
        check_analysis(client, index)
        _load(client, index, record, reader, how, target.timeout)
        if reader.count == 0:
            raise DataError(f"{reader.files[0]}: found no passage ({reader.malformed} malformed rows); expected some.")
        client.request("POST", f"/{index}/_refresh")
        _merge_deleted(client, index)
        _verify(client, index, reader)
        settings = {"index": {"number_of_replicas": how.replicas, "refresh_interval": None}}
        client.request("PUT", f"/{index}/_settings", body=settings)
        write_record(client, index, commit_record(record, live_state(client, index), reader.summary()))
        _switch(client, alias, index, how.remove_old)
    return kind(alias, target)


def _begin(client: SearchClient, alias: str, files: list[dict[str, Any]], how: Loading) -> tuple[str, dict[str, Any]]:
    for name in reversed(unfinished_indexes(client, alias)):
        record = read_record(client, name)
        if record.get("files") == files:
            logger.warning("Resuming %s, which has %s passages.", name, record.get("loaded", 0))
            client.request("PUT", f"/{name}/_settings", body={"index": {"blocks.read_only_allow_delete": None}})
            return name, record
    name = f"{alias}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{token_hex(4)}"
    record = {"schema": SCHEMA, "state": "building", "analyser": ANALYSER, "files": files, "loaded": 0}
    settings = {"number_of_shards": how.shards, "number_of_replicas": 0, "refresh_interval": "-1"}
    client.request("PUT", f"/{name}", body={"mappings": {**MAPPINGS, "_meta": record}, "settings": settings})
    return name, record


def _load(
    client: SearchClient,
    index: str,
    record: Mapping[str, Any],
    reader: CorpusReader,
    how: Loading,
    timeout: float,
) -> None:
    already = int(record.get("loaded", 0))
    # passages before `already` are read as well, because their digests count
    passages = (passage for passage in reader if reader.count > already)
    acknowledged, batches = already, 0
    with Progress(f"loaded into {index}", total=0) as progress:
        try:
            while batch := list(islice(passages, how.batch)):
                _send(client, index, batch, how)
                acknowledged += len(batch)
                batches += 1
                progress.advance(len(batch))
                if batches % 20 == 0:
                    _check_health(client, index)
                    # resume one batch earlier, because the last one may not be on disk
                    write_record(client, index, {**record, "loaded": max(already, acknowledged - how.batch)})
        except ServerTimeoutError as error:
            raise SearchServerError(
                f"{index} stalled: no passage was acknowledged for {timeout:g} s, after {acknowledged}. Check the "
                "server's log, then run the same command again to resume."
            ) from error
        except ServerConnectionError as error:
            raise SearchServerError(
                f"{index} was interrupted after {acknowledged} passages: {error}. Start the server again, then run the "
                "same command to resume."
            ) from error
        except ServerResponseError as error:
            raise SearchServerError(
                f"{index} accepted no more passages after {acknowledged}: {error}. Run the same command again to "
                "resume."
            ) from error
    _check_health(client, index)


def _send(client: SearchClient, index: str, batch: Sequence[Passage], how: Loading) -> None:
    """Send passages, and those again that a busy server has rejected.

    Raises:
        SearchServerError: If one is rejected for another reason, or too often.
    """
    left = list(batch)
    for attempt in range(how.retries + 1):
        try:
            reply = client.request("POST", f"/{index}/_bulk", body=list(_bulk_lines(left)))
        except ServerResponseError as error:
            if error.status not in _BUSY or attempt == how.retries:
                raise
        else:
            rejected: list[Passage] = []
            for passage, item in zip(left, reply["items"], strict=True):
                result = item["create"]
                # a passage that exists was sent before an interruption; it is compared with all others at the end
                if int(result["status"]) < 300 or int(result["status"]) == _EXISTS:
                    continue
                if int(result["status"]) not in _BUSY or attempt == how.retries:
                    raise _rejected(index, result)
                rejected.append(passage)
            left = rejected
            if not left:
                return
        time.sleep(min(60.0, how.first_wait * 2**attempt))


def _bulk_lines(passages: Sequence[Passage]) -> Iterator[dict[str, Any]]:
    for passage in passages:
        # an existing passage is not written again: its old copy would count in document frequencies
        yield {"create": {"_id": passage.id}}
        yield {"id": passage.id, "title": passage.title, "txt": passage.text}


def _rejected(index: str, result: Mapping[str, Any]) -> SearchServerError:
    why = error_reason(result.get("error", result))
    full = "block" in why or "watermark" in why
    hint = "Its disk is full: free some space" if full else "Fix the passage"
    return SearchServerError(
        f"{index} rejected passage {result.get('_id')!r} (status {result.get('status')}): {why}. {hint}, then run the "
        "same command again to resume."
    )


def _check_health(client: SearchClient, index: str) -> None:
    """Raise if the index is read-only or has lost a shard."""
    blocks = client.request("GET", f"/{index}/_settings", params={"flat_settings": "true"})[index]["settings"]
    for name in ("index.blocks.read_only_allow_delete", "index.blocks.write", "index.blocks.read_only"):
        if str(blocks.get(name, "false")) == "true":
            raise SearchServerError(
                f"{index} was made read-only by the server ({name}), as it does when the disk is nearly full. Free "
                "some space, then run the same command again to resume."
            )
    if client.request("GET", f"/_cluster/health/{index}")["status"] == "red":
        raise SearchServerError(
            f"{index} is red: a shard is lost. Check the server's log, then run the same command again."
        )


def _merge_deleted(client: SearchClient, index: str) -> None:
    """Merge deleted copies away, which an interrupted build of an earlier version may have left: they count in scores.

    Raises:
        IncompleteIndexError: If the server keeps some.
    """
    for pause in _MERGE_PAUSES:
        if not _deleted(client, index):
            return
        time.sleep(pause)
        client.request("POST", f"/{index}/_flush")
        try:
            client.request("POST", f"/{index}/_forcemerge", params={"max_num_segments": "1"})
        except ServerTimeoutError:
            # the merge goes on without the connection
            _wait_for_merges(client, index)
        client.request("POST", f"/{index}/_refresh")
    if found := _deleted(client, index):
        raise verification_error(index, f"it holds {found} deleted copies after a merge, which change its scores")


def _deleted(client: SearchClient, index: str) -> int:
    return int(_primaries(client, index, "docs")["docs"]["deleted"])


def _wait_for_merges(client: SearchClient, index: str) -> None:
    with Progress(f"merging {index}", total=0):
        while int(_primaries(client, index, "merge")["merges"]["current"]):
            time.sleep(1.0)


def _primaries(client: SearchClient, index: str, metric: str) -> Mapping[str, Any]:
    return client.request("GET", f"/{index}/_stats/{metric}")["indices"][index]["primaries"]


def _verify(client: SearchClient, index: str, reader: CorpusReader) -> None:
    """Read all passages back, and compare their number and digest with those of the corpus."""
    expected = f"it holds {{}} passages of {reader.count} sent and acknowledged"
    count = int(client.request("GET", f"/{index}/_count")["count"])
    if count != reader.count:
        raise verification_error(index, expected.format(count))
    count, digest = stored_digest(client, index)
    if count != reader.count:
        raise verification_error(index, expected.format(count))
    if digest != int(reader.summary()["digest"], 16):
        raise verification_error(index, "the digest of its passages differs from that of the corpus")


def _switch(client: SearchClient, alias: str, index: str, remove_old: bool) -> None:
    old = indexes_of(client, alias)
    if alias in old:
        raise verification_error(
            index, f"{alias} is the name of an index, not of an alias. Choose another name, or remove that index"
        )
    actions: list[dict[str, Any]] = [{"remove": {"index": name, "alias": alias}} for name in old]
    client.request("POST", "/_aliases", body={"actions": [*actions, {"add": {"index": index, "alias": alias}}]})
    if remove_old and old:
        client.request("DELETE", f"/{','.join(old)}")
    elif old:
        logger.warning("%s now points to %s; the previous index is kept: %s.", alias, index, ", ".join(old))
