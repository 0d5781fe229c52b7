"""How far a student is from its teacher: hidden states, layer by layer, and outputs."""

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
) -> dict[int, Tensor]:
    """The distance between both models at every hidden state that is compared, by its number; 0 are the embeddings.

    Source: He & Garner 2025, the layer loss; `idiap/linearize-distill-pretrained-transformers`, part nlp, with the
    normalisations of its other two parts.
    Differs from it: padding is left out unless asked for, and the number of layers is the model's.

    Args:
        student: Hidden states of the student, the embeddings first.
        teacher: Those of the teacher.
        mask: True for real tokens; None if all are.
        config: Which states are compared, and how.
    """
    chosen = range(config.skip_first_layers, len(student) - config.skip_last_layers)
    weight = mask if config.loss_is_masked else None
    return {i: _distance(_full(student[i]), _full(teacher[i]).detach(), weight, config) for i in chosen}


def layer_loss(distances: dict[int, Tensor], config: CaldConfig) -> Tensor:
    """The distances put together."""
    values = torch.stack(list(distances.values()))
    if config.layer_norm == "loss_norm":
        values = values / values.detach().clamp_min(torch.finfo(values.dtype).tiny)
    return values.sum() if config.layer_reduction == "sum" else values.mean()


def output_divergence(
    student: Float[Tensor, "*batch classes"], teacher: Float[Tensor, "*batch classes"], config: CaldConfig
) -> Tensor:
    """KL(teacher ‖ student) of softened outputs, summed over classes, averaged over rows, times T² unless switched off.

    Source: Hinton et al. 2015; He & Garner 2025.
    """
    temperature = config.temperature
    classes = student.shape[-1]
    target = F.log_softmax(_full(teacher).detach().reshape(-1, classes) / temperature, dim=-1)
    found = F.log_softmax(_full(student).reshape(-1, classes) / temperature, dim=-1)
    divergence = F.kl_div(found, target, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if config.scale_output_loss else divergence


def _distance(student: Tensor, teacher: Tensor, mask: Tensor | None, config: CaldConfig) -> Tensor:
    if config.layer_norm in ("layernorm", "rmsnorm"):
        normalise = F.layer_norm if config.layer_norm == "layernorm" else F.rms_norm
        student, teacher = (normalise(states, states.shape[-1:]) for states in (student, teacher))
    if config.layer_loss == "mse":
        tokens = (student - teacher).square().mean(-1)
    else:
        tokens = 1 - F.cosine_similarity(student, teacher, dim=-1)
    if mask is None:
        return tokens.mean()
    real = mask.to(tokens.dtype)
    return (tokens * real).sum() / real.sum().clamp_min(1)


def _full(values: Tensor) -> Tensor:
    """Half precision is too coarse for small differences."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
