"""Sweep over every text model type of the installed transformers: which method can change it, and with which outcome.

Every type is built as a tiny random model. Each method is applied with settings under which the converted model must
equal the dense one, in logits with padding, gradients and cached greedy generation. The result of a pair is `verified`,
`refused` with the reason (the model is unchanged), or a failure, with which the sweep ends in an error.

    python tests/sweep_types.py             write src/graftwork/surgery/coverage.json
    python tests/sweep_types.py llama bert  update the rows of some types
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_types

TABLE = Path(__file__).parents[1] / "src" / "graftwork" / "surgery" / "coverage.json"
COLUMNS = ("topk attention", "topk feed-forward", "sparsefinder", "cald", "regrad", "wt5")
TOLERANCE = 1e-5
PER_PROCESS = 30
"""Model types of one process."""


def methods(kind: str) -> dict[str, Callable[[], Any]]:
    """Identity settings of each column of the table, for a kind of model."""
    from graftwork.methods.cald import Cald
    from graftwork.methods.regrad import ReGrad
    from graftwork.methods.sparsefinder import Sparsefinder
    from graftwork.methods.topk import TopK
    from graftwork.methods.wt5 import WT5

    return {
        "topk attention": lambda: TopK(attention_k=64),
        "topk feed-forward": lambda: TopK(feed_forward_k=1.0),
        "sparsefinder": lambda: Sparsefinder(alpha=1.0),
        # in a window of the whole text, the mixer of decoders is softmax attention
        "cald": lambda: (
            Cald(mixer="linear", window=64)
            if kind == "decoder"
            else Cald(rank=64, positions=64, initialization="identity")
        ),
        "regrad": lambda: ReGrad(rank=2),
        "wt5": lambda: WT5(),
    }


def difference(found: Any, expected: Any) -> float:
    """Largest difference of logits and gradients, relative to the largest of each; infinity for other tokens."""
    worst = _relative(found.logits, expected.logits)
    for name, gradient in expected.gradients.items():
        own = found.gradients.get(name)
        worst = max(worst, float("inf") if own is None else _relative(own, gradient))
    if expected.generated is not None and not torch.equal(found.generated, expected.generated):
        return float("inf")
    return worst


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), 1.0)
    error = float((found - expected).abs().max())
    # a comparison with NaN is false
    return error / scale if error <= float("inf") else float("inf")


def sweep(model_type: str, kind: str) -> dict[str, str]:
    """Outcome of each method on one model type.

    Returns:
        Column → "verified", "refused: …" or "FAILED: …"; the only key is "model" if the type cannot be built.
    """
    from graftwork.errors import GraftworkError
    from graftwork.grafting.conversion import convert, restore
    from graftwork.surgery.modules import undo_steps

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model, expected = tiny_types.build(model_type, kind)
    # types of transformers that need other packages or inputs end in any exception
    except Exception as error:
        return {"model": f"{type(error).__name__}: {error}"}
    outcomes: dict[str, str] = {}
    for column, make in methods(kind).items():
        target = copy.deepcopy(model)
        try:
            converted = convert(target, make()).model
            # ReGrad's adapters start at zero in B, so that logits are those of the dense model
            worst = difference(tiny_types.observe(converted, kind), expected)
            outcomes[column] = "verified" if worst <= TOLERANCE else f"FAILED: differs by {worst:.2g}"
            restore(converted)
        except GraftworkError as error:
            outcomes[column] = f"refused: {error}"
            if undo_steps(target):
                outcomes[column] = f"FAILED: not refused at conversion: {error}"
        # anything else is a defect, which the table shows
        except Exception as error:
            outcomes[column] = f"FAILED: {type(error).__name__}: {error}"
        if outcomes[column] != "verified" and not outcomes[column].startswith("FAILED"):
            after = difference(tiny_types.observe(target, kind), expected)
            if after != 0:
                outcomes[column] = f"FAILED: refused, but changed by {after:.2g}"
    return outcomes


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    """Split names into lists of at most `size`."""
    found = list(names)
    return (found[start : start + size] for start in range(0, len(found), size))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="Model types; all by default.")
    parser.add_argument("--workers", type=int, default=2, help="Number of processes.")
    options = parser.parse_args()
    kinds = tiny_types.model_types()
    chosen = {name: kinds[name] for name in options.types} if options.types else kinds
    rows: dict[str, dict[str, str]] = {}
    for names in batched(chosen, PER_PROCESS * options.workers):
        # new processes, because modules and caches of many types add up
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            running = {name: pool.submit(sweep, name, chosen[name]) for name in names}
            for name, future in running.items():
                rows[name] = future.result()
                print(f"{len(rows)}/{len(chosen)} {name}: {rows[name]}", file=sys.stderr, flush=True)
    counts = Counter((column, outcome.partition(":")[0]) for row in rows.values() for column, outcome in row.items())
    for (column, outcome), count in sorted(counts.items()):
        print(f"{column}: {outcome} {count}")
    stored = json.loads(TABLE.read_text(encoding="utf-8"))["types"] if options.types and TABLE.exists() else {}
    table = {"transformers": transformers.__version__, "types": dict(sorted((stored | rows).items()))}
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failures = [
        f"{name}, {column}: {outcome}"
        for name, row in rows.items()
        for column, outcome in row.items()
        if outcome.startswith("FAILED")
    ]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
