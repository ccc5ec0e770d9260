"""The embedded default: drawn images whose classes are parts on a distracting background, and an oracle teacher that knows the parts.

An image (64 x 64) shows one of five shapes with one of two fills (ten classes) in any hue, size, place and rotation, on low-frequency waves and a strong
colour gradient. Pixels are mostly background and hue; the teacher's features carry shape, fill and the patch's place in the object. Everything
depends on (seed, index) alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, CLASSES, SEMANTICS = 64, 10, 64
SHAPES = ("disc", "square", "triangle", "ring", "cross")
FILLS = ("stripes", "dots")


class Parts(NamedTuple):
    images: Tensor  # (n, 3, 64, 64) uint8
    labels: Tensor  # (n,) int64, shape x 2 + fill
    semantics: Tensor  # (n, N, 64) what each patch shows
    score: Tensor  # (n, N) share of the object in each patch, summing to 1: where the oracle looks


@lru_cache(maxsize=4)  # a run asks for its set to train, to mimic and to probe
def draw(count: int, seed: int, first: int = 0, grid: int = 4, chunk: int = 256) -> Parts:
    """Images number `first` to `first + count - 1` of the set `seed`, described on a grid x grid of patches."""
    parts = [_chunk(range(start, min(start + chunk, first + count)), seed, grid) for start in range(first, first + count, chunk)]
    return Parts(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def oracle(parts: Parts, dim: int = 96, *, noise: float = 0.1) -> Tensor:
    """Features (n, N, dim): tanh of a fixed random projection of the semantics, blurred over 3 x 3 patches, plus noise."""
    projection = torch.randn(SEMANTICS, dim, generator=torch.Generator().manual_seed(0)) / SEMANTICS**0.5
    side = round(parts.semantics.shape[1] ** 0.5)
    maps = parts.semantics.transpose(1, 2).unflatten(2, (side, side))
    blurred = F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False).flatten(2).transpose(1, 2)
    out = (blurred @ projection * 4).tanh()
    return out + noise * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))


def _chunk(indices: range, seed: int, grid: int) -> Parts:
    generators = [np.random.default_rng((seed, index)) for index in indices]
    u = torch.from_numpy(np.stack([g.random(64, dtype=np.float32) for g in generators]))
    noise = torch.from_numpy(np.stack([g.standard_normal((3, SIDE, SIDE), dtype=np.float32) for g in generators]))
    labels = (u[:, 0] * CLASSES).long().clamp(max=CLASSES - 1)
    shape, fill = labels // 2, labels % 2
    radius = (24 + 16 * u[:, 1]) / 2
    centre = SIDE / 2 + (u[:, 2:4] - 0.5) * (SIDE - 2 * radius[:, None])
    turn = 2 * np.pi * u[:, 4]

    place = torch.arange(SIDE) + 0.5
    dy = place[None, :, None] - centre[:, 0, None, None]
    dx = place[None, None, :] - centre[:, 1, None, None]
    cos, sin = (f(turn)[:, None, None] for f in (torch.cos, torch.sin))
    v, w = (cos * dy - sin * dx) / radius[:, None, None], (sin * dy + cos * dx) / radius[:, None, None]  # object coordinates, -1..1
    inside = _inside(v, w)[shape, torch.arange(len(labels))]
    pattern = torch.where(fill[:, None, None] == 0, (9 * w).sin() > 0, ((7 * v).cos() * (7 * w).cos()) > 0.15)

    colour = _hue(u[:, 5])[:, :, None, None]
    painted = colour * torch.where(pattern, 1.0, 0.35)[:, None]
    images = torch.where(inside[:, None], painted, _background(u[:, 6:])) + 0.05 * noise
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)

    patch = SIDE // grid
    share = F.avg_pool2d(inside.float()[:, None], patch).flatten(1)
    return Parts(images, labels, _semantics(share, shape, fill, dy, dx, v, w, radius, patch), share / share.sum(1, keepdim=True))


def _inside(v: Tensor, w: Tensor) -> Tensor:
    """(5, n, H, W) bool: the shapes in object coordinates."""
    r = (v * v + w * w).sqrt()
    box = torch.maximum(v.abs(), w.abs())
    triangle = (v < 0.5) & (v > 1.732 * w.abs() - 1)
    cross = (torch.minimum(v.abs(), w.abs()) < 0.28) & (box < 0.95)
    return torch.stack([r < 0.9, box < 0.75, triangle, (r < 1) & (r > 0.55), cross])


def _hue(h: Tensor) -> Tensor:
    """(n, 3) saturated colours of hue h in 0..1."""
    return ((h[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs().sub(1).clamp(0.05, 1)


def _background(u: Tensor) -> Tensor:
    """(n, 3, H, W): three sine waves of random colour, amplitude 0.5 together, and a large gradient."""
    place = torch.linspace(0, 1, SIDE)
    rows, columns = place[None, :, None], place[None, None, :]
    out = torch.full((len(u), 3, SIDE, SIDE), 0.5)
    for wave in range(3):
        fy, fx, phase, *colour = u[:, 6 * wave : 6 * wave + 6].unbind(1)
        angle = 2 * np.pi * (3 * fy[:, None, None] * rows + 3 * fx[:, None, None] * columns + phase[:, None, None])
        out += (torch.stack(colour, 1)[:, :, None, None] - 0.5) / 3 * angle.sin()[:, None]
    direction = 2 * np.pi * u[:, 18, None, None]
    ramp = direction.cos() * (rows - 0.5) + direction.sin() * (columns - 0.5)
    return out + (u[:, 19:22] - 0.5)[:, :, None, None] * 1.4 * ramp[:, None]


def _bumps(value: Tensor, centres: Tensor, width: float) -> Tensor:
    """Gaussian bumps (..., k) of a value around k centres."""
    return (-((value[..., None] - centres) / width).square()).exp()


def _semantics(
    share: Tensor, shape: Tensor, fill: Tensor, dy: Tensor, dx: Tensor, v: Tensor, w: Tensor, radius: Tensor, patch: int
) -> Tensor:
    """(n, N, 64): shares of background, shapes, fills and classes; offset from the object's centre, angle, radius, and bumps over these."""
    count = len(share)

    def middle(field: Tensor) -> Tensor:
        return F.avg_pool2d(field.expand(count, SIDE, SIDE)[:, None], patch).flatten(1)

    vy, wx = middle(v), middle(w)
    distance, angle = (vy.square() + wx.square()).sqrt(), torch.atan2(vy, wx)
    near = (-distance.square() / 4).exp()[..., None]
    kinds = [F.one_hot(shape, len(SHAPES)), F.one_hot(fill, len(FILLS)), F.one_hot(2 * shape + fill, CLASSES)]
    spots = torch.linspace(-1, 1, 5)
    turns = torch.arange(8) * np.pi / 4
    parts = [
        (1 - share)[..., None],
        *(kind[:, None].float() * share[..., None] for kind in kinds),
        torch.stack([middle(dy), middle(dx)], -1) / SIDE,
        torch.stack([angle.sin(), angle.cos()], -1) * near,
        near,
        (_bumps(vy, spots, 0.5)[..., None] * _bumps(wx, spots, 0.5)[..., None, :]).flatten(2),
        ((angle[..., None] - turns).cos() * 2 - 2).exp() * near,
        _bumps(distance, torch.linspace(0, 2, 8), 0.3),
    ]
    return torch.cat(parts, -1)
