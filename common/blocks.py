"""Transformer stacks on timm's Block: a stack, an encoder of visible patches, a light decoder with mask tokens.

Sequences are (B, N, D). Attention is fused (scaled_dot_product_attention) where timm finds it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.masking import Mask, append_mask_tokens, gather
from common.patch import PatchEmbed, grid_of


class Encoded(NamedTuple):
    tokens: Tensor  # (B, N, D) after the final norm
    taps: dict[int, Tensor]  # block number -> its output (B, N, D), before the final norm; blocks count from 1, 0 = the input


class QVLinear(nn.Linear):
    """The query-key-value map of VideoMAE: D -> 3D with a bias on query and value, none on the key."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class Blocks(nn.Module):
    """Pre-norm blocks x + attention(norm(x)), x + mlp(norm(x)), and a final LayerNorm.

    Args:
        qkv_bias: True, False, or "no_key" (`QVLinear`: VideoMAE, HiCMAE).
        layer_scale: initial value of the per-channel gain on both branches; None = none.
        drop_path: rate of the last block, rising linearly from 0 at the first.
        eps: of every LayerNorm (MAE 1e-6; CROMA and Point-CMAE 1e-5).
        final_norm: False = identity.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        block: further arguments of timm's Block (act_layer, qk_norm, proj_drop, attn_drop ...).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool | Literal["no_key"] = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        final_norm: bool = True,
        checkpointing: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"expected a width that the heads divide, got dim={dim} and num_heads={num_heads}")
        norm: Any = partial(nn.LayerNorm, eps=eps)
        self.dim = dim
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias is True,
                init_values=layer_scale,
                drop_path=drop_path * i / max(depth - 1, 1),
                norm_layer=norm,
                **block,
            )
            for i in range(depth)
        )
        if qkv_bias == "no_key":
            for layer in self.blocks:
                layer.attn.qkv = QVLinear(dim)  # type: ignore[union-attr]
        self.norm = norm(dim) if final_norm else nn.Identity()
        self.checkpointing = checkpointing

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
        taps: Collection[int] = (),
    ) -> Encoded:
        """Run x (B, N, D) through the stack.

        Args:
            bias: added to the scaled scores of every block, broadcast to (B, heads, N, N).
            positions: (B, N, D) or broadcast to it, added to the input of EVERY block (Point-CMAE, Sec. 3.3).
            taps: numbers of the blocks whose outputs are wanted, from 1; 0 = the input.
        """
        if not set(taps) <= set(range(len(self.blocks) + 1)):
            raise ValueError(f"taps: expected block numbers 0 to {len(self.blocks)}, got {sorted(taps)}")
        kept = {0: x} if 0 in taps else {}
        extra: dict[str, Any] = {} if bias is None else {"attn_mask": bias}
        for number, block in enumerate(self.blocks, start=1):
            x = x if positions is None else x + positions
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block.__call__, x, use_reentrant=False, **extra)
            else:
                x = block(x, **extra)
            if number in taps:
                kept[number] = x
        return Encoded(self.norm(x), kept)


class MaskedEncoder(nn.Module):
    """Visible patches -> tokens + positions [-> class token in front] -> blocks (MAE's and VideoMAE's encoder).

    Args:
        embed: of the patches; only the visible ones are projected.
        stack: of width D.
        positions: (N, D), or (1 + N, D) with a class token, its own row first. A tensor is kept as a constant outside the
            state dict, an nn.Parameter is trained; None = none.
        class_token: learned, in front of the tokens, always visible.
    """

    positions: Tensor | None

    def __init__(self, embed: PatchEmbed, stack: Blocks, *, positions: Tensor | None = None, class_token: bool = False) -> None:
        super().__init__()
        dim = embed.proj.out_channels
        self.embed = embed
        self.stack = stack
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None
        _own_positions(self, positions)

    def forward(self, inputs: Tensor, mask: Mask | None = None, *, bias: Tensor | None = None, taps: Collection[int] = ()) -> Encoded:
        """Encode inputs (B, C, *sides); tokens (B, P + K, D) in the order of `mask.keep`, all N in token order without mask."""
        count, prefix = prod(grid_of(inputs, self.embed.patch_size)), 0 if self.class_token is None else 1
        if mask is not None and mask.hidden.shape != (len(inputs), count):
            raise ValueError(f"mask: expected ({len(inputs)}, {count}), one entry a patch, got {tuple(mask.hidden.shape)}")
        if self.positions is not None and len(self.positions) != prefix + count:
            raise ValueError(f"inputs: expected {len(self.positions) - prefix} patches, one a position, got {count}; resize the table")
        x = self.embed(inputs, None if mask is None else mask.keep)
        if self.positions is not None:
            positions = self.positions[None, prefix:]
            x = x + (positions if mask is None else gather(positions, mask.keep))
        if self.class_token is not None:
            front = self.class_token if self.positions is None else self.class_token + self.positions[:1]
            x = torch.cat([front.expand(len(x), -1, -1), x], 1)
        return self.stack(x, bias=bias, taps=taps)


class Decoder(nn.Module):
    """Linear to the decoder's width, mask tokens at the hidden places, positions, blocks, norm, linear to the targets (MAE, Sec. 3).

    Blocks treat a sequence as a set, so the tokens are kept in the order visible, hidden: the same numbers as un-shuffled
    (up to rounding), and the rows to predict are at the end.

    Args:
        stack: of the decoder's width, built with `final_norm=False`; the decoder norms only the rows it projects.
        positions: (P + N, width), as for `MaskedEncoder`; rows of prefix tokens first.
        prefix: P, tokens in front of the visible ones (class token) that have no prediction.
        embed_bias: of the first linear layer (VideoMAE, HiCMAE: False).
    """

    positions: Tensor | None

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stack: Blocks,
        *,
        positions: Tensor | None = None,
        prefix: int = 0,
        embed_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not isinstance(stack.norm, nn.Identity):
            raise ValueError("stack: expected Blocks(..., final_norm=False), the decoder has its own norm")
        width = stack.dim
        self.embed = nn.Linear(dim, width, bias=embed_bias)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.stack = stack
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, out_dim)
        self.prefix = prefix
        _own_positions(self, positions)

    def forward(self, visible: Tensor, mask: Mask, *, rows: Literal["masked", "all"] = "masked") -> Tensor:
        """Predictions from visible (B, P + K, dim).

        Returns:
            rows="masked": (B, N - K, out_dim) in the order of `mask.masked`; "all": (B, N, out_dim) in token order.
        """
        if visible.ndim != 3 or visible.shape[:2] != (len(mask.hidden), self.prefix + mask.kept):
            raise ValueError(f"visible: expected ({len(mask.hidden)}, {self.prefix} + {mask.kept}, D), got {tuple(visible.shape)}")
        if rows not in ("masked", "all"):
            raise ValueError(f"rows: expected masked or all, got {rows!r}")
        x = self.embed(visible)
        front, x = x[:, : self.prefix], x[:, self.prefix :]
        table = None if self.positions is None else self.positions[self.prefix :]
        if self.positions is not None:
            front = front + self.positions[None, : self.prefix]
        x = append_mask_tokens(x, mask, self.mask_token, table)
        x = self.stack(torch.cat([front, x], 1)).tokens
        if rows == "masked":
            return self.head(self.norm(x[:, self.prefix + mask.kept :]))
        return gather(self.head(self.norm(x[:, self.prefix :])), mask.restore)


def xavier_init(module: nn.Module) -> None:
    """MAE's initialisation, for `model.apply`: Xavier-uniform linear and patch maps (the latter as a matrix), biases 0, norms 1 and 0.

    Patch maps keep their bias; tokens and other bare parameters are left alone.
    """
    if isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _own_positions(module: nn.Module, positions: Tensor | None) -> None:
    if isinstance(positions, nn.Parameter):
        module.positions = positions
    else:
        module.register_buffer("positions", positions, persistent=False)
