"""Generation with a recurrent state beside the dense cache: time per token and memory after prompts of several lengths.

Both models continue a prompt of random tokens one token at a time, in turns. The time is the median over tokens; the
memory is that of all tensors in the cache.

    python benchmarks/cald_generation.py ../shared/models/stories260K --output results.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import graftwork as gw
from graftwork.core.files import write_json
from graftwork.methods.cald import Cald
from graftwork.methods.cald.recurrence import RecurrentLayer


def cache_bytes(cache: DynamicCache) -> int:
    """Size of all tensors of a cache in bytes."""
    layers: Any = cache.layers
    return sum(
        layer.state_bytes() if isinstance(layer, RecurrentLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in layers
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a decoder")
    parser.add_argument("--output", type=Path, default=Path("cald_generation.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed at each length")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--feature-map", default="softmax")
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args()
    models: dict[str, Any] = {"dense": gw.load_model(options.model)[0]}
    method = Cald(mixer="linear", feature_map=options.feature_map, window=options.window)
    models["converted"] = gw.convert(gw.load_model(options.model)[0], method).model
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        torch.manual_seed(0)
        ids = torch.randint(3, models["dense"].config.vocab_size, (options.batch, length))
        caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
        for name, model in models.items():
            for start in range(0, length, 512):
                model(input_ids=ids[:, start : start + 512], past_key_values=caches[name], logits_to_keep=1)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.tokens):
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=ids[:, -1:], past_key_values=caches[name])
                seconds[name].append(time.perf_counter() - started)
        for name in models:
            size = cache_bytes(caches[name])
            median = 1000 * statistics.median(seconds[name])
            rows.append({"model": name, "length": length, "milliseconds": round(median, 2), "cache_bytes": size})
            print(rows[-1], flush=True)
    machine = f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_json(options.output, {"kind": "measured", "machine": machine, **plain, "rows": rows})
    table = Table(title=f"one token for each of {options.batch} sequences")
    for heading in ("tokens before", "model", "ms per token", "KB of cache"):
        table.add_column(heading)
    for row in rows:
        size = f"{row['cache_bytes'] / 1000:,.0f}"
        table.add_row(f"{row['length']:,}", row["model"], f"{row['milliseconds']:.3g}", size)
    Console().print(table)


if __name__ == "__main__":
    main()
