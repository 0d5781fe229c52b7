"""Loading a corpus into Elasticsearch so that a partial index can never be taken for a whole one."""

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
    asking,
    base_seal,
    behind,
    building,
    new_name,
    read_seal,
    reason,
    refuse,
    short,
    write_seal,
)
from graftwork.retrieval.retriever import Passage

logger = logging.getLogger(__name__)

INDEX_SHARE = 0.85
"""Size of an index over size of its text, as DPR's corpus gives it."""
SAFETY_PERCENT = 5.0


@dataclass(frozen=True, slots=True)
class Loading:
    """How passages are sent."""

    batch: int = 500
    """Passages in one request."""
    retries: int = 8
    """Times that rejected passages are sent again."""
    first_wait: float = 1.0
    """Seconds before the first of these; doubled each time, at most a minute."""
    sample: int = 1000
    """Passages read back and compared after loading."""
    replicas: int = 1
    """Copies of each shard once the index is in service."""
    shards: int = 1
    remove_old: bool = False
    """Delete the index that was in service once the new one is."""


@dataclass(slots=True)
class _Sample:
    """A fair sample of what was sent, with the first and the last passage always in it."""

    size: int
    first: Passage | None = None
    last: Passage | None = None
    seen: int = 0
    kept: list[Passage] = field(default_factory=list)
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
    """Build an index of a corpus and put it into service; run again after a stop, it goes on where it was.

    The new index has a name of its own. Only when every passage is counted and a sample is read back does the alias
    lead to it; until then whatever was in service stays so.

    Args:
        corpus: A `.tsv` or `.jsonl` file, a folder or a pattern of them.
        alias: Name under which the index will be in service.
        server: How to reach the server; by default as the environment says.
        loading: How passages are sent.

    Raises:
        DataError: If the corpus cannot be read or has no passage.
        ElasticsearchError: If the server cannot be reached, rejects passages, stalls or has no room.
        IncompleteIndexError: If it holds something else than was sent.
    """
    how, target = loading or Loading(), server or Server.from_environment()
    reader = CorpusReader(find_corpus(corpus))
    client = target.connect()
    files = [{"name": path.name, "bytes": path.stat().st_size} for path in reader.files]
    with asking(f"build {alias}"):
        check_room(client, sum(item["bytes"] for item in files))
        index, seal = _begin(client, alias, files, how)
        sample = _Sample(how.sample)
        _load(client, index, seal, reader, sample, how, target.timeout)
        if reader.count == 0:
            raise DataError(f"{reader.files[0]}: found no passage ({reader.malformed} malformed rows); expected some.")
        _verify(client, index, reader, sample)
        source = {**reader.summary()}
        sealed = {**seal, "state": "complete", "count": reader.count, "source": source, "loaded": reader.count}
        client.indices.put_settings(
            index=index, settings={"index": {"number_of_replicas": how.replicas, "refresh_interval": None}}
        )
        write_seal(client, index, sealed)
        _switch(client, alias, index, how.remove_old)
    return ElasticsearchIndex(alias, target)


def check_room(client: Any, source_bytes: int) -> None:
    """Refuse to begin where the index would fill a disk beyond the high watermark.

    Raises:
        ElasticsearchError: If the projected free space is too small; says how much there is and how much is needed.
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
    rooms = []
    for node in nodes:
        total = node["fs"]["total"]["total_in_bytes"]
        reserve = _reserve(
            str(flat.get(f"{prefix}watermark.high", "90%")), total, flat.get(f"{prefix}watermark.high.max_headroom")
        )
        rooms.append(node["fs"]["total"]["available_in_bytes"] - reserve - total * SAFETY_PERCENT / 100)
    if rooms and max(rooms) < needed:
        raise ElasticsearchError(
            f"The index will take about {needed / 1e9:.1f} GB; no node has more than {max(max(rooms), 0) / 1e9:.1f} GB "
            "free above its high watermark. Free some space or add a node."
        )


def _reserve(watermark: str, total: float, headroom: Any) -> float:
    """Bytes that must stay free; a watermark is a share of the disk that is used, or an amount that is free."""
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
    for name in reversed(building(client, alias)):
        seal = read_seal(client, name)
        if seal.get("files") == files:
            logger.warning("Going on with %s, of which %s passages are loaded.", name, seal.get("loaded", 0))
            client.indices.put_settings(index=name, settings={"index": {"blocks.read_only_allow_delete": None}})
            return name, seal
    name, seal = new_name(alias), base_seal(files)
    client.indices.create(
        index=name,
        mappings={**MAPPINGS, "_meta": seal},
        settings={"number_of_shards": how.shards, "number_of_replicas": 0, "refresh_interval": "-1"},
    )
    return name, seal


def _load(
    client: Any, index: str, seal: dict[str, Any], reader: CorpusReader, sample: _Sample, how: Loading, timeout: float
) -> None:
    from elasticsearch import ApiError, ConnectionTimeout
    from elasticsearch.helpers import streaming_bulk

    already = int(seal.get("loaded", 0))

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
                    _watch(client, index)
                    # sent again after a stop: a batch may be acknowledged out of order
                    write_seal(client, index, {**seal, "loaded": max(already, acknowledged - how.batch)})
        except ConnectionTimeout as error:
            raise ElasticsearchError(
                f"{index} stalled: no passage was acknowledged for {timeout:g} s, after {acknowledged}. Look at the "
                "server's log, then run the same command again to go on."
            ) from error
        except ApiError as error:
            raise ElasticsearchError(
                f"{index} took no more passages after {acknowledged}: {short(error)}. Run the same command again to go "
                "on."
            ) from error
    _watch(client, index)


def _rejected(index: str, item: Mapping[str, Any]) -> ElasticsearchError:
    (result,) = item.values()
    why = reason(result.get("error", result))
    full = "block" in why or "watermark" in why
    hint = "Its disk is full: free some space" if full else "Mend the passage"
    return ElasticsearchError(
        f"{index} rejected passage {result.get('_id')!r} (status {result.get('status')}): {why}. {hint}, then run the "
        "same command again to go on."
    )


def _watch(client: Any, index: str) -> None:
    """Stop at once where the server would take passages without keeping them."""
    blocks = client.indices.get_settings(index=index, flat_settings=True)[index]["settings"]
    for name in ("index.blocks.read_only_allow_delete", "index.blocks.write", "index.blocks.read_only"):
        if str(blocks.get(name, "false")) == "true":
            raise ElasticsearchError(
                f"{index} was made read-only by the server ({name}), as it does when the disk is nearly full. Free "
                "some space, then run the same command again to go on."
            )
    if client.cluster.health(index=index)["status"] == "red":
        raise ElasticsearchError(
            f"{index} is red: a shard is lost. Look at the server's log and run the command again."
        )


def _verify(client: Any, index: str, reader: CorpusReader, sample: _Sample) -> None:
    client.indices.refresh(index=index)
    count = int(client.count(index=index)["count"])
    if count != reader.count:
        raise refuse(index, f"it holds {count} passages of {reader.count} that were sent and acknowledged")
    expected = sample.passages()
    names = list(expected)
    for start in range(0, len(names), 500):
        for found in client.mget(index=index, ids=names[start : start + 500])["docs"]:
            passage = expected[found["_id"]]
            source = found.get("_source") or {}
            if (source.get("title"), source.get("txt")) != (passage.title, passage.text):
                raise refuse(index, f"passage {passage.id!r} reads otherwise than it was sent, or is missing")


def _switch(client: Any, alias: str, index: str, remove_old: bool) -> None:
    old = behind(client, alias)
    if alias in old:
        raise refuse(
            index, f"{alias} is the name of an index, not of an alias. Choose another name, or remove that index"
        )
    actions: list[dict[str, Any]] = [{"remove": {"index": name, "alias": alias}} for name in old]
    client.indices.update_aliases(actions=[*actions, {"add": {"index": index, "alias": alias}}])
    if remove_old and old:
        client.indices.delete(index=",".join(old))
    elif old:
        logger.warning("%s is now %s; the index before it is kept: %s.", alias, index, ", ".join(old))
