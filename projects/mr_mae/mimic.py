"""The mimic half of MR-MAE: heads on visible tokens, distances to teacher features, focused choice of what stays visible (Sec. 3.1, 3.6, 3.7 of the notes).

No gradient reaches a teacher: its features enter detached. Losses are computed in float32 whatever the precision of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masking import Mask, from_noise, gather

TargetNorm = Literal["layernorm", "l2", "none"]
Distance = Literal["mse", "smooth_l1", "cosine"]
Focus = Literal["none", "sample", "top"]
EPS = 1e-6


class MimicHead(nn.Module):
    """Linear map from student tokens to a teacher's channels, after a fusion of several blocks' outputs where `layers` names them.

    Args:
        dim, teacher_dim: channels of the student's and of the teacher's tokens.
        layers: transformer blocks (from 1) whose outputs are mapped, each by its own linear layer, summed and normalised without affine;
            empty = the encoder's output alone.
    """

    def __init__(self, dim: int, teacher_dim: int, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.fuse = nn.ModuleList(nn.Linear(dim, dim) for _ in self.layers)
        self.head = nn.Linear(dim, teacher_dim)

    def fused(self, outputs: Sequence[Tensor]) -> Tensor:
        """Sum over the blocks' outputs (B, K, D) of their own maps."""
        return torch.stack([linear(x) for linear, x in zip(self.fuse, outputs, strict=True)]).sum(0)

    def forward(self, tokens: Tensor, taps: Mapping[int, Tensor]) -> Tensor:
        """Predictions (B, K, Dt) from the encoder's output (B, K, D) or, with `layers`, from the blocks' outputs in `taps`."""
        if self.layers:
            tokens = self.fused([taps[layer] for layer in self.layers])
            tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        return self.head(tokens)


def normalise(features: Tensor, how: TargetNorm) -> Tensor:
    """Teacher features (..., Dt) as targets: `layernorm` over channels without affine (biased variance), `l2` to length 1, `none` as they are."""
    if how == "layernorm":
        return F.layer_norm(features, features.shape[-1:], eps=EPS)
    return F.normalize(features, dim=-1) if how == "l2" else features


def mimic_loss(
    prediction: Tensor, teacher: Tensor, index: Tensor, *, target_norm: TargetNorm = "layernorm", distance: Distance = "mse"
) -> Tensor:
    """Distance (B, K) of each predicted token to the teacher's token of the same patch; its mean is the mimic loss.

    Args:
        prediction: (B, K, Dt), not normalised here.
        teacher: (B, N, Dt) in raster order, class token removed.
        index: (B, K), the patch of each prediction: `mask.keep`.
    Raises:
        ValueError: channels or grids that differ.
    """
    if prediction.shape[-1] != teacher.shape[-1] or prediction.shape[:2] != index.shape or len(teacher) != len(index):
        raise ValueError(
            f"mimic head: expected {tuple(index.shape)} tokens of the teacher's {teacher.shape[-1]} channels, found {tuple(prediction.shape)}; "
            "set teacher_dims to the teacher's width"
        )
    kind = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    prediction, target = prediction.to(kind), normalise(gather(teacher.detach(), index).to(kind), target_norm)
    if distance == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    error = F.mse_loss if distance == "mse" else F.smooth_l1_loss
    return error(prediction, target, reduction="none").mean(-1)


def attention_score(attention: Tensor) -> Tensor:
    """Score (B, N) of each patch: the class token's attention (B, heads, 1 + N, 1 + N) or (B, heads, 1 + N) to it, mean over heads, summing to 1."""
    row = attention[..., 0, :] if attention.ndim == 4 else attention
    score = row[..., 1:].mean(1)
    return score / score.sum(1, keepdim=True)


def focused_mask(
    score: Tensor,
    kept: int,
    mode: Literal["sample", "top"] = "sample",
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """Keep patches that the teacher looks at.

    Args:
        score: (B, N), not negative; a patch of score 0 is kept only when nothing else is left.
        kept: patches that stay visible.
        mode: "top" = the highest scores, best first; "sample" = without replacement in proportion to the score (Gumbel top-k).
        uniforms: (B, N) in 0..1, what "sample" draws otherwise from `generator`.
    """
    if mode == "top":
        return from_noise(-score, kept)
    if uniforms is None:
        uniforms = torch.rand(score.shape, generator=generator, device=score.device)
    gumbel = -(-uniforms.double().clamp(1e-9, 1 - 1e-9).log()).log()  # double: float32 has no number next to 1 so near
    key = score.double().clamp(min=1e-30).log() + gumbel
    return from_noise(-key, kept)
