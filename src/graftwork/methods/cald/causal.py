"""Causal linear attention with a window of softmax attention: one chunked form for training, prefill and generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.surgery.precision import compute_dtype

CHUNK = 64
"""Default number of queries that are computed at a time."""


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """Feature maps φ of queries and keys, decay of the state, and weight of the linear part, per head or group.

    A group is a key-value head of grouped queries; without grouped queries there is one head per group.

    Source: Katharopoulos et al. 2020 (elu); Zhang et al. 2024 and 2025, Hedgehog and LoLCATs (softmax map); Yang et al.
    2024, equation 4 (gate per token).
    """

    query: Float[Tensor, "heads width features"] | None = None
    """Matrices of the softmax map for queries; None for φ(x) = elu(x) + 1."""
    key: Float[Tensor, "groups width features"] | None = None
    """Matrices of the softmax map for keys; None for φ(x) = elu(x) + 1."""
    gate: Float[Tensor, "groups value_width"] | None = None
    """Weights of the forget gate, which is read from the values because they have no rotary positions; None for no
    decay."""
    gate_bias: Float[Tensor, " groups"] | None = None
    """Bias of the forget gate."""
    balance: Float[Tensor, " heads"] | None = None
    """Logarithm of the factor on the linear part beside the window; None for factor 1."""

    def of_query(self, x: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch heads tokens features2"]:
        """Compute φ_q(x) of scaled queries."""
        return feature_map(x, self.query)

    def of_key(self, x: Float[Tensor, "batch groups tokens width"]) -> Float[Tensor, "batch groups tokens features2"]:
        """Compute φ_k(x) of scaled keys."""
        return feature_map(x, self.key)

    def log_decay(
        self, value: Float[Tensor, "batch groups tokens value_width"]
    ) -> Float[Tensor, "batch groups tokens"] | None:
        """Compute log α = log sigmoid(w·v + b), the logarithm of the share of the state that a token keeps."""
        if self.gate is None or self.gate_bias is None:
            return None
        gate, bias = self.gate.to(value.dtype), self.gate_bias.to(value.dtype)
        # [batch groups tokens value_width] · [groups value_width 1] → [batch groups tokens]
        return F.logsigmoid((value @ gate[:, :, None])[..., 0] + bias[:, None])


def feature_map(
    x: Float[Tensor, "batch heads tokens width"], matrix: Float[Tensor, "heads width features"] | None
) -> Float[Tensor, "batch heads tokens features2"]:
    """Compute φ(x) = [softmax(xW); softmax(−xW)], or elu(x) + 1 without a matrix.

    Source: Zhang et al. 2025, LoLCATs, section 3.1, with the softmax over features of its authors' code.
    """
    if matrix is None:
        return F.elu(x) + 1
    projected = x @ matrix.to(x.dtype)  # [batch heads tokens width] · [heads width features]
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


@dataclass(eq=False)
class RecurrentState:
    """Everything that later tokens need of earlier ones; its size does not depend on the number of tokens."""

    sums: Float[Tensor, "batch groups features width"]
    """Σ φ(k_j) v_jᵀ over the keys that have left the window."""
    total: Float[Tensor, "batch groups features"]
    """Σ φ(k_j) over the same keys."""
    keys: Float[Tensor, "batch groups tail width"]
    """Keys that the window of the next token contains, window − 1 of them; zeros before the first token."""
    values: Float[Tensor, "batch groups tail width"]
    """Values of these keys."""
    real: Bool[Tensor, "batch tail"]
    """True for keys of real tokens."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the state; the first axis is the batch."""
        return (self.sums, self.total, self.keys, self.values, self.real)


def initial_state(
    key: Float[Tensor, "batch groups tokens width"],
    value: Float[Tensor, "batch groups tokens value_width"],
    features: int,
    window: int | None,
) -> RecurrentState:
    """Create the state before the first token.

    Args:
        key: Keys, for shape, dtype and device.
        value: Values, likewise.
        features: Number of features of φ.
        window: Number of tokens of the softmax window; None for none.
    """
    tail, (batch, groups, _, width) = max(0, (window or 0) - 1), key.shape
    dtype = compute_dtype(key.dtype)
    return RecurrentState(
        value.new_zeros((batch, groups, features, value.shape[-1]), dtype=dtype),
        value.new_zeros((batch, groups, features), dtype=dtype),
        key.new_zeros((batch, groups, tail, width)),
        value.new_zeros((batch, groups, tail, value.shape[-1])),
        torch.zeros((batch, tail), dtype=torch.bool, device=key.device),
    )


def causal_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch groups tokens width"],
    value: Float[Tensor, "batch groups tokens value_width"],
    maps: FeatureMaps,
    *,
    scale: float,
    window: int | None = None,
    padding: Bool[Tensor, "batch tokens"] | None = None,
    segments: Int[Tensor, "batch tokens"] | None = None,
    state: RecurrentState | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch heads tokens value_width"], RecurrentState]:
    """Attend to the last `window` tokens by softmax, and to all earlier ones by a feature map with one common sum.

        o_i = (Σ_{j near} e^{s_ij − m_i} v_j + λ Σ_{j far} d_ij φ(q_i)·φ(k_j) v_j)
            / (Σ_{j near} e^{s_ij − m_i}     + λ Σ_{j far} d_ij φ(q_i)·φ(k_j))

    with s_ij = scale · q_i·k_j, m_i the largest score in the window, near: i − window < j ≤ i, far: j ≤ i − window, and
    the decay d_ij = Π_{j<t≤i} α_t, which is 1 without a gate. One token at a time with the returned state, in pieces,
    or all tokens at once, the output is the same.

    Source: Zhang et al. 2025, LoLCATs, equation 8; Katharopoulos et al. 2020, section 3.3 (recurrent form);
    `reference.linear_attention`.
    Differs from LoLCATs: the learned factor λ = e^balance is on the linear part, and keys of grouped queries share one
    feature map and one state.

    Args:
        query: Queries of new tokens.
        key: Keys of new tokens, not repeated for grouped queries.
        value: Values of new tokens.
        maps: Feature maps, gate and balance.
        scale: Factor on the scores; φ is applied to queries and keys multiplied by √scale.
        window: Number of tokens of the softmax window, including the query's own; None for linear attention only.
        padding: True for real tokens, in any pattern; None if there is no padding.
        segments: Number of the packed sequence of each token, ascending; None for one sequence per row.
        state: State after the tokens before; None at the start of a sequence.
        chunk: Number of queries that are computed at a time; changes memory and speed, never the result.

    Returns:
        Attention output in the dtype of the values, and the state after the last token. Rows of padding are undefined.
    """
    batch, _, tokens, width = query.shape
    groups, tail = key.shape[1], max(0, (window or 0) - 1)
    features = 2 * maps.key.shape[-1] if maps.key is not None else width
    state = state or initial_state(key, value, features, window)
    real = torch.ones((batch, tokens), dtype=torch.bool, device=key.device) if padding is None else padding
    keys, values = torch.cat([state.keys, key], 2), torch.cat([state.values, value], 2)  # [batch groups tail+tokens …]
    real = torch.cat([state.real, real], 1)  # [batch, tail + tokens]
    if segments is not None:
        segments = F.pad(segments, (tail, 0), value=-1)  # [batch, tail + tokens]
    balance = None if maps.balance is None else maps.balance.view(groups, -1)  # [groups repeats]
    sums, total, reached = state.sums, state.total, None if segments is None else segments[:, :1]
    outputs: list[Tensor] = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        part, size = slice(start, stop + tail), stop - start
        block = _Block(
            _grouped(query[:, :, start:stop], groups),
            keys[:, :, part],
            values[:, :, part],
            real[:, part],
            None if segments is None else segments[:, part],
        )
        # [batch groups repeats size features]
        phi_q = _grouped(maps.of_query(_wide(query[:, :, start:stop]) * scale**0.5), groups)
        phi_k = maps.of_key(_wide(keys[:, :, start : start + size]) * scale**0.5)  # [batch groups size features]
        phi_k = phi_k * real[:, None, start : start + size, None].to(phi_k.dtype)
        decay = _cumulative_decay(maps, block)
        output, sums, total = block.attend(phi_q, phi_k, decay, sums, total, reached, scale, window, balance)
        if block.segments is not None:
            reached = block.segments[:, size - 1 : size]  # [batch 1]
        outputs.append(output.flatten(1, 2).to(value.dtype))  # [batch heads size value_width]
    last = slice(keys.shape[2] - tail, None)
    return torch.cat(outputs, 2), RecurrentState(sums, total, keys[:, :, last], values[:, :, last], real[:, last])


@dataclass(frozen=True, eq=False)
class _Block:
    """Queries of one chunk with the keys of the chunk and of the window before it; local key 0 is the oldest."""

    query: Float[Tensor, "batch groups repeats size width"]
    key: Float[Tensor, "batch groups local width"]
    value: Float[Tensor, "batch groups local value_width"]
    real: Bool[Tensor, "batch local"]
    segments: Int[Tensor, "batch local"] | None

    def attend(
        self,
        phi_q: Tensor,
        phi_k: Tensor,
        decay: Tensor | None,
        sums: Tensor,
        total: Tensor,
        reached: Tensor | None,
        scale: float,
        window: int | None,
        balance: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute outputs [batch groups repeats size value_width], and the state without the first `size` keys.

        Args:
            phi_q: Features of the queries [batch groups repeats size features].
            phi_k: Features of the first `size` keys, zero for padding [batch groups size features].
            decay: Cumulative log decay of the local keys [batch groups local]; None without a gate.
            sums: State Σ φ(k) vᵀ [batch groups features value_width].
            total: State Σ φ(k) [batch groups features].
            reached: Segment of the last key in the state [batch 1]; None without packing.
            scale: Factor on the scores.
            window: Number of tokens of the softmax window.
            balance: Logarithm of the factor on the linear part [groups repeats].
        """
        size, local = self.query.shape[3], self.key.shape[2]
        own = local - size  # local index of the key of query 0
        value = _wide(self.value)
        row = torch.arange(size, device=value.device)[:, None] + own  # [size 1]
        column = torch.arange(local, device=value.device)[None, :]  # [1 local]
        # far keys of the chunk: [size size]
        far = (column[:, :size] <= row - (window or 0))[None]
        weights = phi_q @ phi_k[:, :, None].mT  # [batch groups repeats size size]
        carried = phi_q.new_ones(())
        if self.segments is not None and reached is not None:
            ids = self.segments[:, own:, None]  # [batch size 1]
            far = far & (ids == self.segments[:, None, :size])  # [batch size size]
            carried = (ids == reached[:, :, None]).to(phi_q.dtype)[:, None, None]  # [batch 1 1 size 1]
        if decay is not None:
            until = decay[:, :, own:]  # [batch groups size]
            fading = (until[..., None] - decay[:, :, None, :size]).masked_fill(~far[:, None], 0)
            weights = weights * fading.exp()[:, :, None]
            carried = carried * until.exp()[:, :, None, :, None]  # [batch groups 1 size 1]
        weights = weights * far[:, None, None].to(weights.dtype)
        # state of earlier chunks, then far keys of this one: [batch groups repeats size value_width], [… size]
        numerator = (phi_q @ sums[:, :, None]) * carried + weights @ value[:, :, None, :size]
        denominator = (phi_q @ total[:, :, None, :, None]) * carried + weights.sum(-1, keepdim=True)
        if balance is not None:
            factor = balance.to(value.dtype).exp()[..., None, None]  # [groups repeats 1 1]
            numerator, denominator = numerator * factor, denominator * factor
        if window is not None:
            near = ((column > row - window) & (column <= row))[None] & self.real[:, None]  # [batch size local]
            if self.segments is not None:
                near = near & (self.segments[:, own:, None] == self.segments[:, None])
            near = near[:, None, None]  # [batch 1 1 size local]
            scores = (_wide(self.query) * scale) @ _wide(self.key)[:, :, None].mT  # [batch groups repeats size local]
            largest = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
            # a row of padding has no key in its window
            largest = largest.masked_fill(largest == -torch.inf, 0)
            close = (scores - largest).masked_fill(~near, -torch.inf).exp()
            numerator = numerator + close @ value[:, :, None]
            denominator = denominator + close.sum(-1, keepdim=True)
        # a row of padding without a key: the gradient of a quotient by a tiny number is infinite
        output = numerator / denominator.masked_fill(denominator < torch.finfo(value.dtype).tiny, 1)
        return output, *self._advance(phi_k, decay, value[:, :, :size], sums, total, reached)

    def _advance(
        self,
        phi_k: Tensor,
        decay: Tensor | None,
        value: Tensor,
        sums: Tensor,
        total: Tensor,
        reached: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Add the first `size` keys [batch groups size features] with their values to the state."""
        size = phi_k.shape[2]
        if decay is not None:
            end = decay[:, :, size - 1 : size]  # [batch groups 1]
            phi_k = phi_k * (end - decay[:, :, :size]).exp()[..., None]
            sums, total = sums * end.exp()[..., None], total * end.exp()
        if self.segments is not None and reached is not None:
            newest = self.segments[:, size - 1 : size]  # [batch 1]
            # a new packed sequence starts with an empty state
            kept = (newest == reached).to(sums.dtype)
            sums, total = sums * kept[:, :, None, None], total * kept[:, :, None]
            phi_k = phi_k * (self.segments[:, :size] == newest).to(phi_k.dtype)[:, None, :, None]
        return sums + phi_k.mT @ value, total + phi_k.sum(2)


def _cumulative_decay(maps: FeatureMaps, block: _Block) -> Tensor | None:
    """Σ_{t≤j} log α_t over the local keys [batch groups local]; None without a gate. Padding does not decay."""
    found = maps.log_decay(_wide(block.value))
    return None if found is None else (found * block.real[:, None].to(found.dtype)).cumsum(-1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Split the heads of [batch heads tokens width] into groups: [batch groups repeats tokens width]."""
    batch, heads, tokens, width = x.shape
    return x.reshape(batch, groups, heads // groups, tokens, width)


def _wide(x: Tensor) -> Tensor:
    """Upcast half precision to float32: sums over thousands of tokens lose small terms in it."""
    return x.to(compute_dtype(x.dtype))
