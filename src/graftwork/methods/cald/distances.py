"""Distances between student and teacher: hidden states, layer by layer, and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.cald.config import CaldConfig


def layer_distances(
    student: Sequence[Float[Tensor, "batch tokens hidden"]],
    teacher: Sequence[Float[Tensor, "batch tokens hidden"]],
    mask: Bool[Tensor, "batch tokens"] | None,
    config: CaldConfig,
) -> dict[int, Float[Tensor, ""]]:
    """Compute the distance of student and teacher at every compared hidden state.

    With hidden states s_i and t_i of layer i, each [batch tokens hidden], over the set of real tokens R:

        mse:    d_i = 1/|R| Σ_{r∈R} 1/hidden · ‖s_ir − t_ir‖²
        cosine: d_i = 1/|R| Σ_{r∈R} (1 − s_ir·t_ir / (‖s_ir‖ ‖t_ir‖))

    Source: He & Garner 2025, the layer loss; `idiap/linearize-distill-pretrained-transformers`, part nlp, with the
    normalisations of its other two parts.
    Differs from it: padding is excluded by default, and the number of layers is taken from the model.

    Args:
        student: Hidden states of the student, embeddings first.
        teacher: Hidden states of the teacher.
        mask: True for real tokens; None if there is no padding.
        config: Selection of the states, normalisation and distance.

    Returns:
        Number of the hidden state (0 for the embeddings) to scalar distance; the teacher's states are detached.
    """
    chosen = range(config.skip_first_layers, len(student) - config.skip_last_layers)
    weight = mask if config.loss_is_masked else None
    return {i: _distance(_full(student[i]), _full(teacher[i]).detach(), weight, config) for i in chosen}


def layer_loss(distances: dict[int, Float[Tensor, ""]], config: CaldConfig) -> Float[Tensor, ""]:
    """Reduce the distances over layers, by sum or mean; with `loss_norm`, each is divided by its own detached value."""
    values = torch.stack(list(distances.values()))  # [layers]
    if config.layer_norm == "loss_norm":
        values = values / values.detach().clamp_min(torch.finfo(values.dtype).tiny)
    return values.sum() if config.layer_reduction == "sum" else values.mean()


def output_divergence(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"], config: CaldConfig
) -> Float[Tensor, ""]:
    """Compute T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over rows.

    The factor T² is omitted if `scale_output_loss` is false; with the divergence "reverse", the arguments of KL are
    exchanged.

    Source: Hinton et al. 2015; He & Garner 2025.
    """
    temperature = config.temperature
    classes = student.shape[-1]
    target = F.log_softmax(_full(teacher).detach().reshape(-1, classes) / temperature, dim=-1)  # [rows, classes]
    found = F.log_softmax(_full(student).reshape(-1, classes) / temperature, dim=-1)  # [rows, classes]
    if config.divergence == "reverse":
        found, target = target, found
    divergence = F.kl_div(found, target, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if config.scale_output_loss else divergence


def _distance(student: Tensor, teacher: Tensor, mask: Tensor | None, config: CaldConfig) -> Tensor:
    """Scalar distance of two hidden states [batch tokens hidden], over the tokens of `mask` [batch tokens]."""
    if config.layer_norm in ("layernorm", "rmsnorm"):
        normalise = F.layer_norm if config.layer_norm == "layernorm" else F.rms_norm
        student, teacher = (normalise(states, states.shape[-1:]) for states in (student, teacher))
    if config.layer_loss == "mse":
        tokens = (student - teacher).square().mean(-1)  # [batch, tokens]
    else:
        tokens = 1 - F.cosine_similarity(student, teacher, dim=-1)  # [batch, tokens]
    if mask is None:
        return tokens.mean()
    real = mask.to(tokens.dtype)
    return (tokens * real).sum() / real.sum().clamp_min(1)


def _full(values: Tensor) -> Tensor:
    """Upcast half precision to float32, because small differences underflow in it."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
