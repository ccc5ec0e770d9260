"""Augmentations and subsampling of point clouds (B, N, 3), on whatever device they are (Sec. 5 and 6 of the release).

Every function takes its random numbers as an argument or draws them from a generator (default: the global one of the points' device).
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(points: Tensor) -> Tensor:
    """Points (..., N, 3) minus their mean, over their largest norm.

    Raises:
        ValueError: a cloud whose points are all equal.
    """
    centred = points - points.mean(-2, keepdim=True)
    largest = centred.norm(dim=-1).amax(-1)[..., None, None]
    if (largest == 0).any():
        raise ValueError("cloud: all points are equal, expected an extent to divide by; drop it")
    return centred / largest


def _uniform(shape: tuple[int, ...], low: float, high: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    where = like.device if generator is None else generator.device
    return low + (high - low) * torch.rand(shape, generator=generator, device=where).to(like)


def scale_translate(
    points: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """points * scale + shift, both (B, 3), one a cloud and axis; drawn from U(2/3, 3/2) and U(-0.2, 0.2) if not given."""
    scale = _uniform((len(points), 3), 2 / 3, 3 / 2, points, generator) if scale is None else scale.to(points)
    shift = _uniform((len(points), 3), -0.2, 0.2, points, generator) if shift is None else shift.to(points)
    return points * scale[:, None] + shift[:, None]


def rotate_y(points: Tensor, *, angle: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Rows times [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]; angle (B,) in radians, drawn from U(0, 2 pi) if not given."""
    angle = _uniform((len(points),), 0, 2 * torch.pi, points, generator) if angle is None else angle.to(points)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x, y, z = points.unbind(-1)  # written out: under autocast a product would round the coordinates to bfloat16
    return torch.stack([x * cos - z * sin, y, x * sin + z * cos], -1)


def scale_shift(points: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Part segmentation's: one factor U(0.8, 1.25) a cloud, one shift U(-0.1, 0.1) an axis."""
    scale = _uniform((len(points), 1, 1), 0.8, 1.25, points, generator)
    return points * scale + _uniform((len(points), 1, 3), -0.1, 0.1, points, generator)


def choose(points: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`count` of the points without replacement, in random order, the SAME positions in every cloud of the batch."""
    where = points.device if generator is None else generator.device
    places = torch.randperm(points.shape[1], generator=generator, device=where)[:count]
    return points[:, places.to(points.device)]


AUGMENTATIONS = {"scale_translate": scale_translate, "rotate": rotate_y, "none": lambda points, **_: points}
"""By the name that a recipe gives."""
