"""Sampling, neighbours and chamfer against loops that follow the CUDA kernels' rules, on every path."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.kernels import points as p
from common.kernels.points import chamfer, farthest_points, knn_group, nearest_pairs

PATHS = ["plain", "tiled", "triton"]


def cloud(batch: int, count: int, device: str, seed: int = 0, grid: float | None = None) -> Tensor:
    made = torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (made if grid is None else (made / grid).round() * grid).to(device)


def farthest_by_loops(points: Tensor, count: int) -> list[int]:
    """One cloud, thread by thread, as pointnet2_ops' kernel runs: a strict `>` inside a thread, then a tree over threads."""
    n = len(points)
    threads = min(1 << (n.bit_length() - 1), 512)
    running, picked = [1e10] * n, [0]
    for _ in range(count - 1):
        best = [(-1.0, 0)] * threads
        for j in range(n):
            if (points[j] * points[j]).sum() <= 1e-3:
                continue
            d = points[j] - points[picked[-1]]
            running[j] = min(running[j], ((d[0] * d[0] + d[1] * d[1]) + d[2] * d[2]).item())
            if running[j] > best[j % threads][0]:
                best[j % threads] = (running[j], j)
        half = threads // 2
        while half:
            for t in range(half):
                if best[t + half][0] > best[t][0]:
                    best[t] = best[t + half]
            half //= 2
        picked.append(best[0][1])
    return picked


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("count", "picks", "grid"), [(1, 3, None), (13, 20, 0.5), (32, 8, None), (50, 12, 0.5)])
def test_farthest_points_follow_the_kernel_ties_included(count: int, picks: int, grid: float | None, path: p.Path, device: str) -> None:
    clouds = cloud(2, count, device, count, grid)
    clouds[0, count // 2] = 0.01  # near the origin: never picked after the start
    assert farthest_points(clouds, picks, path=path).tolist() == [farthest_by_loops(one.cpu(), picks) for one in clouds]


@pytest.mark.parametrize("path", PATHS)
def test_farthest_points_edges(path: p.Path, device: str) -> None:
    assert farthest_points(torch.full((2, 5, 3), 1e-3, device=device), 4, path=path).tolist() == [[0] * 4] * 2  # nothing is eligible
    assert farthest_points(cloud(1, 7, device), 1, path=path).tolist() == [[0]]
    half = cloud(1, 24, device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        got = farthest_points(half.requires_grad_(), 6, path=path)
    assert torch.equal(got, farthest_points(half.float(), 6, path="plain"))
    assert got.dtype == torch.int64
    assert not got.requires_grad


def test_points_are_checked() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        farthest_points(torch.full((1, 4, 3), float("nan")), 2)
    with pytest.raises(ValueError, match=r"expected \(B, N, 3\)"):
        farthest_points(torch.zeros(4, 3), 2)
    with pytest.raises(ValueError, match="expected at least one"):
        farthest_points(torch.zeros(1, 4, 3), 0)
    with pytest.raises(ValueError, match="1 <= k <= N"):
        knn_group(torch.zeros(1, 4, 3), torch.zeros(1, 2, 3), 5)
    with pytest.raises(ValueError, match="equal batches"):
        chamfer(torch.zeros(1, 4, 3), torch.zeros(2, 4, 3))
    with pytest.raises(ImportError, match="pointnet2_ops"):
        farthest_points(torch.zeros(1, 4, 3), 2, path="pointnet2")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("count", "k", "grid"), [(7, 7, None), (33, 5, 0.5), (40, 1, None)])
def test_neighbours_are_sorted_by_distance_then_index(count: int, k: int, grid: float | None, path: p.Path, device: str) -> None:
    points, centres = cloud(2, count, device, 1, grid), cloud(2, 4, device, 2, grid)
    got = knn_group(points, centres, k, path=path)
    for b in range(2):
        for g in range(4):
            d = centres[b, g] - points[b]
            squared = ((d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1]) + d[:, 2] * d[:, 2]).tolist()
            order = sorted(range(count), key=lambda j: (squared[j], j))[:k]
            assert got.index[b, g].tolist() == order
            torch.testing.assert_close(got.distance[b, g], torch.tensor(squared, device=device)[order].sqrt())
            assert torch.equal(got.neighbourhood[b, g], points[b, order] - centres[b, g])


def chamfer_by_loops(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances to the nearest, lowest index on ties, as differentiable tensors."""
    ways = []
    for one, other in ((a, b), (b, a)):
        found = [
            [min(((x - y).square().sum() for y in others), key=lambda d: d.item()) for x in ones]
            for ones, others in zip(one, other, strict=True)
        ]
        ways.append(torch.stack([torch.stack(each) for each in found]))
    return ways[0], ways[1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n", "m"), [(5, 9), (1, 1), (1, 6), (8, 3)])
def test_chamfer_and_its_gradient(n: int, m: int, path: p.Path, device: str, exact: tuple, monkeypatch: Any) -> None:
    monkeypatch.setattr(p, "DISTANCES_AT_ONCE", 2 * 2 * m)  # tiles of two rows
    dtype, bound = exact
    a, b = (cloud(2, size, device, seed).to(dtype).requires_grad_() for seed, size in enumerate((n, m)))
    to_b, to_a = chamfer_by_loops(a, b)
    for kind, want in (("l2", to_b.mean() + to_a.mean()), ("l1", (to_b.sqrt().mean() + to_a.sqrt().mean()) / 2)):
        expected = torch.autograd.grad(want, (a, b), retain_graph=True)
        got = chamfer(a, b, kind, path=path)
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
        torch.testing.assert_close(torch.autograd.grad(got, (a, b)), expected, rtol=10 * bound, atol=bound)


@pytest.mark.parametrize("path", PATHS)
def test_chamfer_of_equal_sets_has_no_gradient_and_ties_go_to_the_lowest(path: p.Path, device: str) -> None:
    a = cloud(1, 6, device).requires_grad_()
    b = a.detach().clone()
    loss = chamfer(a, b, "l1", path=path)
    loss.backward()
    assert loss.item() == 0
    assert a.grad.abs().max() == 0
    twice = a.detach()[:, [0, 0, 1, 1]]
    *_, which_b, which_a = nearest_pairs(twice, twice, path=path)
    assert which_b.tolist() == which_a.tolist() == [[0, 0, 2, 2]]


def test_chamfer_gradcheck_operator_and_compile(device: str, exact: tuple) -> None:
    dtype, _ = exact
    a, b = (cloud(2, size, device, size).to(dtype).requires_grad_() for size in (4, 3))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x, y: nearest_pairs(x, y, path="triton")[:2], (a, b))
    torch.library.opcheck(torch.ops.contramask.nearest_pairs.default, (a, b))
    for path in ("plain", "tiled", "triton"):
        points = cloud(1, 20, device)
        torch.library.opcheck(torch.ops.contramask.farthest_points.default, (points, 5, path))
        torch.library.opcheck(torch.ops.contramask.knn_group.default, (points, points[:, :3], 4, path))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: chamfer(x, y, path="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), chamfer(a, b, path="plain"))
