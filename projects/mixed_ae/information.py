"""Why naive mixing makes the pretext task easier: what a mixed input tells about the hidden patches, against what a masked one tells.

In closed form for two Gaussian "images" (the paper's mutual-information argument), and as the error of the best linear predictor on real pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Information(NamedTuple):
    """Nats about the hidden patches of the first image."""

    masked: float
    """In its visible patches."""
    mixed: float
    """In these and the second image's patches that fill the hidden positions; never less."""


def gaussian_information(patches: int, length: float, rho: float, visible: Sequence[int]) -> Information:
    """Two Gaussian images of `patches` scalar patches, covariance exp(-|i - j| / length), cross-covariance `rho` times that.

    Raises:
        ValueError: rho or length outside its range, or visible positions that are not distinct, not inside, or all.
    """
    hidden = sorted(set(range(patches)) - set(visible))
    if not -1 < rho < 1 or length <= 0 or len(set(visible)) != len(visible) or not 0 < len(hidden) == patches - len(visible):
        raise ValueError(
            f"patches={patches}, length={length}, rho={rho}, visible={list(visible)}: expected -1 < rho < 1, length > 0, distinct visible positions, some hidden"
        )
    place = torch.arange(patches, dtype=torch.float64)
    own = torch.exp(-(place[:, None] - place).abs() / length)
    both = torch.cat([torch.cat([own, rho * own], 1), torch.cat([rho * own, own], 1)])
    masked = list(visible)
    mixed = [*masked, *(patches + i for i in hidden)]
    return Information(_mutual(both, masked, hidden), _mutual(both, mixed, hidden))


def _mutual(covariance: Tensor, given: list[int], wanted: list[int]) -> float:
    """I(given; wanted) = (log det S_gg + log det S_ww - log det S_joint) / 2."""

    def log_det(rows: list[int]) -> Tensor:
        return torch.linalg.slogdet(covariance[rows][:, rows]).logabsdet

    return float(log_det(given) + log_det(wanted) - log_det(given + wanted)) / 2


class Predicted(NamedTuple):
    """Mean squared error of hidden patch means on held-out groups, over their variance."""

    masked: float
    mixed: float


def linear_prediction(images: Tensor, patch: int, group: int, assignment: Tensor) -> Predicted:
    """Least-squares guess of an image's hidden patch colours from its own patches, and from these with the fillers of the mixed sequence.

    Args:
        images: (B, 3, S, S), consecutive groups; the first half of the groups fits, the second is measured.
        assignment: (L,), so that every sample has the same columns; each image of a group takes the place of image 0 in turn.
    """
    colours = torch.nn.functional.avg_pool2d(images.double(), patch).flatten(2).mT.unflatten(0, (-1, group))  # (G, K, L, 3)
    place, own = torch.arange(len(assignment)), assignment == 0
    turns = [colours.roll(-turn, 1) for turn in range(group)]
    mixed = torch.stack([turn[:, assignment, place] for turn in turns], 1)  # (G, K, L, 3)
    hidden = torch.stack([turn[:, 0, ~own] for turn in turns], 1)
    half = len(colours) // 2

    def error(seen: Tensor) -> float:
        x, y = seen.flatten(2), hidden.flatten(2)
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        fit = torch.linalg.lstsq(x[:half].flatten(0, 1), y[:half].flatten(0, 1)).solution
        rest = y[half:].flatten(0, 1)
        return float((x[half:].flatten(0, 1) @ fit - rest).square().mean() / (rest - rest.mean(0)).square().mean())

    return Predicted(error(mixed[:, :, own]), error(mixed))
