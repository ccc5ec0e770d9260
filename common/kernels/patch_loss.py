"""Mean squared error of masked patches against normalised pixels, without an array of targets.

t = (x - mean) / sqrt(variance + eps), or / (std + eps), over a patch or over each of its channels, unbiased variance;
loss_s = mean over the entries of split s of (pred - t)^2. The mean over hidden patches stays with the caller, who knows the global batch.
MAE, MR-MAE, MixedAE, the video MAEs (patch, eps inside the root), HiCMAE (channel, eps outside, frame difference), CROMA (two sensors, one statistic).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from common.kernels._triton import AVAILABLE, dtype_of, on_device, require, tl, triton, up

Order = Literal["p q c", "c p q"]
Normalise = Literal["patch", "channel", "none"]
Path = Literal["auto", "plain", "tiled", "triton"]

LARGEST_PATCH = 4096
"""Entries that one Triton program holds in registers; larger patches take the torch path."""


# ---------------------------------------------------------------------------------------------------------------- definition
def targets(
    image: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    kind: torch.dtype,
) -> Tensor:
    """Normalised pixels of the patches that `index` (..., K) names, (..., K, t p q, C) or (..., K, C, t p q) by order; image is (..., C, T, H, W)."""
    x = _patches(image, index, patch).to(kind)  # (..., K, C, t p q)
    if image.dtype == torch.uint8:
        x.div_(255)
    if std is not None:
        x.mul_(std.to(kind)[:, None])
    if mean is not None:
        x.add_(mean.to(kind)[:, None])
    if normalise != "none":
        over = (-1,) if normalise == "channel" else (-2, -1)
        x.sub_(x.mean(over, keepdim=True))
        # the norm of centred values: torch.var_mean is 40 times slower here on a CPU
        std_of = torch.linalg.vector_norm(x, dim=over, keepdim=True).div_(math.sqrt(math.prod(x.shape[i] for i in over) - 1))
        x.div_(std_of.square_().add_(eps).sqrt_() if eps_inside else std_of.add_(eps))
    if difference:
        frames = x.unflatten(-1, (patch[0], -1))
        frames[..., 1:, :] -= frames[..., :1, :].clone()
    return x.mT if order == "p q c" else x


def _patches(image: Tensor, index: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Pixels (..., K, C, t p q) of the named patches, in the order of the image. All are laid out first: runs of a row copy faster than single ones."""
    *batch, channels, t, h, w = image.shape
    cells = image.reshape(*batch, channels, t // patch[0], patch[0], h // patch[1], patch[1], w // patch[2], patch[2])
    first = len(batch)
    cells = cells.permute(*range(first), *(first + i for i in (1, 3, 5, 0, 2, 4, 6))).reshape(*batch, -1, channels, math.prod(patch))
    if batch:
        return cells[torch.arange(batch[0], device=index.device)[:, None], index]
    return cells.index_select(0, index)


def reference(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
) -> Tensor:
    """The definition; `patch` as (frames, rows, columns), image (B, C, T, H, W), split 0 = none."""
    kind = _kind(pred)
    error = (
        pred.to(kind) - targets(image, index, patch, order, normalise, eps, eps_inside, mean, std, difference, kind).flatten(-2)
    ).square()
    parts = error.split([split, error.shape[-1] - split], -1) if split else (error,)
    return torch.stack([part.mean(-1) for part in parts], -1)


def _kind(pred: Tensor) -> torch.dtype:
    return torch.float64 if pred.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------- a sample at a time
def _tiled_forward(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
) -> tuple[Tensor, Tensor]:
    """Loss and the errors pred - t, the one array that the gradient needs."""
    kind = _kind(pred)
    errors = torch.empty(pred.shape, dtype=kind, device=pred.device)
    loss = errors.new_empty(*pred.shape[:2], 2 if split else 1)
    for i in range(pred.shape[0]):
        target = targets(image[i], index[i], patch, order, normalise, eps, eps_inside, mean, std, difference, kind)
        error = errors[i]
        torch.sub(pred[i].to(kind).view(target.shape), target, out=error.view(target.shape))
        parts = error.split([split, error.shape[-1] - split], -1) if split else (error,)
        for s, part in enumerate(parts):
            torch.linalg.vector_norm(part, dim=-1, out=loss[i, :, s]).square_().div_(part.shape[-1])
    return loss, errors


# ---------------------------------------------------------------------------------------------------------------- Triton
@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    pred,
    image,
    index,
    mean,
    std,
    grad,
    out,
    patches_a_sample,
    image_stride,
    T,
    H,
    W,
    C: tl.constexpr,
    FRAMES: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    EPS: tl.constexpr,
    EPS_INSIDE: tl.constexpr,
    CHANNEL_LAST: tl.constexpr,
    BY_PATCH: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    BYTES: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    BACKWARD: tl.constexpr,
    UP: tl.constexpr,
    UP_IMAGE: tl.constexpr,
    ACC: tl.constexpr,
    CS: tl.constexpr,
    VS: tl.constexpr,
):
    """One program a patch, its pixels held as (channels, t p q). Forward writes the loss of each split, backward the gradient of pred."""
    program = tl.program_id(0).to(tl.int64)
    V: tl.constexpr = FRAMES * DOWN * RIGHT
    P: tl.constexpr = C * V
    which = tl.load(index + program).to(tl.int64)
    across = W // RIGHT
    high = H // DOWN
    corner = (which // (across * high) * FRAMES * H + which // across % high * DOWN) * W + which % across * RIGHT
    c = tl.arange(0, CS)[:, None]
    v = tl.arange(0, VS)[None, :]
    inside = (c < C) & (v < V)
    in_frame = v % (DOWN * RIGHT)
    pixel = in_frame // RIGHT * W + in_frame % RIGHT
    start = image + program // patches_a_sample * image_stride + corner + c.to(tl.int64) * T * H * W
    x = tl.load(start + v // (DOWN * RIGHT) * H * W + pixel, mask=inside, other=0)
    if UP_IMAGE:
        x = x.to(tl.float32)
    x = x.to(ACC)
    if BYTES:
        x = x / 255
    if STD:
        x = x * tl.load(std + c, mask=c < C, other=1.0).to(ACC)
    if MEAN:
        x = x + tl.load(mean + c, mask=c < C, other=0.0).to(ACC)
    x = tl.where(inside, x, 0.0)
    if BY_PATCH:
        middle = tl.sum(tl.sum(x, 1), 0) / P
        centred = tl.where(inside, x - middle, 0.0)
        variance = tl.sum(tl.sum(centred * centred, 1), 0) / (P - 1)
        if EPS_INSIDE:
            target = centred / tl.sqrt(variance + EPS)
        else:
            target = centred / (tl.sqrt(variance) + EPS)
    elif BY_CHANNEL:
        middle = tl.sum(x, 1)[:, None] / V
        centred = tl.where(inside, x - middle, 0.0)
        variance = tl.sum(centred * centred, 1)[:, None] / (V - 1)
        if EPS_INSIDE:
            target = centred / tl.sqrt(variance + EPS)
        else:
            target = centred / (tl.sqrt(variance) + EPS)
    else:
        target = x
    if DIFFERENCE:  # the first frame of the patch, normalised alike, is taken off the others
        first = tl.load(start + pixel + v * 0, mask=inside, other=0)
        if UP_IMAGE:
            first = first.to(tl.float32)
        first = first.to(ACC)
        if BYTES:
            first = first / 255
        if STD:
            first = first * tl.load(std + c, mask=c < C, other=1.0).to(ACC)
        if MEAN:
            first = first + tl.load(mean + c, mask=c < C, other=0.0).to(ACC)
        if BY_PATCH or BY_CHANNEL:
            first = first - middle
            if EPS_INSIDE:
                first = first / tl.sqrt(variance + EPS)
            else:
                first = first / (tl.sqrt(variance) + EPS)
        target = tl.where(v < DOWN * RIGHT, target, target - first)
    if CHANNEL_LAST:
        entry = v * C + c
    else:
        entry = c * V + v
    guess = tl.load(pred + program * P + entry, mask=inside, other=0.0)
    if UP:
        guess = guess.to(tl.float32)
    error = tl.where(inside, guess.to(ACC) - target, 0.0)
    if SPLIT == 0:
        if BACKWARD:
            factor = tl.load(grad + program).to(ACC) * (2.0 / P)
            tl.store(out + program * P + entry, error * factor, mask=inside)
        else:
            tl.store(out + program, tl.sum(tl.sum(error * error, 1), 0) / P)
    else:
        if BACKWARD:
            one = tl.load(grad + program * 2).to(ACC) * (2.0 / SPLIT)
            two = tl.load(grad + program * 2 + 1).to(ACC) * (2.0 / (P - SPLIT))
            tl.store(out + program * P + entry, error * tl.where(entry < SPLIT, one, two), mask=inside)
        else:
            square = error * error
            tl.store(out + program * 2, tl.sum(tl.sum(tl.where(entry < SPLIT, square, 0.0), 1), 0) / SPLIT)
            tl.store(out + program * 2 + 1, tl.sum(tl.sum(tl.where(entry < SPLIT, 0.0, square), 1), 0) / (P - SPLIT))


def _triton(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: tuple[int, ...],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
    grad: Tensor | None,
) -> Tensor:
    """Loss (B, K, S), or with `grad` of that shape the gradient (B, K, P) of pred."""
    kind = _kind(pred)
    batch, count, _entries = pred.shape
    channels, t, h, w = image.shape[1:]
    out = torch.empty(pred.shape if grad is not None else (batch, count, 2 if split else 1), dtype=kind, device=pred.device)
    values = math.prod(patch)
    block = triton.next_power_of_2(channels) * triton.next_power_of_2(values)
    with on_device(pred):
        _kernel[(batch * count,)](
            pred,
            image,
            index,
            pred if mean is None else mean,
            pred if std is None else std,
            pred if grad is None else grad,
            out,
            count,
            image.stride(0),
            t,
            h,
            w,
            C=channels,
            FRAMES=patch[0],
            DOWN=patch[1],
            RIGHT=patch[2],
            SPLIT=split,
            EPS=eps,
            EPS_INSIDE=eps_inside,
            CHANNEL_LAST=order == "p q c",
            BY_PATCH=normalise == "patch",
            BY_CHANNEL=normalise == "channel",
            MEAN=mean is not None,
            STD=std is not None,
            BYTES=image.dtype == torch.uint8,
            DIFFERENCE=difference,
            BACKWARD=grad is not None,
            UP=up(pred.dtype),
            UP_IMAGE=up(image.dtype),
            ACC=dtype_of(kind),
            CS=triton.next_power_of_2(channels),
            VS=triton.next_power_of_2(values),
            num_warps=WARPS[0] if block <= 2048 else WARPS[1],
            enable_fp_fusion=True,
        )
    return out


WARPS = (4, 8)
"""For patches of at most 2,048 entries (padded), and above; not fitted on a GPU yet."""


# ---------------------------------------------------------------------------------------------------------------- operators
@torch.library.custom_op("contramask::patch_loss", mutates_args=())
def _patch_loss(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: Sequence[int],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    options = (tuple(patch), order, normalise, eps, eps_inside, mean, std, difference, split)
    if fused:
        return _triton(pred, image, index, *options, None), pred.new_empty(0)
    return _tiled_forward(pred, image, index, *options)


@_patch_loss.register_fake
def _(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: Sequence[int],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty(*pred.shape[:2], 2 if split else 1, dtype=_kind(pred))
    return loss, pred.new_empty(0) if fused else torch.empty(pred.shape, dtype=_kind(pred), device=pred.device)


@torch.library.custom_op("contramask::patch_loss_backward", mutates_args=())
def _patch_loss_backward(
    grad: Tensor,
    errors: Tensor,
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: Sequence[int],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
    fused: bool,
) -> Tensor:
    if fused:
        return _triton(pred, image, index, tuple(patch), order, normalise, eps, eps_inside, mean, std, difference, split, grad).to(
            pred.dtype
        )
    sizes = [split, pred.shape[-1] - split] if split else [pred.shape[-1]]
    parts = zip(errors.split(sizes, -1), grad.unbind(-1), sizes, strict=True)
    if not split:
        return (errors * (grad * (2 / sizes[0]))).to(pred.dtype)
    return torch.cat([error * (above * (2 / size))[..., None] for error, above, size in parts], -1).to(pred.dtype)


@_patch_loss_backward.register_fake
def _(
    grad: Tensor,
    errors: Tensor,
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: Sequence[int],
    order: str,
    normalise: str,
    eps: float,
    eps_inside: bool,
    mean: Tensor | None,
    std: Tensor | None,
    difference: bool,
    split: int,
    fused: bool,
) -> Tensor:
    return pred.new_empty(pred.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    pred, image, index, *middle, mean, std, difference, split, fused = inputs
    ctx.save_for_backward(output[1], pred, image, index, mean, std)
    ctx.options = (middle, difference, split, fused)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _errors):  # type: ignore[no-untyped-def]
    errors, pred, image, index, mean, std = ctx.saved_tensors
    middle, difference, split, fused = ctx.options
    grad_pred = _patch_loss_backward(grad.contiguous(), errors, pred, image, index, *middle, mean, std, difference, split, fused)
    return grad_pred, *([None] * 12)


_patch_loss.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------------------- public
def patch_loss(
    pred: Tensor,
    image: Tensor,
    index: Tensor,
    patch: int | Sequence[int],
    *,
    order: Order = "p q c",
    normalise: Normalise = "patch",
    eps: float = 1e-6,
    eps_inside: bool = True,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    difference: bool = False,
    split: int | None = None,
    path: Path = "auto",
) -> Tensor:
    """Mean squared error of each predicted patch against its normalised pixels (module docstring); gradient to `pred` alone.

    Args:
        pred: (B, K, P) with P = C x the pixels of a patch; float32, bfloat16, float16 or float64.
        image: (B, C, H, W), or (B, C, T, H, W); uint8 counts as value / 255.
        index: (B, K) int64, the patch (row-major; frame, row, column) that each prediction stands for; in range, which is not checked on a GPU.
        patch: side, or (rows, columns), or (frames, rows, columns).
        order: entries of a prediction, "p q c" = channel fastest (MAE), "c p q" = channel slowest (CROMA); frames come before rows.
        normalise: "patch" = one mean and variance over all P entries, "channel" = one each channel, "none" = pixels as they are.
        eps, eps_inside: divide by sqrt(variance + eps), or by std + eps.
        mean, std: (C,), of the normalisation that is undone first: x * std + mean.
        difference: frames of a patch after the first have the first one's normalised pixels taken off (HiCMAE).
        split: entries of a first sensor; gives two means, over entries before and from it, sharing one statistic (CROMA).
    Returns:
        (B, K, 1), or (B, K, 2) with `split`; float32 (float64 for float64). A constant patch has target 0.
    Raises:
        ValueError: shapes do not fit, or image requires a gradient.
    """
    if isinstance(patch, int):
        patch = (patch, patch)
    if image.ndim not in (4, 5) or len(patch) not in (2, 3) or len(patch) > image.ndim - 2:
        raise ValueError(
            f"image {tuple(image.shape)} and patch {tuple(patch)}: expected (B, C, H, W) or (B, C, T, H, W) and a patch of two or three sides"
        )
    sides = (1, *patch) if len(patch) == 2 else tuple(patch)
    image = image[:, :, None] if image.ndim == 4 else image
    if any(size % side for size, side in zip(image.shape[2:], sides, strict=True)):
        raise ValueError(f"image {tuple(image.shape[2:])}: not a whole number of patches of {sides}")
    entries = image.shape[1] * math.prod(sides)
    if pred.ndim != 3 or pred.shape[-1] != entries or index.shape != pred.shape[:2] or image.shape[0] != pred.shape[0]:
        raise ValueError(
            f"pred {tuple(pred.shape)}, index {tuple(index.shape)}, image batch {image.shape[0]}: expected (B, K, {entries}), (B, K) and B"
        )
    if image.requires_grad:
        raise ValueError("image requires a gradient, which targets do not carry; pass image.detach()")
    if split is not None and not 0 < split < entries:
        raise ValueError(f"split={split}: expected 1 to {entries - 1}")
    if normalise != "none" and (entries if normalise == "patch" else math.prod(sides)) < 2:
        raise ValueError("normalise: one entry has no variance; use normalise='none'")
    shift, spread = (None if given is None else torch.as_tensor(given, dtype=_kind(pred), device=pred.device) for given in (mean, std))
    if pred.numel() == 0:
        path, normalise = "plain", "none"
    options = (sides, order, normalise, eps, eps_inside, shift, spread, difference, split or 0)
    if path == "auto":
        path = choose(pred)
    if path == "plain":
        return reference(pred, image, index, *options)
    if path == "triton":
        require(pred)
        pred, image, index = pred.contiguous(), image.contiguous(), index.contiguous()
    return _patch_loss(pred, image, index, *options, path == "triton")[0]


def choose(pred: Tensor) -> Literal["plain", "tiled", "triton"]:
    """The path that "auto" takes: Triton never runs on a CPU."""
    if pred.dtype == torch.float64:
        return "plain"
    return "triton" if pred.is_cuda and AVAILABLE and pred.shape[-1] <= LARGEST_PATCH else "tiled"
