"""Blocks of CROMA (Sec. 3): self-attention and cross-attention with a distance bias, encoders of one sensor, the joint encoder, the GAP head.

All blocks are pre-norm, LayerNorm eps 1e-5, exact GELU, without dropout. There is no class token and no position embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from projects.croma.alibi import Bias, attend


class SelfAttention(nn.Module):
    """Norm, attention of tokens (B, n, D) to each other, output map; the residual is added outside. q, k, v have no bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Bias = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens x (B, n, D) to a context (B, m, D); one LayerNorm serves both. The residual to x is added outside."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, bias: Bias = None) -> Tensor:
        x, context = self.norm(x), self.norm(context)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q(x), self.k(context), self.v(context)))
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Norm, D -> 4D -> D with GELU; the residual is added outside."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class Layer(nn.Module):
    """Self-attention [, cross-attention to a context], feed-forward, each with its residual."""

    def __init__(self, dim: int, num_heads: int, *, cross: bool = False) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.cross = CrossAttention(dim, num_heads) if cross else None
        self.ffn = FeedForward(dim)

    def forward(self, x: Tensor, bias: Bias = None, context: Tensor | None = None, cross_bias: Bias = None) -> Tensor:
        x = x + self.attn(x, bias)
        if self.cross is not None:
            x = x + self.cross(x, context, cross_bias)
        return x + self.ffn(x)


class Stack(nn.Module):
    """`depth` layers and a final LayerNorm.

    Args:
        cross: with cross-attention (the joint encoder).
        checkpointing: compute each layer again in the backward pass instead of keeping its activations.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, cross: bool = False, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, num_heads, cross=cross) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """x (B, n, D) and what `Layer` takes beside it."""
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer.__call__, x, *given, use_reentrant=False)
            else:
                x = layer(x, *given)
        return self.norm(x)


class SensorEncoder(nn.Module):
    """Patch vectors (B, n, C * P * P) of one sensor -> tokens (B, n, D)."""

    def __init__(self, patch_values: int, dim: int, depth: int, num_heads: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(patch_values, dim)
        self.stack = Stack(dim, depth, num_heads, checkpointing=checkpointing)

    def forward(self, patches: Tensor, bias: Bias = None, positions: Tensor | None = None) -> Tensor:
        x = self.embed(patches)
        return self.stack(x if positions is None else x + positions, bias)


class GapHead(nn.Sequential):
    """Mean over tokens (B, n, D), LayerNorm, D -> 4D -> D with GELU: (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.mean(1))


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"expected a width that the heads divide, got width {dim} and {num_heads} heads")
