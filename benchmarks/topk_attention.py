"""One attention layer over whole sequences: top-k against SDPA, dense eager and checkpointed attention.

Expected: of SDPA's seven matrix products (two forward, five backward) one remains dense, and selection is added.
Measured on a CPU: selection takes half of the time, the scores a quarter, the whole backward pass a tenth. SDPA is
faster below about 2,000 keys. Top-k runs hundreds of operators where SDPA runs two, so other load slows it more.

    python benchmarks/topk_attention.py --lengths 1024 2048 4096 8192 --k 64

Authors' flags and ours: --layer causal-self-attn --n_queries N --n_heads H --head_size D --topk K --Q_chunk_size C
[--backward] is --lengths N --heads H --head-size D --k K --chunk-size C [--no-backward]; no-mask-self-attn is
--no-causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Report, checkpointed, measure, parser, prepare, random, selected
from graftwork.methods.topk.functional import topk_attention
from graftwork.surgery.masks import LazyMask


def dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Dense attention; query, key and value are [batch heads tokens width]."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1) @ value


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--head-size", type=int, default=64)
    options.add_argument("--k", type=int, nargs="+", default=[64])
    options.add_argument("--chunk-size", type=int, default=1024, help="queries scored at once")
    options.add_argument("--dense-limit", type=int, default=2048, help="maximum length of dense attention")
    options.add_argument("--causal", action="store_true", default=True)
    options.add_argument("--no-causal", dest="causal", action="store_false")
    options.add_argument("--backward", action="store_true", default=True)
    options.add_argument("--no-backward", dest="backward", action="store_false")
    chosen = options.parse_args()
    prepare(chosen)
    report = Report(f"{'Causal' if chosen.causal else 'Unmasked'} attention", chosen, "SDPA")
    for length in chosen.lengths:
        leaves = [random(chosen.batch, chosen.heads, length, chosen.head_size, options=chosen) for _ in range(3)]
        mask = LazyMask(chosen.batch, length, length, causal=True) if chosen.causal else None

        def topk(k: int | None, leaves: list[Tensor] = leaves, mask: LazyMask | None = mask) -> Tensor:
            scale = chosen.head_size**-0.5
            return topk_attention(*leaves, k=k, scale=scale, mask=mask, chunk_size=chosen.chunk_size)

        def eager(*given: Tensor) -> Tensor:
            return dense(*given, causal=chosen.causal)

        forwards = {
            "SDPA": lambda leaves=leaves: F.scaled_dot_product_attention(*leaves, is_causal=chosen.causal),
            "chunks, recomputed": lambda topk=topk: topk(None),
        }
        if length <= chosen.dense_limit:
            forwards |= {
                "dense": lambda leaves=leaves, eager=eager: eager(*leaves),
                "dense, checkpointed": checkpointed(eager, *leaves),
            }
        forwards |= {f"top-{k}": lambda k=k, topk=topk: topk(k) for k in chosen.k}
        report.add(
            f"{length} tokens",
            measure(selected(forwards, "SDPA", chosen), leaves, "SDPA", chosen, backward=chosen.backward),
        )
    report.show()


if __name__ == "__main__":
    main()
