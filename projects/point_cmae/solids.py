"""The embedded default: clouds of twelve solids, made from numbers alone; item i of a split depends on (seed, split, i) only.

Classes look alike in patches (legs, rods, plates), sizes vary, every axis is stretched and the object turned about y, so that neither a centroid
nor a bounding box tells the class; `moments` (evaluate.py) measures how far such features get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Variant = Literal["plain", "hard"]
POINTS = 2048
SPLITS = {"pretrain": 0, "train": 1, "test": 2}


class Piece(NamedTuple):
    """A surface: its area, and how to draw n points (n, 3) on it."""

    area: float
    draw: Callable[[np.random.Generator, int], Array]


# -- surfaces, y up --------------------------------------------------------------------------------------------------------------


def _moved(piece: Piece, offset: tuple[float, float, float], turn: Array | None = None) -> Piece:
    """Turned first (rows times `turn`), then moved."""
    return Piece(piece.area, lambda rng, n: (piece.draw(rng, n) if turn is None else piece.draw(rng, n) @ turn) + np.array(offset))


_Y_TO_X = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])  # swaps x and y: what stood along y lies along x


def _box(a: float, b: float, c: float) -> Piece:
    """Six faces, sides a, b, c, centred."""
    areas = np.array([b * c, a * c, a * b]) * 2

    def draw(rng: np.random.Generator, n: int) -> Array:
        points = rng.uniform(-0.5, 0.5, (n, 3))
        axis = rng.choice(3, n, p=areas / areas.sum())
        points[np.arange(n), axis] = rng.choice([-0.5, 0.5], n)
        return points * [a, b, c]

    return Piece(float(areas.sum()), draw)


def _tube(low: float, high: float, height: float) -> Piece:
    """Side of a cone stump: radius `low` at the bottom, `high` at the top, y from -height/2 to height/2."""
    slant = float(np.hypot(height, high - low))

    def draw(rng: np.random.Generator, n: int) -> Array:
        # the radius grows linearly, and so does the density along the height
        u = rng.uniform(size=n)
        t = u if low == high else (np.sqrt(low**2 + u * (high**2 - low**2)) - low) / (high - low)
        radius, angle = low + t * (high - low), rng.uniform(0, 2 * np.pi, n)
        return np.stack([radius * np.cos(angle), (t - 0.5) * height, radius * np.sin(angle)], 1)

    return Piece(float(np.pi * (low + high) * slant), draw)


def _disc(radius: float, y: float) -> Piece:
    def draw(rng: np.random.Generator, n: int) -> Array:
        r, angle = radius * np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, n)
        return np.stack([r * np.cos(angle), np.full(n, y), r * np.sin(angle)], 1)

    return Piece(float(np.pi * radius**2), draw)


def _sphere(a: float, b: float, c: float, part: Callable[[Array], Array] | None = None) -> Piece:
    """Ellipsoid, uniform on its surface by rejection; `part` maps unit directions to those wanted (a half sphere)."""
    axes = np.array([a, b, c])

    def draw(rng: np.random.Generator, n: int) -> Array:
        kept: list[Array] = []
        while sum(map(len, kept)) < n:
            unit = rng.normal(size=(2 * n + 16, 3))
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            stretch = np.linalg.norm(unit / axes, axis=1)  # of the surface element, up to a factor
            kept.append(unit[rng.uniform(size=len(unit)) < stretch * axes.min()])
        unit = np.concatenate(kept)[:n]
        return (unit if part is None else part(unit)) * axes

    p = 1.6075  # Thomsen's formula
    area = 4 * np.pi * (((a * b) ** p + (a * c) ** p + (b * c) ** p) / 3) ** (1 / p)
    return Piece(float(area) * (0.5 if part is not None else 1), draw)


def _torus(ring: float, thick: float, share: float = 1.0) -> Piece:
    """Ring in the x-y plane; `share` of it, from the right side on (1/2: x >= 0)."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        kept: list[Array] = []
        while sum(map(len, kept)) < n:
            inner = rng.uniform(0, 2 * np.pi, 2 * n + 16)
            kept.append(inner[rng.uniform(size=len(inner)) < (ring + thick * np.cos(inner)) / (ring + thick)])
        inner, outer = np.concatenate(kept)[:n], rng.uniform(-np.pi * share, np.pi * share, n)
        r = ring + thick * np.cos(inner)
        return np.stack([r * np.cos(outer), r * np.sin(outer), thick * np.sin(inner)], 1)

    return Piece(float(4 * np.pi**2 * ring * thick * share), draw)


def _triangles(corners: Array) -> Piece:
    """(n, 3, 3)."""
    areas = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)

    def draw(rng: np.random.Generator, n: int) -> Array:
        which, weights = rng.choice(len(corners), n, p=areas / areas.sum()), rng.dirichlet([1, 1, 1], n)
        return (corners[which] * weights[:, :, None]).sum(1)

    return Piece(float(areas.sum()), draw)


# -- solids: lists of (piece, part number inside the class); `s()` is a fresh factor U(0.6, 1.4) ------------------------------------

Build = Callable[[Callable[[], float]], list[tuple[Piece, int]]]


def _ellipsoid(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    return [(_sphere(s(), 0.8 * s(), 0.6 * s()), 0)]


def _block(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    return [(_box(1.4 * s(), 1.0 * s(), 1.0 * s()), 0)]


def _cylinder(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    r, h = 0.6 * s(), 1.6 * s()
    return [(_tube(r, r, h), 0), (_disc(r, h / 2), 1), (_disc(r, -h / 2), 1)]


def _cone(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    r, h = 0.8 * s(), 1.6 * s()
    return [(_tube(r, 0.0, h), 0), (_disc(r, -h / 2), 1)]


def _ring(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    ring = 0.8 * s()
    return [(_torus(ring, min(0.25 * s(), 0.6 * ring)), 0)]


def _capsule(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    r, h = 0.5 * s(), 1.2 * s()

    def half(sign: int) -> Callable[[Array], Array]:
        return lambda unit: np.abs(unit) * [0, sign, 0] + unit * [1, 0, 1]

    ends = [(_moved(_sphere(r, r, r, half(sign)), (0, sign * h / 2, 0)), 1) for sign in (1, -1)]
    return [(_tube(r, r, h), 0), *ends]


def _pyramid(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    a, h = 0.7 * s(), 1.3 * s()
    base = np.array([[-a, 0, -a], [a, 0, -a], [a, 0, a], [-a, 0, a]])
    sides = np.stack([np.stack([base[i], base[(i + 1) % 4], [0, h, 0]]) for i in range(4)])
    return [(_triangles(sides), 0), (_triangles(np.stack([base[[0, 1, 2]], base[[0, 2, 3]]])), 1)]


def _legs(width: float, depth: float, height: float, thick: float) -> list[Piece]:
    x, z = (width - thick) / 2, (depth - thick) / 2
    return [_moved(_box(thick, height, thick), (i * x, -height / 2, j * z)) for i in (-1, 1) for j in (-1, 1)]


def _table(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    w, d, h, plate = 1.6 * s(), 1.1 * s(), 1.0 * s(), 0.1 * s()
    return [(_moved(_box(w, plate, d), (0, plate / 2, 0)), 0), *((leg, 1) for leg in _legs(w, d, h, 0.12 * s()))]


def _chair(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    w, d, h, plate, back = 0.9 * s(), 0.9 * s(), 0.8 * s(), 0.1 * s(), 0.9 * s()
    seat = _moved(_box(w, plate, d), (0, plate / 2, 0))
    rest = _moved(_box(w, back, plate), (0, plate + back / 2, -(d - plate) / 2))
    return [(seat, 0), (rest, 1), *((leg, 2) for leg in _legs(w, d, h, 0.1 * s()))]


def _lamp(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    foot, pole, thin, shade, height = 0.5 * s(), 1.4 * s(), 0.05 * s(), 0.5 * s(), 0.5 * s()
    cap = _moved(_tube(shade, 0.5 * shade, height), (0, pole, 0))
    return [(_disc(foot, 0.0), 0), (_moved(_tube(thin, thin, pole), (0, pole / 2, 0)), 1), (cap, 2)]


def _mug(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    r, h = 0.6 * s(), 1.1 * s()
    handle = _moved(_torus(min(0.35 * s(), 0.45 * h), 0.07 * s(), 0.5), (r, 0, 0))
    return [(_tube(r, r, h), 0), (_disc(r, -h / 2), 0), (handle, 1)]


def _hammer(s: Callable[[], float]) -> list[tuple[Piece, int]]:
    thin, shaft, head, side = 0.1 * s(), 1.6 * s(), 0.8 * s(), 0.3 * s()
    lying = _moved(_box(side, head, side), (0, shaft / 2 + side / 2, 0), _Y_TO_X)
    return [(_tube(thin, thin, shaft), 0), (lying, 1)]


SOLIDS: dict[str, Build] = {
    "ellipsoid": _ellipsoid,
    "box": _block,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _ring,
    "capsule": _capsule,
    "pyramid": _pyramid,
    "table": _table,
    "chair": _chair,
    "lamp": _lamp,
    "mug": _mug,
    "hammer": _hammer,
}
_COUNTS = {
    "ellipsoid": 1,
    "box": 1,
    "cylinder": 2,
    "cone": 2,
    "torus": 1,
    "capsule": 2,
    "pyramid": 2,
    "table": 2,
    "chair": 3,
    "lamp": 3,
    "mug": 2,
    "hammer": 2,
}
_FIRST = dict(zip(_COUNTS, np.cumsum([0, *list(_COUNTS.values())[:-1]]).tolist(), strict=True))
PARTS = {name: range(_FIRST[name], _FIRST[name] + count) for name, count in _COUNTS.items()}
"""Part ids of each class, as `segmenter.part_scores` takes them."""


class Solids(NamedTuple):
    """One split."""

    points: Tensor  # (n, 2048, 3) float32, mean 0, largest norm 1
    labels: Tensor  # (n,) int64, index into SOLIDS
    parts: Tensor  # (n, 2048) int64; the plain variant alone keeps them meaningful


def _turn(axis: int, angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    out = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    out[i, i] = out[j, j] = c
    out[i, j], out[j, i] = s, -s
    return out


def solid(seed: int, split: str, index: int, variant: Variant = "plain") -> tuple[Array, int, Array]:
    """Points (2048, 3), class and parts (2048,) of one item.

    "hard": the points on one side of a random plane are dropped (20 %), 15 % are points of a tilted square of ground, small turns about all axes.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index, int(variant == "hard")])
    label = index % len(SOLIDS)
    name = list(SOLIDS)[label]
    pieces = SOLIDS[name](lambda: float(rng.uniform(0.6, 1.4)))
    areas = np.array([piece.area for piece, _ in pieces])
    drawn = POINTS if variant == "plain" else int(np.ceil((POINTS - int(0.15 * POINTS)) / 0.8)) + 1
    counts = rng.multinomial(drawn, areas / areas.sum())
    points = np.concatenate([piece.draw(rng, count) for (piece, _), count in zip(pieces, counts, strict=True)])
    parts = np.repeat([_FIRST[name] + part for _, part in pieces], counts)
    points = points * rng.uniform(0.8, 1.25, 3) @ _turn(1, rng.uniform(0, 2 * np.pi))
    if variant == "hard":
        direction = rng.normal(size=3)
        ground = int(0.15 * POINTS)
        order = np.argsort(points @ (direction / np.linalg.norm(direction)))[: POINTS - ground]  # the far fifth is unseen
        points, parts = points[order], parts[order]
        size = np.ptp(points, axis=0).max()
        floor = rng.uniform(-0.6, 0.6, (ground, 3)) * [size, 0, size] + [points[:, 0].mean(), points[:, 1].min(), points[:, 2].mean()]
        points, parts = np.concatenate([points, floor]), np.concatenate([parts, np.full(ground, parts[0])])
        for axis in range(3):
            points = points @ _turn(axis, rng.uniform(-1, 1) * np.pi / 12)
    points = points + rng.normal(0, 0.01, points.shape)
    points = points - points.mean(0)
    points = points / np.linalg.norm(points, axis=1).max()
    order = rng.permutation(len(points))
    return points[order].astype(np.float32), label, parts[order].astype(np.int64)


def solids(split: str, count: int, *, seed: int = 0, variant: Variant = "plain") -> Solids:
    """The first `count` items of a split; "pretrain", "train" and "test" share none."""
    items = [solid(seed, split, index, variant) for index in range(count)]
    points, labels, parts = zip(*items, strict=True)
    return Solids(torch.from_numpy(np.stack(points)), torch.tensor(labels), torch.from_numpy(np.stack(parts)))
