"""32 clients in another process for two minutes, and 10,000 mixed requests; memory is that of the server alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.serving.service import Service
from serving.servers import GROWTH_MB, eventually, listening, open_decoder, resident_mb

SECONDS = float(os.environ.get("GRAFTWORK_SOAK_SECONDS", "120"))
"""Duration; the environment variable sets another one, such as 600."""
REQUESTS = int(os.environ.get("GRAFTWORK_SOAK_REQUESTS", "10000"))
"""Number of mixed requests before the weights are compared."""
MOMENTS = sorted({min(60.0, SECONDS / 2), SECONDS / 2, SECONDS * 0.98})
"""Seconds after which memory is measured; caches are full after a minute."""
EXPECTED = {200, 400, 404, 408, 422, 429}
LOAD = Path(__file__).with_name("load.py")


def run_load(address: str, *options: str, meanwhile: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run the clients in another process and return their counts."""
    with subprocess.Popen([sys.executable, str(LOAD), address, *options], stdout=subprocess.PIPE, text=True) as clients:
        try:
            if meanwhile is not None:
                meanwhile()
            output, _ = clients.communicate()
        finally:
            clients.kill()
    assert clients.returncode == 0
    found = json.loads(output)
    assert found["unexpected"] == []
    statuses = {int(status): count for status, count in found["statuses"].items()}
    assert set(statuses) <= EXPECTED
    print(f"{sum(statuses.values())} responses {statuses} to {found['kinds']}")
    return found


def digest(service: Service) -> str:
    return service.queue.run_between_batches(service.answerer.weights_digest).result()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_32_clients_cause_no_server_error_and_no_growth(decoder_place, decoder, tmp_path: Path):
    service = open_decoder(decoder_place.copy(tmp_path), decoder, header_timeout=1.0, body_timeout=1.0, check_every=500)
    sizes: list[float] = []

    def measure() -> None:
        began = time.monotonic()
        for moment in MOMENTS:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            sizes.append(resident_mb())

    with listening(service) as address:
        before = digest(service)
        found = run_load(address, "--seconds", str(SECONDS), meanwhile=measure)
        eventually(lambda: len(service.queue) == 0)
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert digest(service) == before
    print("; ".join(f"{size:.0f} MB after {moment:.0f} s" for size, moment in zip(sizes, MOMENTS, strict=True)))
    assert found["statuses"]["200"] > 2 * SECONDS
    assert sizes[-1] - sizes[0] < GROWTH_MB


@pytest.mark.long
def test_mixed_requests_leave_every_bit_of_the_weights(decoder_place, decoder, tmp_path: Path):
    service = open_decoder(decoder_place.copy(tmp_path), decoder, header_timeout=1.0, body_timeout=1.0)
    asked = {"question": "who is the baker ?", "passage_ids": ["p1", "p2"], "max_new_tokens": 5}
    with listening(service) as address:
        before, answer = digest(service), httpx.post(f"{address}/v1/answer", json=asked, timeout=60).json()
        found = run_load(address, "--requests", str(REQUESTS))
        after = httpx.post(f"{address}/v1/answer", json=asked, timeout=60).json()
        assert digest(service) == before
    assert sum(found["statuses"].values()) >= REQUESTS
    kinds = {"answer", "chat", "complete", "change", "read", "send_bad_body", "hang_up", "send_slowly"}
    assert set(found["kinds"]) == kinds
    assert [after[name] for name in ("answer", "update_norm")] == [answer[name] for name in ("answer", "update_norm")]
