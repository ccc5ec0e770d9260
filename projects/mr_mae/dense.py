"""Feature extractors for detection (Mask R-CNN with FPN) and segmentation (UPerNet): four maps of stride 4, 8, 16, 32, no mask.

Names as in the reference's two backbones. Both learn relative position biases with Swin's indexing on top of the position table.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from common.blocks import xavier_init
from projects.mr_mae.model import Backbone


def relative_index(side: int) -> Tensor:
    """(n, n) int64, n = side^2 tokens in raster order: (dh + side - 1)(2 side - 1) + dw + side - 1 of each pair (Swin)."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    dh, dw = place[:, :, None] - place[:, None] + side - 1
    return dh * (2 * side - 1) + dw


class RelativePositions(nn.Module):
    """A table of biases by head and offset, shared by all blocks that attend over windows of one side."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(side), persistent=False)

    def forward(self) -> Tensor:
        """(heads, n, n), added to the scaled scores."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class DetectionBackbone(Backbone):
    """Stage 3 attends inside windows, in some blocks over the whole map; the output of stride 32 is a 2x2 max-pool of that of stride 16.

    Args:
        window: tokens a side; divides the grid (no padding).
        global_blocks: numbers (from 0) of blocks that attend everywhere.
        backbone: arguments of `Backbone`; the position table is trained unless trained_positions is False.
    Raises:
        ValueError: a window that does not divide the grid.
    """

    def __init__(self, image_size: int = 1024, window: int = 16, global_blocks: Collection[int] = (0, 3, 6, 10), **backbone: Any) -> None:
        super().__init__(image_size, **({"trained_positions": True} | backbone))
        if self.grid % window:
            raise ValueError(f"window={window}: expected a divisor of the {self.grid}x{self.grid} grid of image_size={image_size}")
        self.window, self.global_blocks = window, frozenset(global_blocks)
        self.windowed_rel_pos_bias = RelativePositions(window, self.num_heads)
        self.global_rel_pos_bias = RelativePositions(self.grid, self.num_heads)
        self.channels = (
            *(embed.proj.out_channels for embed in (self.patch_embed1, self.patch_embed2)),
            *(2 * [self.patch_embed4.out_features]),
        )
        self.apply(xavier_init)
        self.init_maps()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps "s0" to "s3" (B, C, H, W) of images (B, C, S, S), the form that torchvision's FeaturePyramidNetwork takes."""
        first, second, tokens = self.stages(self.whole(images))
        x = tokens + self.pos_embed
        windows = self.grid // self.window
        shape = (windows, self.window, windows, self.window)
        windowed, everywhere = self.windowed_rel_pos_bias(), self.global_rel_pos_bias()
        inside = False  # whether x holds windows (B windows^2, window^2, D)
        for number, block in enumerate(self.blocks3):
            if inside != (number not in self.global_blocks):
                x = _merge(x, shape) if inside else _split(x, shape)
                inside = not inside
            x = block(x, attn_mask=windowed if inside else everywhere)
        x = _merge(x, shape) if inside else x
        third = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return {"s0": first.permute(0, 3, 1, 2), "s1": second.permute(0, 3, 1, 2), "s2": third, "s3": F.max_pool2d(third, 2)}


def _split(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(B, N, D) -> (B windows, window tokens, D)."""
    return x.unflatten(1, shape).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def _merge(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Inverse of `_split`."""
    rows, height, columns, width = shape
    return x.unflatten(1, (height, width)).unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(1, 4)


class BiasedAttention(Attention):
    """timm's attention with a relative position table of its own."""

    def __init__(self, *args: Any, side: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, self.num_heads))
        self.register_buffer("relative_position_index", relative_index(side), persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, attn_mask=self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1))


class SegmentationBackbone(Backbone):
    """Each transformer block has its own relative positions over the whole grid and gains on both branches; stride 32 by a 3x3 convolution.

    Args:
        layer_scale: initial value of the gains.
        backbone: arguments of `Backbone`; LayerNorms of the transformer blocks default to eps 1e-5 here.
    """

    def __init__(self, image_size: int = 512, layer_scale: float = 1.0, **backbone: Any) -> None:
        settings: dict[str, Any] = {"trained_positions": True, "eps": 1e-5} | backbone
        super().__init__(image_size, **settings)
        dim = self.patch_embed4.out_features
        for block in self.blocks3:
            _own_positions_and_gains(block, self.grid, layer_scale)
        # without padding, as in the reference: an even map loses its last row and column
        self.fpn = nn.Sequential(nn.Conv2d(dim, dim, 3, stride=2), nn.SyncBatchNorm(dim), nn.GELU())
        self.channels = (*(embed.proj.out_channels for embed in (self.patch_embed1, self.patch_embed2)), dim, dim)
        self.apply(xavier_init)
        self.init_maps()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, C, H, W) of images (B, C, S, S), strides 4, 8, 16, 32."""
        first, second, tokens = self.stages(self.whole(images))
        x = tokens + self.pos_embed
        for block in self.blocks3:
            x = block(x)
        third = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return [first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2), third, self.fpn(third)]


class Gain(nn.Module):
    """x times a learnt gain a channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _own_positions_and_gains(block: Block, side: int, start: float) -> None:
    dim, attention = block.attn.qkv.in_features, block.attn
    block.attn = BiasedAttention(dim, attention.num_heads, qkv_bias=True, side=side)
    block.ls1, block.ls2 = Gain(dim, start), Gain(dim, start)
