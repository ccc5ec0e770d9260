"""Patch loss against the definition on every path: options, odd sizes, types, gradients, compilation, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from common.kernels import patch_loss as p
from common.kernels.patch_loss import patch_loss

SETTINGS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {  # image without batch, patch, options
    "mae": ((3, 8, 12), (4, 4), {}),
    "rectangle": ((2, 6, 15), (2, 5), {"order": "c p q", "eps_inside": False}),
    "27 entries": ((3, 9, 6), (3, 3), {"normalise": "none"}),
    "one channel": ((1, 8, 8), (4, 4), {"normalise": "channel"}),
    "hicmae": (
        (3, 4, 8, 8),
        (2, 4, 4),
        {"normalise": "channel", "eps_inside": False, "mean": [0.4, 0.5, 0.3], "std": [0.2, 0.3, 0.1], "difference": True},
    ),
    "difference of pixels": ((2, 4, 4, 6), (2, 2, 3), {"normalise": "none", "difference": True, "order": "c p q"}),
    "difference, one statistic": ((2, 3, 4, 6), (3, 2, 3), {"normalise": "patch", "difference": True, "mean": [1.0, 2.0]}),
    "croma": ((5, 8, 8), (4, 4), {"order": "c p q", "split": 48}),
    "split, channel last": ((3, 4, 4), (2, 2), {"split": 5}),
    "1536 entries": ((6, 16, 32), (16, 16), {}),
}


def case(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    shape, patch, options = SETTINGS[name]
    random = torch.Generator().manual_seed(0)
    sides = (1, *patch) if len(patch) == 2 else patch
    space = (1, *shape[1:]) if len(shape) == 3 else shape[1:]
    count = torch.tensor(space).div(torch.tensor(sides), rounding_mode="floor").prod().item()
    entries = shape[0] * int(torch.tensor(sides).prod())
    image = torch.randn(2, *shape, generator=random, dtype=torch.float64).to(device, dtype)
    index = torch.stack([torch.randperm(count, generator=random)[: max(1, count // 2)] for _ in range(2)]).to(device)
    pred = torch.randn(2, index.shape[1], entries, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()
    return pred, image, index, patch, options


def run(pred: Tensor, *given: Any, path: p.Path, **options: Any) -> list[Tensor]:
    pred = pred.detach().clone().requires_grad_()
    loss = patch_loss(pred, *given, path=path, **options)
    (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)).sum().backward()
    return [loss.detach(), pred.grad]


@pytest.mark.parametrize("path", ["tiled", "triton"])
@pytest.mark.parametrize("name", SETTINGS)
def test_paths_equal_the_definition(name: str, path: p.Path, device: str, exact: tuple) -> None:
    dtype, bound = exact
    pred, *given, options = case(name, dtype, device)
    for got, want in zip(run(pred, *given, path=path, **options), run(pred, *given, path="plain", **options), strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_two_loops_over_patches_say_the_same(path: p.Path, device: str, exact: tuple) -> None:
    """MAE's target from the paper: pixels of the patch in row, column, channel order, less their mean, over sqrt(variance + 1e-6)."""
    dtype, bound = exact
    pred, image, index, patch, _ = case("mae", dtype, device)
    got = patch_loss(pred, image, index, patch, path=path)
    for b in range(2):
        for k, which in enumerate(index[b].tolist()):
            top, left = which // 3 * 4, which % 3 * 4
            pixels = image[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).reshape(-1)
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            torch.testing.assert_close(got[b, k, 0], (pred[b, k] - target).square().mean(), rtol=bound, atol=bound)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_constant_patches_bytes_and_low_precision(path: p.Path, device: str) -> None:
    pred = torch.full((1, 1, 12), 2.0, device=device, requires_grad=True)
    constant = patch_loss(
        pred, torch.full((1, 3, 2, 2), 7.0, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device), 2, path=path
    )
    assert constant.item() == 4.0  # the target of a constant patch is 0
    image = torch.arange(24, dtype=torch.uint8, device=device).reshape(1, 3, 2, 4) * 10
    low = torch.linspace(-1, 1, 12, device=device).bfloat16().reshape(1, 1, 12)
    index = torch.ones(1, 1, dtype=torch.int64, device=device)
    got, grad = run(low, image, index, 2, path=path, normalise="none")
    want, exact_grad = run(low.double(), image.double() / 255, index, 2, path="plain", normalise="none")
    assert got.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, exact_grad.bfloat16(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("path", ["plain", "tiled", "triton"])
def test_nothing_hidden_gives_nothing(path: p.Path, device: str) -> None:
    pred = torch.zeros(2, 0, 12, device=device, requires_grad=True)
    loss = patch_loss(pred, torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 0, dtype=torch.int64, device=device), 2, path=path)
    loss.sum().backward()
    assert loss.shape == (2, 0, 1)
    assert pred.grad.shape == (2, 0, 12)


@pytest.mark.parametrize("path", ["tiled", "triton"])
def test_gradcheck_operator_and_compile(path: p.Path, device: str, exact: tuple) -> None:
    dtype, _ = exact
    pred, image, index, patch, options = case("hicmae", dtype, device)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: patch_loss(x, image, index, patch, path=path, **options), pred, fast_mode=True)
    spread = torch.ones(3, dtype=dtype, device=device)
    operator = torch.ops.contramask.patch_loss.default
    torch.library.opcheck(operator, (pred, image, index, [2, 4, 4], "p q c", "patch", 1e-6, True, None, spread, False, 0, path == "triton"))
    want = run(pred, image, index, patch, path=path, **options)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: patch_loss(x, image, index, patch, path=path, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pred), want[0])


def test_path_is_chosen_by_device_and_type() -> None:
    pred = torch.empty(1, 1, 12, device="meta")
    assert p.choose(pred) == "tiled"
    assert p.choose(pred.double()) == "plain"


def test_errors() -> None:
    pred, image, index = torch.zeros(2, 4, 12), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \(B, K, 27\)"):
        patch_loss(pred, torch.zeros(2, 3, 6, 6), index, 3)
    with pytest.raises(ValueError, match="not a whole number of patches"):
        patch_loss(pred, image, index, 3)
    with pytest.raises(ValueError, match=r"pass image\.detach\(\)"):
        patch_loss(pred, image.requires_grad_(), index, 2)
    with pytest.raises(ValueError, match="split=12: expected 1 to 11"):
        patch_loss(pred, image.detach(), index, 2, split=12)
    with pytest.raises(ValueError, match="patch of two or three sides"):
        patch_loss(pred, image.detach(), index, (1, 2, 2))
