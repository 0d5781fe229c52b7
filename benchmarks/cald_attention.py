"""One attention core, projections of queries, keys and values included: dense SDPA against both linear forms.

Expected, in multiply-adds: dense 3nd² + 2n²d; projected 3nd² + 4nkd; compressed first nd² + 4nkd + 2kd², with one
shared matrix nd² + 3nkd + 2kd². The projected form therefore breaks even with dense attention at n = 2k, the compressed
form at a smaller n; below, both are slower. The last lines of the output are the measured break-even lengths.

    python benchmarks/cald_attention.py --lengths 64 128 256 512 1024 2048 4096 8192 --k 64 256 --threads 1
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import Report, measure, parser, prepare
from graftwork.methods.cald.functional import compressed_attention, feature_map_attention, projected_attention
from graftwork.surgery.self_attention import affine_parts


class Core:
    """Self-attention core with random weights, in every form. Hidden states are [batch tokens hidden].

    Args:
        hidden: Width of the model.
        heads: Number of heads.
        length: Number of rows of the compression matrices.
        k: Number of slots.
        shared: Share one matrix between keys and values.
        device: Device of the weights.
    """

    def __init__(self, hidden: int, heads: int, length: int, k: int, shared: bool, device: str) -> None:
        self.heads, self.scale = heads, (hidden // heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(hidden, hidden, device=device) for _ in range(3))
        first = torch.randn(length, k, device=device)
        self.matrices = (first, first if shared else torch.randn(length, k, device=device))

    def split(self, rows: Tensor) -> Tensor:
        """Split rows [batch tokens hidden] into heads [batch heads tokens width]."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def projected_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states to queries, keys and values; hidden [batch tokens hidden]."""
        return self.split(self.query(hidden)), self.split(self.key(hidden)), self.split(self.value(hidden))

    def dense(self, hidden: Tensor) -> Tensor:
        """SDPA; hidden [batch tokens hidden]."""
        return F.scaled_dot_product_attention(*self.projected_rows(hidden), scale=self.scale)

    def eager(self, hidden: Tensor) -> Tensor:
        """Dense softmax over a materialised map; hidden [batch tokens hidden]."""
        query, key, value = self.projected_rows(hidden)
        return torch.softmax(query @ key.mT * self.scale, dim=-1) @ value

    def projected(self, hidden: Tensor) -> Tensor:
        """Compress keys and values; hidden [batch tokens hidden]."""
        return projected_attention(*self.projected_rows(hidden), *self.matrices, scale=self.scale)

    def compressed(self, hidden: Tensor) -> Tensor:
        """Compress hidden states before the projections; hidden [batch tokens hidden]."""
        return compressed_attention(
            self.split(self.query(hidden)),
            hidden,
            lambda rows: affine_parts(self.key, rows),
            lambda rows: affine_parts(self.value, rows),
            *self.matrices,
            scale=self.scale,
        )

    def feature_map(self, hidden: Tensor) -> Tensor:
        """Feature-map attention; hidden [batch tokens hidden]."""
        return feature_map_attention(*self.projected_rows(hidden), scale=self.scale)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192])
    options.add_argument("--k", type=int, nargs="+", default=[64, 256])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--eager-limit", type=int, default=2048, help="maximum length of eager attention")
    options.add_argument("--shared", action="store_true", help="share one matrix between keys and values")
    chosen = options.parse_args()
    prepare(chosen)
    report = Report("Attention core, forward", chosen, "SDPA")
    seconds: dict[tuple[str, int], float] = {}
    for length in chosen.lengths:
        hidden = torch.randn(chosen.batch, length, chosen.hidden, device=chosen.device)
        cores = {k: Core(chosen.hidden, chosen.heads, length, k, chosen.shared, chosen.device) for k in chosen.k}
        first = next(iter(cores.values()))
        forwards = {"SDPA": lambda core=first, x=hidden: core.dense(x)}
        if length <= chosen.eager_limit:
            forwards["eager"] = lambda core=first, x=hidden: core.eager(x)
        forwards["feature map"] = lambda core=first, x=hidden: core.feature_map(x)
        for k, core in cores.items():
            forwards[f"projected, k={k}"] = lambda core=core, x=hidden: core.projected(x)
            forwards[f"compressed first, k={k}"] = lambda core=core, x=hidden: core.compressed(x)
            with torch.no_grad():
                difference = float((core.projected(hidden) - core.compressed(hidden)).abs().max())
            if difference > 1e-5:
                raise SystemExit(f"the two forms differ by {difference} at {length} tokens and k={k}")
        costs = measure(forwards, [], "SDPA", chosen, backward=False)
        seconds |= {(name, length): cost.time_ratio for name, cost in costs.items()}
        report.add(f"{length} tokens", costs)
    report.show()
    if not chosen.json:
        for name in dict.fromkeys(name for name, _ in seconds if name != "SDPA"):
            faster = [length for length in chosen.lengths if seconds.get((name, length), 2.0) < 1.0]
            slower = [length for length in chosen.lengths if seconds.get((name, length), 0.0) >= 1.0]
            since = next((length for length in faster if not any(other > length for other in slower)), None)
            print(f"{name}: " + ("never faster than SDPA here" if since is None else f"faster from {since} tokens on"))


if __name__ == "__main__":
    main()
