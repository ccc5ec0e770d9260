"""Patches of 1-D, 2-D and 3-D inputs and back; patch embedding of all or only the visible patches; position tables.

Patches are numbered row-major over the grid: (time,) row, column, the last axis fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Channels = Literal["last", "first"]


# -- patches -----------------------------------------------------------------------------------------------------------


def grid_of(inputs: Tensor, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis of inputs (B, C, *sides).

    Raises:
        ValueError: number of axes, or a side that is not a multiple of its patch.
    """
    sides = inputs.shape[2:]
    if len(sides) != len(patch_size) or len(sides) not in (1, 2, 3):
        raise ValueError(f"expected (B, C, *sides) with {len(patch_size)} sides for patches {tuple(patch_size)}, got {tuple(inputs.shape)}")
    if any(side == 0 or side % size for side, size in zip(sides, patch_size, strict=True)):
        valid = tuple(max(size, -(-side // size) * size) for side, size in zip(sides, patch_size, strict=True))
        raise ValueError(
            f"expected sides that are multiples of the patch {tuple(patch_size)}, got {tuple(sides)}; the next valid size is {valid}"
        )
    return tuple(side // size for side, size in zip(sides, patch_size, strict=True))


def patchify(inputs: Tensor, patch_size: Sequence[int], channels: Channels = "last") -> Tensor:
    """Cut inputs (B, C, *sides) into patches (B, N, C * prod(patch_size)).

    Inside a patch the values run over (time,) row, column and then channel ("last": "p q c" of MAE, VideoMAE, SparK),
    or over channel, then (time,) row, column ("first": "c p q" of CROMA and of convolution weights).
    """
    return _flatten(_windows(inputs, patch_size), len(patch_size), channels).flatten(1, len(patch_size))


def unpatchify(patches: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: Channels = "last") -> Tensor:
    """Inverse of `patchify`: patches (B, N, C * prod(patch_size)) on a grid -> (B, C, *sides)."""
    axes, size = len(grid), prod(patch_size)
    if patches.ndim != 3 or patches.shape[1] != prod(grid) or patches.shape[2] % size or axes != len(patch_size):
        raise ValueError(
            f"expected (B, {prod(grid)}, a multiple of {size}) for grid {tuple(grid)} and patches {tuple(patch_size)}, "
            f"got {tuple(patches.shape)}"
        )
    count = patches.shape[2] // size
    if channels == "last":
        blocks = patches.reshape(len(patches), *grid, *patch_size, count).movedim(-1, 1)
    else:
        blocks = patches.reshape(len(patches), *grid, count, *patch_size).movedim(axes + 1, 1)
    pairs = [axis for i in range(axes) for axis in (2 + i, 2 + axes + i)]  # (B, C, g1, g2, p, q) -> (B, C, g1, p, g2, q)
    return blocks.permute(0, 1, *pairs).reshape(len(patches), count, *(g * p for g, p in zip(grid, patch_size, strict=True)))


def take_patches(inputs: Tensor, patch_size: Sequence[int], keep: Tensor, channels: Channels = "last") -> Tensor:
    """Patches keep (B, K) of inputs: `patchify` followed by a gather, but only the K patches are copied: (B, K, ...)."""
    grid = grid_of(inputs, patch_size)
    if keep.ndim != 2 or len(keep) != len(inputs):
        raise ValueError(f"keep: expected ({len(inputs)}, K) patch numbers, got {tuple(keep.shape)}")
    sample = torch.arange(len(inputs), device=inputs.device)[:, None]
    taken = _windows(inputs, patch_size)[(sample, *torch.unravel_index(keep, grid))]
    return _flatten(taken, len(patch_size), channels)


class PatchEmbed(nn.Module):
    """Linear map of each patch to a token; `proj` is the convolution (kernel = stride) of MAE, VideoMAE and HiCMAE.

    Args:
        channels: C; patch_size: one size an axis (1 to 3 axes).
    """

    def __init__(self, channels: int, embed_dim: int, patch_size: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(patch_size))
        if convolution is None:
            raise ValueError(f"patch_size: expected 1 to 3 axes, got {tuple(patch_size)}")
        self.patch_size = tuple(patch_size)
        self.proj = convolution(channels, embed_dim, self.patch_size, stride=self.patch_size, bias=bias)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) of inputs (B, C, *sides), or with keep (B, K) only those, (B, K, D), in the order of `keep`."""
        if inputs.ndim < 2 or inputs.shape[1] != self.proj.in_channels:
            raise ValueError(f"expected {self.proj.in_channels} channels, (B, C, *sides), got {tuple(inputs.shape)}")
        if keep is None:
            patches = patchify(inputs, self.patch_size, "first")
        else:
            patches = take_patches(inputs, self.patch_size, keep, "first")
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


# -- positions ---------------------------------------------------------------------------------------------------------


def grid_positions(grid: Sequence[int]) -> Tensor:
    """(N, axes) float coordinates of the patches of a grid, in patch units."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij"), -1).flatten(0, -2)


def sincos_1d(positions: int | Tensor, dim: int, *, interleaved: bool = False) -> Tensor:
    """Fixed sine-cosine table (N, dim), float32, computed in float64; frequencies 10000^(-2k/dim), k = 0..dim/2-1.

    Args:
        positions: number N, or the coordinates (N,) themselves.
        interleaved: False = [sin | cos] (MAE); True = sin at even, cos at odd columns (VideoMAE's and HiCMAE's table over
            the flat token index).
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected an even number, got {dim}")
    place = torch.arange(positions, dtype=torch.float64) if isinstance(positions, int) else positions.double()
    frequency = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=place.device) * 2 / dim)
    angle = place[:, None] * frequency
    parts = (angle.sin(), angle.cos())
    return (torch.stack(parts, 2).flatten(1) if interleaved else torch.cat(parts, 1)).float()


def sincos_2d(grid: tuple[int, int], dim: int, *, column_first: bool = True, prefix: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine table (prefix + rows * columns, dim), one half of the columns for each axis, [sin | cos] each.

    Args:
        column_first: True = the first half encodes the column, the second the row (MAE, CROMA, MR-MAE); False = the reverse.
        prefix: rows of zeros in front (class token).
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim: expected a multiple of 4, got {dim}")
    place = grid_positions(grid)
    row, column = sincos_1d(place[:, 0], dim // 2), sincos_1d(place[:, 1], dim // 2)
    table = torch.cat([column, row] if column_first else [row, column], 1)
    return torch.cat([table.new_zeros(prefix, dim), table])


def separable(temporal: Tensor, spatial: Tensor) -> Tensor:
    """Sum of a temporal (T, D) and a spatial (S, D) table over tokens time * S + place: (T * S, D); learned or fixed (mae_st)."""
    return (temporal[:, None] + spatial[None]).flatten(0, 1)


def interpolate_positions(table: Tensor, old: Sequence[int], new: Sequence[int], *, prefix: int = 0) -> Tensor:
    """Resize a position table (N, D) or (1, N, D) from one grid to another, the `prefix` rows in front unchanged.

    Linear (1-D), bicubic (2-D), trilinear (3-D), align_corners off, without antialiasing, in float32.
    """
    rows = table.shape[-2]
    if rows != prefix + prod(old) or len(old) != len(new):
        raise ValueError(f"table: expected {prefix} + {tuple(old)} rows for a new grid of {len(old)} axes, got {rows} rows, {tuple(new)}")
    if tuple(old) == tuple(new):
        return table
    front, rest = table[..., :prefix, :], table[..., prefix:, :]
    field = rest.reshape(1, *old, table.shape[-1]).movedim(-1, 1).float()
    field = F.interpolate(field, size=tuple(new), mode={1: "linear", 2: "bicubic", 3: "trilinear"}[len(old)], align_corners=False)
    resized = field.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([front, resized.reshape(*table.shape[:-2], prod(new), table.shape[-1])], -2)


# -- parts -------------------------------------------------------------------------------------------------------------


def _windows(inputs: Tensor, patch_size: Sequence[int]) -> Tensor:
    """View (B, *grid, C, *patch) of inputs (B, C, *sides)."""
    grid = grid_of(inputs, patch_size)
    axes = len(grid)
    split = inputs.reshape(*inputs.shape[:2], *(n for pair in zip(grid, patch_size, strict=True) for n in pair))
    return split.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))


def _flatten(windows: Tensor, axes: int, channels: Channels) -> Tensor:
    """(..., C, *patch) -> (..., values), in the inner order asked for."""
    if channels not in ("last", "first"):
        raise ValueError(f"channels: expected last or first, got {channels!r}")
    return (windows.movedim(-axes - 1, -1) if channels == "last" else windows).flatten(-axes - 1)
