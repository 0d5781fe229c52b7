"""One new token over a cache of keys and values: top-k attention against SDPA and dense attention.

Expected: SDPA reads all keys and all values once; top-k reads all keys and k values, half of the memory traffic.
Measured on a CPU with one thread: two thirds of SDPA's time at 8,192 keys, equal near 3,000, and nearly twice at 1,024,
where about twenty small operators dominate. With two threads on a busy machine each of these operators waits for its
threads, and top-k takes two to four times as long as SDPA at every size; use `--threads 1` there.

    python benchmarks/topk_decoding.py --cache 1024 2048 4096 8192 --k 64
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Report, measure, parser, prepare, random
from graftwork.methods.topk.functional import topk_attention
from graftwork.surgery.masks import LazyMask


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention; query is [batch heads 1 width], key and value are [batch heads keys width]."""
    return torch.softmax((query * query.shape[-1] ** -0.5) @ key.mT, dim=-1) @ value


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cache", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="keys in the cache")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--head-size", type=int, default=64)
    options.add_argument("--k", type=int, nargs="+", default=[64])
    options.add_argument("--steps", type=int, default=20, help="tokens per timed run")
    options.set_defaults(rounds=21)
    chosen = options.parse_args()
    prepare(chosen)
    report = Report(f"Decoding, {chosen.steps} tokens a run", chosen, "SDPA")
    for keys in chosen.cache:
        query = random(chosen.batch, chosen.heads, 1, chosen.head_size, options=chosen)
        cache = [random(chosen.batch, chosen.heads, keys, chosen.head_size, options=chosen) for _ in range(2)]
        mask = LazyMask(chosen.batch, 1, keys, causal=True, query_offset=keys - 1)

        def topk(k: int, given: tuple[Tensor, ...] = (query, *cache), mask: LazyMask = mask) -> Tensor:
            return topk_attention(*given, k=k, scale=chosen.head_size**-0.5, mask=mask)

        forwards = {
            "SDPA": lambda query=query, cache=cache: repeated(
                chosen.steps, lambda: F.scaled_dot_product_attention(query, *cache)
            ),
            "dense": lambda query=query, cache=cache: repeated(chosen.steps, lambda: dense(query, *cache)),
        }
        forwards |= {f"top-{k}": lambda k=k, topk=topk: repeated(chosen.steps, lambda: topk(k)) for k in chosen.k}
        report.add(f"{keys} keys", measure(forwards, [], "SDPA", chosen, backward=False))
    report.show()


def repeated(steps: int, run) -> Tensor:
    output = run()
    for _ in range(steps - 1):
        output = run()
    return output


if __name__ == "__main__":
    main()
