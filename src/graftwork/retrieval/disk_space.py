"""Free space on the nodes of a search server, compared with the size of a new index."""

from __future__ import annotations

from typing import Any

from graftwork.retrieval.server_client import SearchClient, SearchServerError

INDEX_SHARE = 0.85
"""Ratio of index size to text size, measured on DPR's corpus."""
SAFETY_PERCENT = 5.0
"""Percentage of the disk kept free in addition to the high watermark."""


def check_disk_space(client: SearchClient, source_bytes: int) -> None:
    """Check that the index fits on a node without exceeding the high watermark of its disk.

    Args:
        client: Client of the server.
        source_bytes: Size of the corpus files.

    Raises:
        SearchServerError: If no node has enough space; the message states the required and the free space.
    """
    params = {"include_defaults": "true", "flat_settings": "true"}
    settings = client.request("GET", "/_cluster/settings", params=params)
    flat = {
        key: value for part in ("defaults", "persistent", "transient") for key, value in settings.get(part, {}).items()
    }
    prefix = "cluster.routing.allocation.disk."
    if str(flat.get(f"{prefix}threshold_enabled", "true")).lower() == "false":
        return
    nodes = client.request("GET", "/_nodes/stats/fs")["nodes"].values()
    needed = source_bytes * INDEX_SHARE
    free: list[float] = []
    for node in nodes:
        total = node["fs"]["total"]["total_in_bytes"]
        reserve = reserved_bytes(
            str(flat.get(f"{prefix}watermark.high", "90%")), total, flat.get(f"{prefix}watermark.high.max_headroom")
        )
        free.append(node["fs"]["total"]["available_in_bytes"] - reserve - total * SAFETY_PERCENT / 100)
    if free and max(free) < needed:
        raise SearchServerError(
            f"The index will take about {size_text(needed)}; no node has more than {size_text(max(max(free), 0))} "
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


def size_text(size: float) -> str:
    """Number of bytes with one decimal, in the largest unit of which there is at least one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _bytes(text: str) -> float:
    for unit, size in (("tb", 1 << 40), ("gb", 1 << 30), ("mb", 1 << 20), ("kb", 1 << 10), ("b", 1)):
        if text.lower().endswith(unit):
            return float(text[: -len(unit)]) * size
    return float(text)
