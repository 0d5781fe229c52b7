"""Commit record of an index in a search server, and the checks that compare the live index with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from graftwork.retrieval.analysis import ANALYSER, EnglishAnalyser
from graftwork.retrieval.corpus import add_digest
from graftwork.retrieval.retriever import DamagedIndexError, IncompleteIndexError, Passage
from graftwork.retrieval.server_client import SearchClient

SCHEMA = 2
FIELDS = ("title", "txt")
MAPPINGS: Mapping[str, Any] = {
    "dynamic": "strict",
    "properties": {
        "title": {"type": "text", "analyzer": "english"},
        "txt": {"type": "text", "analyzer": "english"},
        # copy of the id as a keyword, because many servers disable sorting by _id
        "id": {"type": "keyword"},
    },
}
PROBES = (
    "The U.S.A.'s running engines aren't 3.14 times as generously analysed",
    "Ärzte’s naïve café-owners fly, flies, flying; skies and SKY 2021-03-04 _under_score 東京",
    "relational conditional rationally hopefulness formalize electricity controlling sensational",
)
"""Texts whose terms show the analyser: possessives, stop words, stems, numbers, and other scripts."""
PAGE = 1000
"""Number of passages read at once."""


def read_record(client: SearchClient, index: str) -> dict[str, Any]:
    """Commit record of an index, stored in its mapping; empty if Graftwork did not build the index."""
    return dict(_mapping(client, index).get("_meta", {}))


def write_record(client: SearchClient, index: str, record: Mapping[str, Any]) -> None:
    """Store a commit record in the mapping of the index."""
    client.request("PUT", f"/{index}/_mapping", body={"_meta": dict(record)})


def live_state(client: SearchClient, index: str) -> dict[str, Any]:
    """UUID, number of passages, and the highest sequence number of each shard, which every write raises."""
    found: Mapping[str, Any] = client.request("GET", f"/{index}/_stats", params={"level": "shards"})["indices"][index]
    numbers: dict[str, int] = {}
    for name, copies in sorted(found.get("shards", {}).items()):
        # a replica that is being copied is behind
        numbers[name] = max(int(copy["seq_no"]["max_seq_no"]) for copy in copies)
    return {"uuid": str(found["uuid"]), "count": int(found["primaries"]["docs"]["count"]), "sequence": numbers}


def check_analysis(client: SearchClient, index: str) -> None:
    """Verify mapping, analyser and scoring of an index, which templates and plugins of the server can change.

    Raises:
        DamagedIndexError: If one of them differs; the message names the check.
    """
    mapping = {name: value for name, value in _mapping(client, index).items() if name != "_meta"}
    expected = {**MAPPINGS, "dynamic": "strict"}
    if mapping != expected:
        raise _refused(index, "mapping", mapping, expected, "Remove the index template that changes it")
    settings = client.request("GET", f"/{index}/_settings", params={"flat_settings": "true"})[index]["settings"]
    scoring = {name: value for name, value in settings.items() if name.startswith("index.similarity.")}
    if scoring:
        raise _refused(index, "scoring", scoring, {}, "Remove the index template that sets the similarity")
    own = EnglishAnalyser()
    for field in FIELDS:
        for text in PROBES:
            found, terms = probe_terms(client, index, field, text), own.terms(text)
            if found != terms:
                raise _refused(
                    index, f"terms of the probe text in {field}", found, terms, "Remove the analyser that was changed"
                )


def probe_terms(client: SearchClient, index: str, field: str, text: str) -> list[str]:
    """Terms of a text in a field of the index."""
    tokens = client.request("GET", f"/{index}/_analyze", body={"field": field, "text": text})["tokens"]
    return [str(token["token"]) for token in tokens]


def check_commit(
    client: SearchClient, where: str, index: str, record: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    """Compare an index with its commit record.

    Args:
        client: Client of the server.
        where: Name of the index, for messages.
        index: Index that the name refers to.
        record: Commit record of a complete index.
        state: Result of `live_state`.

    Returns:
        A warning for an index of an earlier version, whose record has fewer facts; None without one.

    Raises:
        DamagedIndexError: If the index differs; the message names the check.
    """
    check_analysis(client, index)
    if "uuid" not in record:
        return (
            f"{where} was built by an earlier version, without a digest of its passages; later writes are not noticed. "
            "Build it again"
        )
    for check, name in (("index UUID", "uuid"), ("sequence number", "sequence")):
        if state[name] != record[name]:
            raise _refused(
                where,
                check,
                state[name],
                record[name],
                "Its passages may differ from those that were verified: build it again with `graftwork index`",
            )
    return None


def stored_passages(client: SearchClient, index: str) -> Iterator[Passage]:
    """All passages of an index in the order of their ids."""
    after: list[Any] | None = None
    while True:
        body: dict[str, Any] = {"size": PAGE, "sort": [{"id": "asc"}], "query": {"match_all": {}}}
        if after is not None:
            body["search_after"] = after
        hits = client.request("POST", f"/{index}/_search", body=body)["hits"]["hits"]
        for hit in hits:
            source = hit["_source"]
            yield Passage(str(hit["_id"]), source["txt"], source.get("title", ""))
        if len(hits) < PAGE:
            return
        after = hits[-1]["sort"]


def stored_digest(client: SearchClient, index: str) -> tuple[int, int]:
    """Number and digest sum of all passages of an index."""
    count = total = 0
    for passage in stored_passages(client, index):
        count += 1
        total = add_digest(total, passage)
    return count, total


def commit_record(record: Mapping[str, Any], state: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Commit record of a verified index: what was built, and what shows a later change."""
    probes = [EnglishAnalyser().terms(text) for text in PROBES]
    return {
        **record,
        "schema": SCHEMA,
        "state": "complete",
        "analyser": ANALYSER,
        "count": state["count"],
        "source": dict(source),
        "loaded": state["count"],
        "uuid": state["uuid"],
        "sequence": state["sequence"],
        "mapping": _digest(MAPPINGS),
        "probes": _digest(probes),
    }


def verification_error(index: str, problem: str) -> IncompleteIndexError:
    """Create the error of a build that failed its verification."""
    return IncompleteIndexError(
        f"{index} was not put into service: {problem}. The previous index remains in service; fix the cause and run "
        "the same command again."
    )


def _mapping(client: SearchClient, index: str) -> dict[str, Any]:
    return dict(client.request("GET", f"/{index}/_mapping")[index]["mappings"])


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _refused(index: str, check: str, found: Any, expected: Any, advice: str) -> DamagedIndexError:
    return DamagedIndexError(
        f"{index} differs from its commit record in the check of the {check}: found {found}, expected {expected}. "
        f"{advice}."
    )
