"""Layers of the hybrid backbone: patch maps, convolution blocks with a mask, and the depthwise convolution over visible blocks alone.

Maps are channels-last, (..., rows, columns, C), so that everything but the depthwise convolution is a matrix product over the last axis and works
alike on whole maps (B, H, W, C) and on visible blocks (B, K, b, b, C), b = positions of a stage along one side of a final patch.
Parameters carry the reference's names and shapes (Alpha-VL/ConvMAE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


class PatchMap(nn.Conv2d):
    """A convolution whose stride is its kernel: (..., r p, c p, C) -> (..., r, c, D) as one matrix product; p = 1 is a linear map."""

    def __init__(self, in_dim: int, out_dim: int, side: int = 1) -> None:
        super().__init__(in_dim, out_dim, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        side = self.stride[0]
        if side == 1:
            return F.linear(x, self.weight.flatten(1), self.bias)
        x = x.unflatten(-3, (-1, side)).unflatten(-2, (-1, side)).transpose(-4, -3).flatten(-3)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class StageEmbed(nn.Module):
    """Patch map, LayerNorm over channels, GELU: the entry of each stage (E1 to E3)."""

    def __init__(self, in_dim: int, out_dim: int, side: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.proj = PatchMap(in_dim, out_dim, side)
        self.norm = nn.LayerNorm(out_dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


@dataclass(frozen=True)
class VisibleBlocks:
    """Where the visible blocks of a stage lie on its zero-padded map, as flat row numbers of (B, P, P, C), P = g b + 2 reach.

    `cells` (B K b b,): the blocks' own positions; `windows` (B K w w,), w = b + 2 reach: what the convolution around each block reads.
    """

    cells: Tensor
    windows: Tensor
    rows: int
    window: int

    @classmethod
    def of(cls, keep: Tensor, grid: int, side: int, reach: int) -> VisibleBlocks:
        """From keep (B, K), patches of a grid x grid map, each side x side positions here."""
        padded, window = grid * side + 2 * reach, side + 2 * reach
        first = torch.arange(len(keep), device=keep.device)[:, None] * padded**2
        first = first + keep.div(grid, rounding_mode="floor") * side * padded + keep % grid * side
        inside, around = (torch.arange(size, device=keep.device) for size in (side, window))
        cells = (inside[:, None] + reach) * padded + inside + reach
        windows = around[:, None] * padded + around
        return cls((first[..., None, None] + cells).flatten(), (first[..., None, None] + windows).flatten(), len(keep) * padded**2, window)

    def convolve(self, x: Tensor, convolution: nn.Conv2d) -> Tensor:
        """Depthwise convolution of x (B, K, b, b, C); hidden positions count as zero. Nothing is computed at hidden positions."""
        dim = x.shape[-1]
        padded = x.new_zeros(self.rows, dim).index_copy(0, self.cells, x.reshape(-1, dim))
        windows = padded.index_select(0, self.windows).view(-1, self.window, self.window, dim).permute(0, 3, 1, 2)
        out = F.conv2d(windows, convolution.weight, convolution.bias, groups=dim)
        return out.permute(0, 2, 3, 1).reshape(x.shape)


class Mlp(nn.Module):
    """Two 1x1 maps with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PatchMap(dim, hidden)
        self.fc2 = PatchMap(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """y = x + conv2(depthwise(keep * conv1(norm1(x)))); y + mlp(norm2(y)) (ConvMAE, Sec. 3.2 "masked convolution").

    The mask meets the depthwise input alone: after conv1, so that its bias is zeroed too; the residual stream keeps what hidden positions hold, and
    nothing carries it to a visible one.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0, *, kernel: int = 5, drop_path: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.conv1 = PatchMap(dim, dim)
        self.attn = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)  # the reference's name; it is the depthwise convolution
        self.conv2 = PatchMap(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, visible: VisibleBlocks | Tensor | None = None) -> Tensor:
        """Run x through the block.

        Args:
            x: whole maps (B, H, W, C), or visible blocks (B, K, b, b, C).
            visible: None = no mask; keep map (B, H, W, 1), 1 = visible, for whole maps; `VisibleBlocks` for blocks.
        """
        y = self.conv1(self.norm1(x))
        if isinstance(visible, VisibleBlocks):
            y = visible.convolve(y, self.attn)
        else:
            y = y if visible is None else y * visible
            y = self.attn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.conv2(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))
