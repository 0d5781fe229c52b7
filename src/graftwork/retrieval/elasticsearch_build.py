"""Loading of a corpus into Elasticsearch; an incomplete index never goes into service."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.core.progress import Progress
from graftwork.errors import DataError
from graftwork.retrieval.corpus import CorpusReader, find_corpus
from graftwork.retrieval.elasticsearch import (
    MAPPINGS,
    ElasticsearchError,
    ElasticsearchIndex,
    Server,
    error_reason,
    first_line,
    indexes_of,
    new_name,
    new_record,
    read_record,
    translated_errors,
    unfinished_indexes,
    verification_error,
    write_record,
)
from graftwork.retrieval.retriever import Passage

logger = logging.getLogger(__name__)

INDEX_SHARE = 0.85
"""Ratio of index size to text size, measured on DPR's corpus."""
SAFETY_PERCENT = 5.0
"""Percentage of the disk kept free in addition to the high watermark."""


@dataclass(frozen=True, slots=True)
class Loading:
    """Settings of bulk loading."""

    batch: int = 500
    """Number of passages per request; lower it if the server rejects requests as too large."""
    retries: int = 8
    """Number of retries of rejected passages."""
    first_wait: float = 1.0
    """Seconds before the first retry; doubled for each further one, up to a minute."""
    sample: int = 1000
    """Number of passages read back and compared after loading."""
    replicas: int = 1
    """Number of replicas of each shard after loading; 0 for a single node."""
    shards: int = 1
    """Number of primary shards; 1 up to about 50 GB."""
    remove_old: bool = False
    """True deletes the previous index after the alias is switched; False keeps it for a rollback."""


@dataclass(slots=True)
class _Sample:
    """Uniform reservoir sample of the sent passages, plus the first and the last passage."""

    size: int
    first: Passage | None = None
    last: Passage | None = None
    seen: int = 0
    kept: list[Passage] = field(default_factory=list[Passage])
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, passage: Passage) -> None:
        self.first = self.first or passage
        self.last = passage
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(passage)
        elif (place := self.draw.randrange(self.seen)) < self.size:
            self.kept[place] = passage

    def passages(self) -> dict[str, Passage]:
        return {passage.id: passage for passage in (*self.kept, self.first, self.last) if passage is not None}


def build_elasticsearch(
    corpus: str | Path,
    alias: str,
    server: Server | None = None,
    *,
    loading: Loading | None = None,
) -> ElasticsearchIndex:
    """Build an index of a corpus and put it into service; an interrupted build resumes.

    The new index has a versioned name. The alias is switched to it only after the passages are counted and a sample is
    read back; until then the previous index remains in service.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder of them, or a glob pattern.
        alias: Alias of the index.
        server: Connection settings; None reads them from the environment.
        loading: Settings of bulk loading.

    Raises:
        DataError: If the corpus cannot be read or has no passage.
        ElasticsearchError: If the server cannot be reached, rejects passages, stalls or has too little disk space.
        IncompleteIndexError: If the loaded passages differ from those sent.
    """
    how, target = loading or Loading(), server or Server.from_environment()
    reader = CorpusReader(find_corpus(corpus))
    client = target.connect()
    files: list[dict[str, Any]] = [{"name": path.name, "bytes": path.stat().st_size} for path in reader.files]
    with translated_errors(f"build {alias}"):
        check_disk_space(client, sum(item["bytes"] for item in files))
        index, record = _begin(client, alias, files, how)
        sample = _Sample(how.sample)
        _load(client, index, record, reader, sample, how, target.timeout)
        if reader.count == 0:
            raise DataError(f"{reader.files[0]}: found no passage ({reader.malformed} malformed rows); expected some.")
        _verify(client, index, reader, sample)
        source = {**reader.summary()}
        committed = {**record, "state": "complete", "count": reader.count, "source": source, "loaded": reader.count}
        client.indices.put_settings(
            index=index, settings={"index": {"number_of_replicas": how.replicas, "refresh_interval": None}}
        )
        write_record(client, index, committed)
        _switch(client, alias, index, how.remove_old)
    return ElasticsearchIndex(alias, target)


def check_disk_space(client: Any, source_bytes: int) -> None:
    """Check that the index fits on a node without exceeding the high watermark of its disk.

    Raises:
        ElasticsearchError: If no node has enough space; the message states the required and the free space.
    """
    settings = client.cluster.get_settings(include_defaults=True, flat_settings=True).body
    flat = {
        key: value for part in ("defaults", "persistent", "transient") for key, value in settings.get(part, {}).items()
    }
    prefix = "cluster.routing.allocation.disk."
    if str(flat.get(f"{prefix}threshold_enabled", "true")).lower() == "false":
        return
    nodes = client.nodes.stats(metric="fs")["nodes"].values()
    needed = source_bytes * INDEX_SHARE
    free: list[float] = []
    for node in nodes:
        total = node["fs"]["total"]["total_in_bytes"]
        reserve = reserved_bytes(
            str(flat.get(f"{prefix}watermark.high", "90%")), total, flat.get(f"{prefix}watermark.high.max_headroom")
        )
        free.append(node["fs"]["total"]["available_in_bytes"] - reserve - total * SAFETY_PERCENT / 100)
    if free and max(free) < needed:
        raise ElasticsearchError(
            f"The index will take about {needed / 1e9:.1f} GB; no node has more than {max(max(free), 0) / 1e9:.1f} GB "
            "free above its high watermark. Free some space or add a node."
        )


def reserved_bytes(watermark: str, total: float, headroom: Any) -> float:
    """Number of bytes that must stay free.

    Args:
        watermark: Used share of the disk (90%, 0.9), or free space (100gb).
        total: Size of the disk in bytes.
        headroom: Upper limit of the reserve for a percentage; None or -1 for the server's default, 150 GB above 1 TB.
    """
    if watermark.endswith("%"):
        share = total * (1 - float(watermark[:-1]) / 100)
        limit = _bytes(str(headroom)) if headroom and str(headroom) != "-1" else (150e9 if total > 1e12 else share)
        return min(share, limit)
    try:
        return total * (1 - float(watermark)) if float(watermark) <= 1 else float(watermark)
    except ValueError:
        return _bytes(watermark)


def _bytes(text: str) -> float:
    for unit, size in (("tb", 1 << 40), ("gb", 1 << 30), ("mb", 1 << 20), ("kb", 1 << 10), ("b", 1)):
        if text.lower().endswith(unit):
            return float(text[: -len(unit)]) * size
    return float(text)


def _begin(client: Any, alias: str, files: list[dict[str, Any]], how: Loading) -> tuple[str, dict[str, Any]]:
    for name in reversed(unfinished_indexes(client, alias)):
        record = read_record(client, name)
        if record.get("files") == files:
            logger.warning("Resuming %s, which has %s passages.", name, record.get("loaded", 0))
            client.indices.put_settings(index=name, settings={"index": {"blocks.read_only_allow_delete": None}})
            return name, record
    name, record = new_name(alias), new_record(files)
    client.indices.create(
        index=name,
        mappings={**MAPPINGS, "_meta": record},
        settings={"number_of_shards": how.shards, "number_of_replicas": 0, "refresh_interval": "-1"},
    )
    return name, record


def _load(
    client: Any, index: str, record: dict[str, Any], reader: CorpusReader, sample: _Sample, how: Loading, timeout: float
) -> None:
    from elasticsearch import ApiError, ConnectionTimeout
    from elasticsearch.helpers import streaming_bulk

    already = int(record.get("loaded", 0))

    def actions() -> Iterator[dict[str, Any]]:
        for passage in reader:
            sample.add(passage)
            if reader.count > already:
                source = {"id": passage.id, "title": passage.title, "txt": passage.text}
                yield {"_id": passage.id, "_source": source}

    acknowledged = already
    with Progress(f"loaded into {index}", total=0) as progress:
        try:
            results = streaming_bulk(
                client,
                actions(),
                index=index,
                chunk_size=how.batch,
                max_retries=how.retries,
                initial_backoff=how.first_wait,
                max_backoff=60,
                raise_on_error=False,
                raise_on_exception=True,
                retry_on_status=(429, 503),
            )
            for good, item in results:
                if not good:
                    raise _rejected(index, item)
                acknowledged += 1
                progress.advance(1)
                if acknowledged % (how.batch * 20) == 0:
                    _check_health(client, index)
                    # resume one batch earlier, because batches may be acknowledged out of order
                    write_record(client, index, {**record, "loaded": max(already, acknowledged - how.batch)})
        except ConnectionTimeout as error:
            raise ElasticsearchError(
                f"{index} stalled: no passage was acknowledged for {timeout:g} s, after {acknowledged}. Check the "
                "server's log, then run the same command again to resume."
            ) from error
        except ApiError as error:
            raise ElasticsearchError(
                f"{index} accepted no more passages after {acknowledged}: {first_line(error)}. Run the same "
                "command again to resume."
            ) from error
    _check_health(client, index)


def _rejected(index: str, item: Mapping[str, Any]) -> ElasticsearchError:
    (result,) = item.values()
    why = error_reason(result.get("error", result))
    full = "block" in why or "watermark" in why
    hint = "Its disk is full: free some space" if full else "Fix the passage"
    return ElasticsearchError(
        f"{index} rejected passage {result.get('_id')!r} (status {result.get('status')}): {why}. {hint}, then run the "
        "same command again to resume."
    )


def _check_health(client: Any, index: str) -> None:
    """Raise if the index is read-only or has lost a shard."""
    blocks = client.indices.get_settings(index=index, flat_settings=True)[index]["settings"]
    for name in ("index.blocks.read_only_allow_delete", "index.blocks.write", "index.blocks.read_only"):
        if str(blocks.get(name, "false")) == "true":
            raise ElasticsearchError(
                f"{index} was made read-only by the server ({name}), as it does when the disk is nearly full. Free "
                "some space, then run the same command again to resume."
            )
    if client.cluster.health(index=index)["status"] == "red":
        raise ElasticsearchError(
            f"{index} is red: a shard is lost. Check the server's log, then run the same command again."
        )


def _verify(client: Any, index: str, reader: CorpusReader, sample: _Sample) -> None:
    client.indices.refresh(index=index)
    count = int(client.count(index=index)["count"])
    if count != reader.count:
        raise verification_error(index, f"it holds {count} passages of {reader.count} sent and acknowledged")
    expected = sample.passages()
    names = list(expected)
    for start in range(0, len(names), 500):
        for found in client.mget(index=index, ids=names[start : start + 500])["docs"]:
            passage = expected[found["_id"]]
            source: dict[str, Any] = found.get("_source") or {}
            if (source.get("title"), source.get("txt")) != (passage.title, passage.text):
                raise verification_error(index, f"passage {passage.id!r} is missing or differs from the passage sent")


def _switch(client: Any, alias: str, index: str, remove_old: bool) -> None:
    old = indexes_of(client, alias)
    if alias in old:
        raise verification_error(
            index, f"{alias} is the name of an index, not of an alias. Choose another name, or remove that index"
        )
    actions: list[dict[str, Any]] = [{"remove": {"index": name, "alias": alias}} for name in old]
    client.indices.update_aliases(actions=[*actions, {"add": {"index": index, "alias": alias}}])
    if remove_old and old:
        client.indices.delete(index=",".join(old))
    elif old:
        logger.warning("%s now points to %s; the previous index is kept: %s.", alias, index, ", ".join(old))
