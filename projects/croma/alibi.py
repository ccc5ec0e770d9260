"""2D-ALiBi and X-ALiBi (CROMA, Sec. 3): attention scores fall with the distance on the ground, at a slope of each head's own.

bias[a, i, j] = -slope_a * |place of query i - place of key j|, Euclidean, in patches, added to the scaled scores. No part is learned, no grid is
fixed: another image size, square or not, is another list of places. Queries and keys may come from different sensors: both lie on one grid.

`bias_between` gives the table, float32, to be built once a step and shared by all layers; where it would be large on a GPU it gives the `Places`,
from which FlexAttention computes each score inside its kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.masking import gather
from common.patch import grid_positions

FLEX_TOKENS = 1024
"""Tokens from which a GPU computes the bias inside the attention kernel: at 1,024 a table of 16 heads takes 64 MiB a sample, at 3,969 it takes 1 GB."""
SHORT = 64
"""Tokens up to which plain products are faster than the fused attention on a CPU (measured at 9, 36 and 56; at 112 they are not)."""


class Places(NamedTuple):
    """What a bias is made of."""

    query: Tensor  # (B or 1, n, 2) float32, row and column
    key: Tensor  # (B or 1, m, 2)
    slopes: Tensor  # (heads,) float32


Bias = Tensor | Places | None


def slopes(heads: int) -> tuple[float, ...]:
    """Positive slopes in head order (ALiBi, Press et al. 2022): 2^(-8 (a + 1) / h) for h a power of two.

    Otherwise those of the largest power of two p below, then every other one of 2p heads: not monotone over heads.
    """
    if heads < 1:
        raise ValueError(f"heads={heads}: expected at least 1")
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (a + 1) / power) for a in range(power)]
    return tuple(first + [2.0 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)])


def places(grid: tuple[int, int], keep: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """Row and column of the patches of a grid: (1, N, 2), or of those in keep (B, n) in that order: (B, n, 2); float32."""
    every = grid_positions(grid).to(keep.device if keep is not None else device)[None]
    return every if keep is None else gather(every, keep)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def table(query: Tensor, key: Tensor, slope: Tensor) -> Tensor:
    """-slope * distance between query (B, n, 2) and key (B, m, 2): (B, heads, n, m) in float32, also under autocast."""
    distance = (query[:, :, None] - key[:, None]).square().sum(-1).sqrt()
    return distance[:, None] * -slope[:, None, None]


def bias_between(query: Tensor, key: Tensor, heads: int) -> Tensor | Places:
    """Bias for attention from places query (B or 1, n, 2) to key (B or 1, m, 2); see the module docstring for what comes back."""
    slope = torch.tensor(slopes(heads), device=query.device)
    if query.is_cuda and query.shape[1] * key.shape[1] >= FLEX_TOKENS**2:
        return Places(query, key, slope)
    return table(query, key, slope)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Bias = None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v for query (B, h, n, d), key and value (B, h, m, d); (B, h, n, d) in the query's type.

    The bias stays float32 under mixed precision: rounded to bfloat16 a bias of 10 is off by 0.03. With a table, that attention
    runs in float32 (1 % of a pre-training step's products); FlexAttention adds it to float32 scores of bfloat16 operands.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value)
    if isinstance(bias, Places):
        return _flex(query, key, value, bias)
    kind = torch.promote_types(query.dtype, bias.dtype)
    with torch.autocast(query.device.type, enabled=False):
        parts = query.to(kind), key.to(kind), value.to(kind), bias.to(kind)
        if not query.is_cuda and max(query.shape[-2], key.shape[-2]) <= SHORT:
            return _short(*parts).to(query.dtype)
        return F.scaled_dot_product_attention(*parts[:3], attn_mask=parts[3]).to(query.dtype)


def _short(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """The same from plain products: on a CPU they take two thirds of the fused attention's time while a row of scores is this short."""
    (batch, heads, rows, dim), columns = query.shape, key.shape[-2]
    q, k, v = (part.reshape(batch * heads, -1, dim) for part in (query, key, value))
    added = bias.expand(batch, heads, rows, columns).reshape(batch * heads, rows, columns)
    weights = torch.baddbmm(added, q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, rows, dim)


def _score(query_at: Tensor, key_at: Tensor, slope: Tensor) -> Any:
    alone = query_at.shape[0] == 1

    def change(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        sample = batch * 0 if alone else batch
        down = query_at[sample, i, 0] - key_at[sample, j, 0]
        across = query_at[sample, i, 1] - key_at[sample, j, 1]
        return score - slope[head] * (down * down + across * across).sqrt()

    return change


def _flex_eager(query: Tensor, key: Tensor, value: Tensor, query_at: Tensor, key_at: Tensor, slope: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, score_mod=_score(query_at, key_at, slope))  # type: ignore[return-value]


@lru_cache(maxsize=1)
def _flex_compiled() -> Any:
    # places and slopes are arguments of the compiled function: new ones do not compile it again
    return torch.compile(_flex_eager, dynamic=False)


def _flex(query: Tensor, key: Tensor, value: Tensor, bias: Places) -> Tensor:
    run = _flex_compiled() if query.is_cuda else _flex_eager
    with torch.autocast(query.device.type, enabled=False):
        return run(query, key, value, *bias)
