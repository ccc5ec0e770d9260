"""Blocks of HiCMAE: a self block, a cross-self block that first reads another sequence, the two-stream fusion encoder (Sec. 3.3 and 3.6).

The self block is timm's, with VideoMAE's query-key-value map: bias on query and value, none on the key.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from common.blocks import QVLinear

FusionOrder = Literal["both", "audio_first", "video_first"]
norm_layer = partial(nn.LayerNorm, eps=1e-6)


def self_block(dim: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> Block:
    """x + attention(norm(x)), x + mlp(norm(x)), keys without bias."""
    block = Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=False, drop_path=drop_path, norm_layer=norm_layer)
    block.attn.qkv = QVLinear(dim)
    return block


class KVLinear(nn.Linear):
    """Key and value of a context: (context_dim -> 2 dim), bias on the value alone."""

    def __init__(self, context_dim: int, dim: int) -> None:
        super().__init__(context_dim, 2 * dim, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, context: Tensor) -> Tensor:
        return F.linear(context, self.weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))


class CrossAttention(nn.Module):
    """x (B, N, dim) reads context (B, M, context_dim)."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = KVLinear(context_dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        key, value = self.kv(context).chunk(2, -1)
        return self.proj(attend(self.q(x), key, value, self.num_heads))


class CrossSelfBlock(Block):
    """x + cross-attention(norm(x), norm(context)), then exactly a self block."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=False, drop_path=drop_path, norm_layer=norm_layer)
        self.attn.qkv = QVLinear(dim)
        self.cross_norm1 = norm_layer(dim)
        self.cross_norm2 = norm_layer(context_dim)
        self.cross_attn = CrossAttention(dim, context_dim, num_heads)
        self.cross_drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def read(self, x: Tensor, context: Tensor) -> Tensor:
        """The first third alone: x (B, N, dim) after it has read context (B, M, context_dim)."""
        return x + self.cross_drop_path(self.cross_attn(self.cross_norm1(x), self.cross_norm2(context)))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(self.read(x, context))


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of query (B, N, D) over key and value (B, M, D), heads side by side in D: (B, N, D)."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def last_rows(block: Block, x: Tensor, start: int) -> Tensor:
    """Rows from `start` on of a self block's output, (B, N - start, D): the others serve as keys and values only.

    For the last block of a decoder, whose visible rows nobody looks at; same numbers as `block(x)[:, start:]` (stochastic depth left out).
    """
    normed, dim, qkv = block.norm1(x), x.shape[-1], block.attn.qkv
    query = F.linear(normed[:, start:], qkv.weight[:dim], qkv.q_bias)
    key, value = F.linear(normed, qkv.weight[dim:], torch.cat([torch.zeros_like(qkv.v_bias), qkv.v_bias])).chunk(2, -1)
    x = x[:, start:] + block.attn.proj(attend(query, key, value, block.attn.num_heads))
    return x + block.mlp(block.norm2(x))


class FusionEncoder(nn.Module):
    """Two streams that read each other, layer by layer (Sec. 3.6).

    Args:
        dim, audio_dim: widths of the video and the audio stream.
        drop_path: rate of the last layer, rising linearly from 0 at the first.
        order: "both" = each stream reads what the other was before the layer (the paper's default); "audio_first" = audio is updated and video
            reads the result; "video_first" = the reverse (Table 16).
    """

    def __init__(
        self,
        dim: int,
        audio_dim: int,
        depth: int,
        num_heads: int,
        audio_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        order: FusionOrder = "both",
    ) -> None:
        super().__init__()
        if order not in ("both", "audio_first", "video_first"):
            raise ValueError(f"fusion_order: expected both, audio_first or video_first, found {order!r}")
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.order = order
        self.blocks = nn.ModuleList(CrossSelfBlock(dim, audio_dim, num_heads, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates)
        self.blocks_audio = nn.ModuleList(
            CrossSelfBlock(audio_dim, dim, audio_heads, mlp_ratio=mlp_ratio, drop_path=rate) for rate in rates
        )
        self.norm = norm_layer(dim)
        self.norm_audio = norm_layer(audio_dim)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """video (B, N, dim) and audio (B, M, audio_dim), fused, in the same shapes."""
        for block, block_audio in zip(self.blocks, self.blocks_audio, strict=True):
            if self.order == "both":
                video, audio = block(video, audio), block_audio(audio, video)
            elif self.order == "audio_first":
                audio = block_audio(audio, video)
                video = block(video, audio)
            else:
                video = block(video, audio)
                audio = block_audio(audio, video)
        return self.norm(video), self.norm_audio(audio)
