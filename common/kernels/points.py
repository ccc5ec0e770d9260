"""Point clouds: farthest point sampling, k nearest neighbours with grouping, chamfer distance; the rules of the CUDA extensions that Point-MAE used.

Indices carry no gradient. Distances are sums of squared differences in float32 (never the dot-product expansion, which moves near ties).
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.kernels._triton import AVAILABLE, dtype_of, on_device, require, tl, triton

Path = Literal["auto", "plain", "tiled", "triton"]

ORIGIN = 1e-3
"""Points of at most this squared norm are never picked after the start (pointnet2_ops takes them for padding)."""
FAR = 1e10
"""Running distance at the start, as in pointnet2_ops."""
LARGEST_CLOUD = 8192
"""Points of a cloud that one Triton program holds in registers."""
MOST_NEIGHBOURS = 64
LARGEST_SET = 64
"""Points of each set of a chamfer pair that one Triton program holds at once."""
DISTANCES_AT_ONCE = 2**22
"""Distances of one row tile of the torch path of chamfer."""


def _check(name: str, points: Tensor) -> None:
    if points.ndim != 3 or points.shape[-1] != 3 or not points.is_floating_point():
        raise ValueError(f"{name}: expected (B, N, 3) floating point, got {tuple(points.shape)} {points.dtype}")
    if not points.is_cuda and not torch.compiler.is_compiling() and not bool(points.isfinite().all()):
        raise ValueError(f"{name}: NaN or infinite coordinates; check the reader")


# ---------------------------------------------------------------------------------------------------------------- farthest points
@functools.lru_cache(maxsize=32)
def _tie_order(count: int, device: torch.device) -> Tensor:
    """Order in which pointnet2_ops prefers equal distances: by bit-reversed lane, then by index.

    Candidate j belongs to lane j mod T, T = min(2^floor(log2 N), 512). In this order the rule is "the first maximum".
    """
    bits = min(count.bit_length() - 1, 9)
    lanes = 1 << bits
    reversed_lane = [int(f"{lane:0{bits}b}"[::-1], 2) if bits else 0 for lane in range(lanes)]
    return torch.tensor(sorted(range(count), key=lambda j: (reversed_lane[j % lanes], j // lanes)), device=device)


def _farthest_reference(points: Tensor, count: int) -> Tensor:
    """The definition, on points in tie order: places in that order."""
    running = torch.where(points.square().sum(-1) > ORIGIN, FAR, -1.0)
    last = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    every = torch.arange(points.shape[0], device=points.device)
    picked = [last]
    for _ in range(count - 1):
        x, y, z = (points - points[every, last][:, None]).square().unbind(-1)
        running = torch.minimum(running, x + y + z)
        last = running.argmax(1)
        picked.append(last)
    return torch.stack(picked, 1)


def _farthest_tiled(points: Tensor, count: int) -> Tensor:
    """The same with contiguous axes and no new arrays in the loop."""
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))
    running = torch.where(points.square().sum(-1) > ORIGIN, FAR, -1.0)
    distance, other = torch.empty_like(x), torch.empty_like(x)
    picked = torch.zeros(points.shape[0], count, dtype=torch.int64, device=points.device)
    for step in range(1, count):
        last = picked[:, step - 1, None]
        torch.sub(x, x.gather(1, last), out=distance).square_()
        distance.add_(torch.sub(y, y.gather(1, last), out=other).square_())
        distance.add_(torch.sub(z, z.gather(1, last), out=other).square_())
        torch.minimum(running, distance, out=running)
        picked[:, step] = running.argmax(1)
    return picked


@triton.jit
def _farthest_kernel(points, out, n, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a cloud, (3, n) coordinates in tie order: the whole cloud stays in registers."""
    cloud = tl.program_id(0).to(tl.int64)
    x_at = points + cloud * 3 * n
    y_at = x_at + n
    z_at = y_at + n
    place = tl.arange(0, SIZE)
    inside = place < n
    x = tl.load(x_at + place, mask=inside, other=0.0)
    y = tl.load(y_at + place, mask=inside, other=0.0)
    z = tl.load(z_at + place, mask=inside, other=0.0)
    running = tl.where(x * x + y * y + z * z > 1e-3, 1e10, -1.0)
    running = tl.where(inside, running, -2.0)
    last_x = tl.load(x_at)
    last_y = tl.load(y_at)
    last_z = tl.load(z_at)
    tl.store(out + cloud * count, 0)
    for step in range(1, count):
        dx = x - last_x
        dy = y - last_y
        dz = z - last_z
        running = tl.minimum(running, dx * dx + dy * dy + dz * dz)
        last = tl.argmax(running, 0, tie_break_left=True)
        tl.store(out + cloud * count + step, last)
        last_x = tl.load(x_at + last)
        last_y = tl.load(y_at + last)
        last_z = tl.load(z_at + last)


def farthest_warps(size: int) -> int:
    return 4 if size <= 1024 else 8 if size <= 4096 else 16


@torch.library.custom_op("contramask::farthest_points", mutates_args=())
def _farthest(points: Tensor, count: int, path: str) -> Tensor:
    order = _tie_order(points.shape[1], points.device)
    points = points[:, order]
    if path == "plain":
        return order[_farthest_reference(points, count)]
    if path == "tiled":
        return order[_farthest_tiled(points, count)]
    axes = points.transpose(1, 2).contiguous()
    picked = torch.empty(points.shape[0], count, dtype=torch.int32, device=points.device)
    size = triton.next_power_of_2(points.shape[1])
    with on_device(points):
        # fused multiply-add moves near ties: 10 of 100 grid-snapped clouds selected other points
        _farthest_kernel[(points.shape[0],)](
            axes, picked, points.shape[1], count, SIZE=size, num_warps=farthest_warps(size), enable_fp_fusion=False
        )
    return order[picked.long()]


@_farthest.register_fake
def _(points: Tensor, count: int, path: str) -> Tensor:
    return points.new_empty(points.shape[0], count, dtype=torch.int64)


def choose(points: Tensor, fits: bool) -> Literal["plain", "tiled", "triton"]:
    """The path that "auto" takes: Triton never runs on a CPU, nor on more points than `fits` on chip."""
    return "triton" if points.is_cuda and AVAILABLE and fits else "tiled"


def farthest_points(points: Tensor, count: int, *, path: Path | Literal["pointnet2"] = "auto") -> Tensor:
    """Farthest point sampling by the rules of pointnet2_ops, (B, count) int64, without gradient.

    The start is point 0. Points of squared norm <= 1e-3 are never picked after it; if nothing is eligible the result is 0 again and again, and once
    every eligible point is used they repeat. Equal distances: see `_tie_order`. Float32 whatever the input (autocast too); unlike the CUDA original,
    no path fuses multiply and add, so near ties are decided alike everywhere.

    Args:
        points: (B, N, 3), finite (checked on a CPU).
        count: points to pick, at least 1; may exceed N.
        path: "auto" never takes "pointnet2", which calls an installed pointnet2_ops on a CUDA tensor.
    """
    _check("points", points)
    if count < 1 or points.shape[1] < 1:
        raise ValueError(f"count={count} of {points.shape[1]} points: expected at least one of each")
    points = points.detach().float()
    if path == "pointnet2":
        try:
            extension = importlib.import_module("pointnet2_ops.pointnet2_utils")
        except ImportError as err:
            raise ImportError('path="pointnet2" needs pointnet2_ops (github.com/erikwijmans/Pointnet2_PyTorch); leave path="auto"') from err
        return extension.furthest_point_sample(points.contiguous(), count).long()
    if path == "auto":
        path = choose(points, points.shape[1] <= LARGEST_CLOUD)
    if path == "triton":
        require(points)
    return _farthest(points, count, path)


# ---------------------------------------------------------------------------------------------------------------- neighbours
@dataclass(frozen=True)
class Neighbours:
    """The k nearest points of each centre, nearest first."""

    index: Tensor
    """(B, G, k) int64."""
    distance: Tensor
    """(B, G, k) Euclidean."""
    neighbourhood: Tensor
    """(B, G, k, 3), points minus their centre."""


def _squared_distances(centres: Tensor, points: Tensor) -> Tensor:
    """(..., G, N) sums of squared differences."""
    x, y, z = (centres[..., :, None, axis] - points[..., None, :, axis] for axis in range(3))
    return x.square_().add_(y.square_()).add_(z.square_()) if not x.requires_grad else x.square() + y.square() + z.square()


def _nearest_reference(points: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared distance and index of the k nearest; a stable sort keeps the lower index first."""
    distance, index = _squared_distances(centres, points).sort(dim=-1, stable=True)
    return distance[..., :k], index[..., :k]


def _nearest_tiled(points: Tensor, centres: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A cloud at a time. `topk` promises no order among equals: where the k + 1 nearest hold any, that cloud is sorted."""
    distance = points.new_empty(*centres.shape[:2], k)
    index = torch.empty(distance.shape, dtype=torch.int64, device=points.device)
    for cloud in range(points.shape[0]):
        every = _squared_distances(centres[cloud], points[cloud])
        near, place = every.topk(min(k + 1, every.shape[-1]), largest=False, sorted=True)
        if points.is_cuda or bool((near[:, 1:] == near[:, :-1]).any()):
            near, place = every.sort(dim=-1, stable=True)
        distance[cloud], index[cloud] = near[:, :k], place[:, :k]
    return distance, index


@triton.jit
def _nearest_kernel(points, centres, index, distance, relative, n, groups, k, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a centre: k times the least distance, which is then struck out."""
    centre = tl.program_id(0).to(tl.int64)
    cloud = points + centre // groups * 3 * n
    place = tl.arange(0, SIZE)
    inside = place < n
    cx = tl.load(centres + centre * 3)
    cy = tl.load(centres + centre * 3 + 1)
    cz = tl.load(centres + centre * 3 + 2)
    dx = cx - tl.load(cloud + place, mask=inside, other=0.0)
    dy = cy - tl.load(cloud + n + place, mask=inside, other=0.0)
    dz = cz - tl.load(cloud + 2 * n + place, mask=inside, other=0.0)
    squared = tl.where(inside, dx * dx + dy * dy + dz * dz, float("inf"))
    for i in range(0, k):
        least = tl.min(squared, 0)
        which = tl.argmin(squared, 0, tie_break_left=True)
        at = centre * k + i
        tl.store(index + at, which)
        tl.store(distance + at, tl.sqrt_rn(least))
        tl.store(relative + at * 3, tl.load(cloud + which) - cx)
        tl.store(relative + at * 3 + 1, tl.load(cloud + n + which) - cy)
        tl.store(relative + at * 3 + 2, tl.load(cloud + 2 * n + which) - cz)
        squared = tl.where(place == which, float("inf"), squared)


def nearest_warps(size: int) -> int:
    return 4 if size <= 2048 else 8


@torch.library.custom_op("contramask::knn_group", mutates_args=())
def _knn(points: Tensor, centres: Tensor, k: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    if path == "triton":
        batch, groups, _ = centres.shape
        n = points.shape[1]
        axes = points.transpose(1, 2).contiguous()
        index = torch.empty(batch, groups, k, dtype=torch.int32, device=points.device)
        distance, relative = points.new_empty(batch, groups, k), points.new_empty(batch, groups, k, 3)
        size = triton.next_power_of_2(n)
        with on_device(points):
            _nearest_kernel[(batch * groups,)](
                axes,
                centres.contiguous(),
                index,
                distance,
                relative,
                n,
                groups,
                k,
                SIZE=size,
                num_warps=nearest_warps(size),
                enable_fp_fusion=False,
            )
        return index.long(), distance, relative
    squared, index = (_nearest_tiled if path == "tiled" else _nearest_reference)(points, centres, k)
    sample = torch.arange(points.shape[0], device=points.device)[:, None, None]
    return index.contiguous(), squared.sqrt(), points[sample, index] - centres[:, :, None]


@_knn.register_fake
def _(points: Tensor, centres: Tensor, k: int, path: str) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*centres.shape[:2], k)
    return points.new_empty(shape, dtype=torch.int64), points.new_empty(shape), points.new_empty(*shape, 3)


def knn_group(points: Tensor, centres: Tensor, k: int, *, path: Path = "auto") -> Neighbours:
    """The k nearest points (B, N, 3) of each centre (B, G, 3): ascending, equals by index; float32, without gradient (KNN_CUDA's rules)."""
    _check("points", points)
    _check("centres", centres)
    if not 1 <= k <= points.shape[1] or centres.shape[0] != points.shape[0]:
        raise ValueError(f"k={k}, points {tuple(points.shape)}, centres {tuple(centres.shape)}: expected 1 <= k <= N and equal batches")
    points, centres = points.detach().float(), centres.detach().float()
    fits = points.shape[1] <= LARGEST_CLOUD and k <= MOST_NEIGHBOURS
    if path == "auto":
        path = choose(points, fits)
    if path == "triton":
        require(points)
    return Neighbours(*_knn(points, centres, k, path))


# ---------------------------------------------------------------------------------------------------------------- chamfer
def _pairs_reference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    squared = _squared_distances(a, b)
    to_b, which_b = squared.min(2)
    to_a, which_a = squared.min(1)
    return to_b, to_a, which_b, which_a


def _pairs_tiled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Winners found in row tiles without gradient, then their distances, through which the gradient flows."""
    rows = max(1, DISTANCES_AT_ONCE // max(1, a.shape[0] * b.shape[1]))
    with torch.no_grad():
        which_b = torch.empty(a.shape[:2], dtype=torch.int64, device=a.device)
        best = b.new_full(b.shape[:2], float("inf"))
        which_a = torch.zeros(b.shape[:2], dtype=torch.int64, device=a.device)
        for start in range(0, a.shape[1], rows):
            squared = _squared_distances(a[:, start : start + rows].detach(), b.detach())
            which_b[:, start : start + rows] = squared.argmin(2)
            least, place = squared.min(1)
            which_a = torch.where(least < best, place + start, which_a)
            best = torch.minimum(least, best)

    def distance(one: Tensor, other: Tensor, which: Tensor) -> Tensor:
        x, y, z = (one - other.gather(1, which[..., None].expand(-1, -1, 3))).square().unbind(-1)
        return x + y + z

    return distance(a, b, which_b), distance(b, a, which_a), which_b, which_a


@triton.jit
def _pairs_kernel(a, b, to_b, to_a, which_b, which_a, n, m, NS: tl.constexpr, MS: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a pair of sets: all distances in registers, the nearest both ways."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NS)
    j = tl.arange(0, MS)
    squared = tl.zeros((NS, MS), ACC)
    for axis in tl.static_range(3):
        one = tl.load(a + (pair * n + i) * 3 + axis, mask=i < n, other=0.0).to(ACC)
        other = tl.load(b + (pair * m + j) * 3 + axis, mask=j < m, other=0.0).to(ACC)
        difference = one[:, None] - other[None, :]
        squared += difference * difference
    squared = tl.where((i < n)[:, None] & (j < m)[None, :], squared, float("inf"))
    tl.store(to_b + pair * n + i, tl.min(squared, 1), mask=i < n)
    tl.store(to_a + pair * m + j, tl.min(squared, 0), mask=j < m)
    tl.store(which_b + pair * n + i, tl.argmin(squared, 1, tie_break_left=True), mask=i < n)
    tl.store(which_a + pair * m + j, tl.argmin(squared, 0, tie_break_left=True), mask=j < m)


@triton.jit
def _pairs_backward_kernel(  # type: ignore[no-untyped-def]
    a, b, which_b, which_a, grad_b, grad_a, out_a, out_b, n, m, NS: tl.constexpr, MS: tl.constexpr, ACC: tl.constexpr
):
    """Weights of the winning pairs as one tile, whose rows and columns sum up both gradients: nothing is added from two places."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NS)
    j = tl.arange(0, MS)
    chosen_b = tl.load(which_b + pair * n + i, mask=i < n, other=-1)
    chosen_a = tl.load(which_a + pair * m + j, mask=j < m, other=-1)
    up_b = tl.load(grad_b + pair * n + i, mask=i < n, other=0.0).to(ACC)
    up_a = tl.load(grad_a + pair * m + j, mask=j < m, other=0.0).to(ACC)
    weight = tl.where(chosen_b[:, None] == j[None, :], up_b[:, None], 0.0) + tl.where(chosen_a[None, :] == i[:, None], up_a[None, :], 0.0)
    for axis in tl.static_range(3):
        one = tl.load(a + (pair * n + i) * 3 + axis, mask=i < n, other=0.0).to(ACC)
        other = tl.load(b + (pair * m + j) * 3 + axis, mask=j < m, other=0.0).to(ACC)
        along = 2 * weight * (one[:, None] - other[None, :])
        tl.store(out_a + (pair * n + i) * 3 + axis, tl.sum(along, 1), mask=i < n)
        tl.store(out_b + (pair * m + j) * 3 + axis, -tl.sum(along, 0), mask=j < m)


def pair_warps(size: int) -> int:
    return 1 if size <= 32 else 4


def _pair_options(a: Tensor, b: Tensor) -> dict[str, Any]:
    n, m = (max(4, triton.next_power_of_2(points.shape[1])) for points in (a, b))
    return {"NS": n, "MS": m, "ACC": dtype_of(a.dtype), "num_warps": pair_warps(max(n, m)), "enable_fp_fusion": False}


@torch.library.custom_op("contramask::nearest_pairs", mutates_args=())
def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = a.shape
    m = b.shape[1]
    to_b, to_a = a.new_empty(batch, n), a.new_empty(batch, m)
    which_b, which_a = torch.empty(batch, n, dtype=torch.int32, device=a.device), torch.empty(batch, m, dtype=torch.int32, device=a.device)
    with on_device(a):
        _pairs_kernel[(batch,)](a, b, to_b, to_a, which_b, which_a, n, m, **_pair_options(a, b))
    return to_b, to_a, which_b, which_a


@_pairs.register_fake
def _(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_b, to_a = a.new_empty(a.shape[:2]), a.new_empty(b.shape[:2])
    return to_b, to_a, torch.empty_like(to_b, dtype=torch.int32), torch.empty_like(to_a, dtype=torch.int32)


@torch.library.custom_op("contramask::nearest_pairs_backward", mutates_args=())
def _pairs_backward(a: Tensor, b: Tensor, which_b: Tensor, which_a: Tensor, grad_b: Tensor, grad_a: Tensor) -> tuple[Tensor, Tensor]:
    out_a, out_b = torch.empty_like(a), torch.empty_like(b)
    n, m = a.shape[1], b.shape[1]
    with on_device(a):
        _pairs_backward_kernel[(a.shape[0],)](a, b, which_b, which_a, grad_b, grad_a, out_a, out_b, n, m, **_pair_options(a, b))
    return out_a, out_b


@_pairs_backward.register_fake
def _(a: Tensor, b: Tensor, which_b: Tensor, which_a: Tensor, grad_b: Tensor, grad_a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _backward(ctx: Any, grad_b: Tensor, grad_a: Tensor, _which_b: Any, _which_a: Any) -> tuple[Tensor, Tensor]:
    return _pairs_backward(*ctx.saved_tensors, grad_b.contiguous(), grad_a.contiguous())


_pairs.register_autograd(_backward, setup_context=_setup)


def nearest_pairs(a: Tensor, b: Tensor, *, path: Path = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest neighbours between two sets, both ways.

    Args:
        a: (B, n, 3), b: (B, m, 3), n, m >= 1; float32 (lower precision is cast up) or float64.
    Returns:
        squared distances (B, n) of each a to its nearest b and (B, m) of each b to its nearest a, then the winners' indices (int64, lowest on ties).
        The gradient reaches both sets, through winners alone.
    """
    _check("a", a)
    _check("b", b)
    if a.shape[0] != b.shape[0] or a.shape[1] < 1 or b.shape[1] < 1:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: expected equal batches of at least one point")
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(kind), b.to(kind)
    if path == "auto":
        fits = max(a.shape[1], b.shape[1]) <= LARGEST_SET
        path = choose(a, fits and kind == torch.float32)
    if path == "plain":
        return _pairs_reference(a, b)
    if path == "tiled":
        return _pairs_tiled(a, b)
    require(a)
    to_b, to_a, which_b, which_a = _pairs(a.contiguous(), b.contiguous())
    return to_b, to_a, which_b.long(), which_a.long()


def chamfer(a: Tensor, b: Tensor, kind: Literal["l2", "l1"] = "l2", *, path: Path = "auto") -> Tensor:
    """Chamfer distance of point sets (B, n, 3) and (B, m, 3), 0-d: means over batch and points, d squared distances to the nearest.

    "l2" = mean d_a + mean d_b (no half); "l1" = (mean sqrt d_a + mean sqrt d_b) / 2, whose gradient at distance 0 is 0. (pytorch3d's `norm=1` is another measure.)
    """
    to_b, to_a, *_ = nearest_pairs(a, b, path=path)
    if kind == "l2":
        return to_b.mean() + to_a.mean()
    return (_root(to_b).mean() + _root(to_a).mean()) / 2


def _root(squared: Tensor) -> Tensor:
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
