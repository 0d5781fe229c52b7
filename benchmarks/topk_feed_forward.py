"""One feed-forward layer, d_ff hidden units with ReLU: top-k against dense, checkpointed and chunk-recomputed layers.

Expected: six dense products become one plus a selection, so a ratio of 1/6 plus the cost of the selection. Measured on
a CPU: the scores take half of the time; sampled products, embedding bags and the selection the rest; copying the output
weights to a row per unit a tenth at small batches. Above one kept unit in eight, dense products are faster, and used.

    python benchmarks/topk_feed_forward.py --tokens 2048 4096 --units 3072 16384 --k 256

Authors' flags and ours: --layer ff --n_queries N --n_keys M --head_size D --topk K --Q_chunk_size C [--backward]
is --tokens N --units M --hidden D --k K --chunk-size C [--no-backward].
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Report, checkpointed, measure, parser, prepare, random, selected
from graftwork.methods.topk.functional import topk_feed_forward


def dense(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Dense layer; x is [tokens hidden], w_in [units hidden], w_out [out units]."""
    return F.linear(torch.relu(F.linear(x, w_in)), w_out)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    options.add_argument("--units", type=int, nargs="+", default=[3072, 16384], help="hidden units, d_ff")
    options.add_argument("--hidden", type=int, default=768, help="width of a token, d_model")
    options.add_argument("--k", type=int, nargs="+", default=[256])
    options.add_argument("--chunk-size", type=int, help="tokens scored at once; default chosen from the width")
    options.add_argument("--backward", action="store_true", default=True)
    options.add_argument("--no-backward", dest="backward", action="store_false")
    chosen = options.parse_args()
    prepare(chosen)
    report = Report("Feed-forward layer, weights not counted as saved", chosen, "dense")
    for tokens, units in itertools.product(chosen.tokens, chosen.units):
        x = random(tokens, chosen.hidden, options=chosen)
        w_in = random(units, chosen.hidden, options=chosen, scale=chosen.hidden**-0.5)
        w_out = random(chosen.hidden, units, options=chosen, scale=units**-0.5)
        leaves = [x, w_in, w_out]

        def topk(k: int | None, leaves: list[Tensor] = leaves) -> Tensor:
            return topk_feed_forward(*leaves, k=k, activation="relu", chunk_size=chosen.chunk_size)

        forwards = {
            "dense": lambda leaves=leaves: dense(*leaves),
            "dense, checkpointed": checkpointed(dense, *leaves),
            "chunks, recomputed": lambda topk=topk: topk(None),
        }
        forwards |= {f"top-{k}": lambda k=k, topk=topk: topk(k) for k in chosen.k}
        costs = measure(
            selected(forwards, "dense", chosen), leaves, "dense", chosen, backward=chosen.backward, ignore=leaves[1:]
        )
        report.add(f"{tokens} tokens, {units} units", costs)
    report.show()


if __name__ == "__main__":
    main()
