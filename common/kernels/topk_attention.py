"""Attention over the k best keys of every query (MixedAE's homologous attention), without keeping the scores.

s_ij = scale * q_i . k_j; o_i = sum over kept j of softmax(s_i)_j v_j. Of the patch keys a patch query keeps the `count` largest scores, the lower
index first among equals; the `prefix` tokens in front (class token) are kept by everyone beside these, and keep everything themselves.
The choice has no gradient: it flows through kept scores alone. With `count` = all patches this is ordinary attention.

The forward pass writes down which pairs were kept, a byte each in torch and a bit each in Triton, so that the backward pass, which computes the
scores again, uses the same ones whatever their rounding. Same input, same shape, same device: same bits.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.kernels._triton import AVAILABLE, dtype_of, on_device, precision, require, tl, triton, up

Path = Literal["auto", "plain", "tiled", "triton"]

TILE_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
"""Scores that the torch path holds at once; on a CPU they stay in its cache."""
LARGEST = {2: (512, 128), 4: (256, 64), 8: (512, 128)}
"""Tokens, and width of a head, that the Triton kernels hold on chip, by bytes of an entry; beyond them the torch path serves."""

# by bytes of an entry and padded tokens: (rows, warps); checked by the compile test, not fitted on a GPU yet
FORWARD_TILES = {
    2: {64: (16, 4), 128: (16, 4), 256: (32, 8), 512: (16, 8)},
    4: {64: (16, 4), 128: (16, 8), 256: (16, 8)},
    8: {64: (32, 4), 128: (32, 4), 256: (32, 4), 512: (32, 4)},
}
# by bytes of an entry and padded width: (own rows, other rows of a step, warps, stages)
BACKWARD_TILES = {
    2: {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 64, 8, 2), 128: (64, 32, 8, 2)},
    4: {16: (32, 32, 4, 1), 32: (32, 16, 4, 1), 64: (32, 32, 8, 1)},
    8: {16: (32, 64, 4, 1), 32: (32, 64, 4, 1), 64: (32, 64, 4, 1), 128: (32, 64, 4, 1)},
}


class TopK(NamedTuple):
    """What `topk_attention` returns."""

    out: Tensor
    """(B, H, N, D), in the type of the query."""
    hits: Tensor
    """(B, H, N) int32: kept patch keys that share the query's owner; 0 for prefix tokens, and everywhere without owners."""


# ---------------------------------------------------------------------------------------------------------------- definition
def kept_pairs(query: Tensor, key: Tensor, count: int, *, prefix: int = 1) -> Tensor:
    """Which keys (last axis) each query keeps, (..., N, N) bool, from queries and keys (..., N, D)."""
    kind = _kind(query)
    return _best((query.to(kind) @ key.to(kind).mT) * _scale(query), count, prefix)


def _best(scores: Tensor, count: int, prefix: int) -> Tensor:
    """The definition of the choice: a stable sort of each row of scores (..., N, N)."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    patches = scores[..., prefix:, prefix:]
    order = patches.argsort(stable=True, dim=-1, descending=True)
    keep[..., prefix:, prefix:] = torch.zeros_like(patches, dtype=torch.bool).scatter_(-1, order[..., :count], True)
    return keep


def reference(query: Tensor, key: Tensor, value: Tensor, owner: Tensor | None, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The definition, by autograd over all scores; arguments as in `topk_attention`."""
    kind = _kind(query)
    scores = (query.to(kind) @ key.to(kind).mT) * _scale(query)
    keep = _best(scores.detach(), count, prefix)
    out = scores.masked_fill(~keep, -math.inf).softmax(-1) @ value.to(kind)
    hits = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
    if owner is not None:
        same = owner[:, None, :, None] == owner[:, None, None, :]
        hits[..., prefix:] = (keep[..., prefix:, prefix:] & same).sum(-1, dtype=torch.int32)
    return out.to(query.dtype), hits


def _kind(query: Tensor) -> torch.dtype:
    """Type of scores and sums: float32, or float64 for float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


# ---------------------------------------------------------------------------------------------------------------- a few heads at a time
def _keep_best(scores: Tensor, count: int, prefix: int) -> Tensor:
    """`_best` of scores (C, N, N) by a threshold a row; rows whose threshold is shared by more keys than fit are settled by running count."""
    patches = scores[:, prefix:, prefix:]
    total = patches.shape[-1]
    keep = torch.ones_like(scores, dtype=torch.bool)
    if count == total:
        return keep
    if scores.is_cuda:
        threshold = patches.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    else:  # NumPy's selection is vectorised: 8 to 10 times faster than torch's topk or kthvalue
        ordered = np.partition(patches.numpy(), total - count, axis=-1)
        threshold = torch.from_numpy(ordered[..., total - count, None])
    best = patches >= threshold
    # asking a GPU would stall it; NumPy counts bytes five times faster than torch
    if scores.is_cuda or np.count_nonzero(best.numpy()) != count * best.shape[0] * best.shape[1]:
        above = patches > threshold
        level = best & ~above
        best = above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    keep[:, prefix:, prefix:] = best
    return keep


def _heads_a_tile(query: Tensor) -> int:
    return max(1, TILE_BYTES.get(query.device.type, 2**26) // (query.shape[1] ** 2 * _kind(query).itemsize))


def _tiled_forward(
    query: Tensor, key: Tensor, value: Tensor, owner: Tensor | None, heads: int, count: int, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, share (C, N), kept pairs (C, N, N) bool, hits (C, N); inputs are (C, N, D), C = sequences x heads.

    The softmax over all keys, times the choice, over its row sum (`share`): the largest score is always kept, so that nothing underflows,
    and a product by bool is eight times faster on a CPU than filling in -inf.
    """
    kind, scale = _kind(query), _scale(query)
    batch, n, _ = query.shape
    out, share = torch.empty_like(query), query.new_empty(batch, n, dtype=kind)
    keep = torch.empty(batch, n, n, dtype=torch.bool, device=query.device)
    hits = torch.zeros(batch, n, dtype=torch.int32, device=query.device)
    same = None if owner is None else owner[:, :, None] == owner[:, None]
    step = _heads_a_tile(query)
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        scores = torch.bmm(query[part].to(kind), key[part].to(kind).mT).mul_(scale)
        keep[part] = _keep_best(scores, count, prefix)
        weights = scores.softmax(-1).mul_(keep[part])
        share[part] = weights.sum(-1)
        out[part] = torch.bmm(weights, value[part].to(kind)).div_(share[part, :, None]).to(out.dtype)
        if same is not None:
            which = torch.arange(part.start, part.stop, device=query.device) // heads
            hits[part, prefix:] = (keep[part, prefix:, prefix:] & same[which]).sum(-1, dtype=torch.int32)
    return out, share, keep, hits


def _tiled_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, share: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kind, scale = _kind(query), _scale(query)
    grads = [torch.empty_like(query) for _ in range(3)]
    step = _heads_a_tile(query)
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        q, k, v, g = (t[part].to(kind) for t in (query, key, value, grad))
        along = (g * out[part].to(kind)).sum(-1, keepdim=True)
        weights = torch.bmm(q, k.mT).mul_(scale).softmax(-1).mul_(keep[part]).div_(share[part, :, None])
        grads[2][part] = torch.bmm(weights.mT, g).to(query.dtype)
        slope = torch.bmm(g, v.mT).sub_(along).mul_(weights).mul_(scale)
        grads[0][part] = torch.bmm(slope, k).to(query.dtype)
        grads[1][part] = torch.bmm(slope.mT, q).to(query.dtype)
    return grads[0], grads[1], grads[2]


# ---------------------------------------------------------------------------------------------------------------- Triton
@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    owner,
    out,
    lse,
    words,
    hits,
    n,
    heads,
    count,
    prefix,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OWNED: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries against all keys: scores stay in registers, the k-th largest of a row is found bit by bit."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    width = tl.arange(0, WIDTH)
    row_inside = rows < n
    column_inside = columns < n
    inside = width < D
    rows_at = (head * n + rows)[:, None] * D + width[None, :]
    columns_at = (head * n + columns)[:, None] * D + width[None, :]
    q = tl.load(query + rows_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
    k = tl.load(key + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
    if UP:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * SCALE
    scores = tl.where(scores == 0.0, 0.0, scores)  # one zero, so that bit patterns order as numbers do
    rank = scores.to(RANK, bitcast=True)
    rank = tl.where(rank < 0, (rank ^ LOWEST) * -1, rank)
    patch = (columns >= prefix) & column_inside
    rank = tl.where(patch[None, :], rank, LOWEST)
    # largest threshold that at least `count` ranks reach
    threshold = tl.where(tl.sum((rank >= 0).to(tl.int32), 1) >= count, tl.zeros((ROWS,), RANK), tl.full((ROWS,), LOWEST, RANK))
    bit = tl.full((ROWS,), 1, RANK) << (BITS - 2)
    for _ in range(BITS - 1):
        trial = threshold + bit
        threshold = tl.where(tl.sum((rank >= trial[:, None]).to(tl.int32), 1) >= count, trial, threshold)
        bit = bit >> 1
    above = rank > threshold[:, None]
    level = (rank == threshold[:, None]) & patch[None, :]
    spare = count - tl.sum(above.to(tl.int32), 1)
    best = above | (level & (tl.cumsum(level.to(tl.int32), 1) <= spare[:, None]))
    best = best & (rows >= prefix)[:, None]
    keep = (best | (columns < prefix)[None, :] | (rows < prefix)[:, None]) & column_inside[None, :]
    if OWNED:
        sequence = head // heads
        patches = n - prefix
        own = tl.load(owner + sequence * patches + rows - prefix, mask=row_inside & (rows >= prefix), other=-1)
        other = tl.load(owner + sequence * patches + columns - prefix, mask=patch, other=-2)
        found = tl.sum((best & (own[:, None] == other[None, :])).to(tl.int32), 1)
        tl.store(hits + head * n + rows, found, mask=row_inside)
    scores = tl.where(keep, scores, float("-inf"))
    highest = tl.max(scores, 1)
    weights = tl.exp(scores - highest[:, None])
    total = tl.sum(weights, 1)
    v = tl.load(value + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
    if UP:
        v = v.to(tl.float32)
    mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC) / total[:, None]
    tl.store(out + rows_at, mixed, mask=row_inside[:, None] & inside[None, :])
    tl.store(lse + head * n + rows, highest + tl.log(total), mask=row_inside)
    single = tl.reshape(keep.to(tl.int32), (ROWS, COLUMNS // 32, 32)) << tl.arange(0, 32)[None, None, :]
    at = (head * n + rows)[:, None] * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)[None, :]
    tl.store(words + at, tl.sum(single, 2), mask=row_inside[:, None])


@triton.jit
def _query_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    grad,
    lse,
    along,
    words,
    out,
    n,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one block of queries: sum over key tiles of w_ij (g_i . v_j - along_i) k_j."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, WIDTH)
    row_inside = rows < n
    inside = width < D
    rows_at = (head * n + rows)[:, None] * D + width[None, :]
    q = tl.load(query + rows_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
    g = tl.load(grad + rows_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
    if UP:
        q = q.to(tl.float32)
        g = g.to(tl.float32)
    row_lse = tl.load(lse + head * n + rows, mask=row_inside, other=0.0)
    row_along = tl.load(along + head * n + rows, mask=row_inside, other=0.0)
    total = tl.zeros((ROWS, WIDTH), ACC)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        column_inside = columns < n
        columns_at = (head * n + columns)[:, None] * D + width[None, :]
        k = tl.load(key + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
        v = tl.load(value + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
        if UP:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        at = (head * n + rows)[:, None] * WORDS + (columns // 32)[None, :]
        word = tl.load(words + at, mask=row_inside[:, None] & column_inside[None, :], other=0)
        kept = ((word >> (columns % 32)[None, :]) & 1) == 1
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * SCALE
        weights = tl.exp(tl.where(kept, scores - row_lse[:, None], float("-inf")))
        slope = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        slope = weights * (slope - row_along[:, None]) * SCALE
        total = tl.dot(slope.to(k.dtype), k, acc=total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out + rows_at, total, mask=row_inside[:, None] & inside[None, :])


@triton.jit
def _key_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    grad,
    lse,
    along,
    words,
    out_key,
    out_value,
    n,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one block of keys and values: sums over query tiles; the block runs over COLUMNS, tiles over ROWS."""
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = tl.arange(0, WIDTH)
    column_inside = columns < n
    inside = width < D
    columns_at = (head * n + columns)[:, None] * D + width[None, :]
    k = tl.load(key + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
    v = tl.load(value + columns_at, mask=column_inside[:, None] & inside[None, :], other=0.0)
    if UP:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    total_key = tl.zeros((COLUMNS, WIDTH), ACC)
    total_value = tl.zeros((COLUMNS, WIDTH), ACC)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        row_inside = rows < n
        rows_at = (head * n + rows)[:, None] * D + width[None, :]
        q = tl.load(query + rows_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        g = tl.load(grad + rows_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        if UP:
            q = q.to(tl.float32)
            g = g.to(tl.float32)
        row_lse = tl.load(lse + head * n + rows, mask=row_inside, other=0.0)
        row_along = tl.load(along + head * n + rows, mask=row_inside, other=0.0)
        at = (head * n + rows)[None, :] * WORDS + (columns // 32)[:, None]
        word = tl.load(words + at, mask=row_inside[None, :] & column_inside[:, None], other=0)
        kept = ((word >> (columns % 32)[:, None]) & 1) == 1  # (keys, queries)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * SCALE
        weights = tl.exp(tl.where(kept, scores - row_lse[None, :], float("-inf")))
        total_value = tl.dot(weights.to(g.dtype), g, acc=total_value, input_precision=PRECISION, out_dtype=ACC)
        slope = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=ACC)
        slope = weights * (slope - row_along[None, :]) * SCALE
        total_key = tl.dot(slope.to(q.dtype), q, acc=total_key, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out_key + columns_at, total_key, mask=column_inside[:, None] & inside[None, :])
    tl.store(out_value + columns_at, total_value, mask=column_inside[:, None] & inside[None, :])


def _padded(rows: Tensor) -> Tensor:
    """Contiguous, width a multiple of 16: zeros change no dot product, and the compiler then copies asynchronously."""
    missing = -rows.shape[-1] % 16
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).contiguous()


def columns_of(tokens: int) -> int:
    """Tokens padded to what a row of the forward kernel holds."""
    return max(64, 1 << (tokens - 1).bit_length())


def _triton_forward(
    query: Tensor, key: Tensor, value: Tensor, owner: Tensor | None, heads: int, count: int, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_tiled_forward`, with the log-sum-exp in place of the share, and the kept pairs packed: (C, N, padded tokens / 32) int32, pair j in bit j % 32 of word j // 32."""
    kind = _kind(query)
    q, k, v = map(_padded, (query, key, value))
    batch, n, d = q.shape
    columns = columns_of(n)
    rows, warps = FORWARD_TILES[q.element_size()][columns]
    out, lse = torch.empty(q.shape, dtype=kind, device=q.device), q.new_empty(batch, n, dtype=kind)
    words = torch.empty(batch, n, columns // 32, dtype=torch.int32, device=q.device)
    hits = torch.zeros(batch, n, dtype=torch.int32, device=q.device)
    bits = 8 * kind.itemsize
    with on_device(q):
        _forward_kernel[(-(-n // rows), batch)](
            q,
            k,
            v,
            hits if owner is None else owner.to(torch.int32).contiguous(),
            out,
            lse,
            words,
            hits,
            n,
            heads,
            count,
            prefix,
            SCALE=_scale(query),
            D=d,
            WIDTH=triton.next_power_of_2(d),
            ROWS=rows,
            COLUMNS=columns,
            OWNED=owner is not None,
            UP=up(q.dtype),
            ACC=dtype_of(kind),
            RANK=tl.int64 if bits == 64 else tl.int32,
            BITS=bits,
            LOWEST=-(2 ** (bits - 1)),
            PRECISION=precision(q.dtype),
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out[..., : query.shape[-1]].to(query.dtype).contiguous(), lse, words, hits


def _triton_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, words: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kind, width = _kind(query), query.shape[-1]
    along = (grad.to(kind) * out.to(kind)).sum(-1)
    q, k, v, g = map(_padded, (query, key, value, grad))
    batch, n, d = q.shape
    own, other, warps, stages = BACKWARD_TILES[q.element_size()][triton.next_power_of_2(d)]
    grads = [torch.empty(q.shape, dtype=kind, device=q.device) for _ in range(3)]
    sizes = {"SCALE": width**-0.5, "D": d, "WIDTH": triton.next_power_of_2(d), "WORDS": words.shape[-1]}
    sizes |= {"UP": up(q.dtype), "ACC": dtype_of(kind), "PRECISION": precision(q.dtype)}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with on_device(q):
        grid = (-(-n // own), batch)
        _query_kernel[grid](q, k, v, g, lse, along, words, grads[0], n, ROWS=own, COLUMNS=other, **sizes, **options)
        _key_kernel[grid](q, k, v, g, lse, along, words, *grads[1:], n, ROWS=other, COLUMNS=own, **sizes, **options)
    a, b, c = (t[..., :width].to(query.dtype).contiguous() for t in grads)
    return a, b, c


# ---------------------------------------------------------------------------------------------------------------- operators
@torch.library.custom_op("contramask::topk_attention", mutates_args=())
def _topk_attention(
    query: Tensor, key: Tensor, value: Tensor, owner: Tensor | None, heads: int, count: int, prefix: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return (_triton_forward if fused else _tiled_forward)(query, key, value, owner, heads, count, prefix)


@_topk_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, owner: Tensor | None, heads: int, count: int, prefix: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _width = query.shape
    packed = query.new_empty(batch, n, columns_of(n) // 32, dtype=torch.int32) if fused else query.new_empty(batch, n, n, dtype=torch.bool)
    return (
        query.new_empty(query.shape),
        query.new_empty(batch, n, dtype=_kind(query)),
        packed,
        query.new_empty(batch, n, dtype=torch.int32),
    )


@torch.library.custom_op("contramask::topk_attention_backward", mutates_args=())
def _topk_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, keep: Tensor, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return (_triton_backward if fused else _tiled_backward)(grad, query, key, value, out, sums, keep)


@_topk_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, keep: Tensor, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, *_, ctx.fused = inputs
    out, sums, keep, hits = output  # sums: the kept share of the softmax (torch), or the log-sum-exp (Triton)
    ctx.save_for_backward(query, key, value, out, sums, keep)
    ctx.mark_non_differentiable(sums, keep, hits)


def _backward(ctx, grad, _sums, _keep, _hits):  # type: ignore[no-untyped-def]
    return *_topk_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.fused), None, None, None, None, None


_topk_attention.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------------------- public
def topk_attention(
    query: Tensor, key: Tensor, value: Tensor, count: int, *, prefix: int = 1, owner: Tensor | None = None, path: Path = "auto"
) -> TopK:
    """Attention of every query over its `count` best keys (module docstring); differentiable once in query, key and value.

    Args:
        query, key, value: (B, H, N, D) of one type: float32, bfloat16, float16 or float64; N = prefix + patches. Scores are scaled by D ** -0.5.
        count: patch keys that a patch query keeps, 1 to the number of patches.
        prefix: tokens in front that are outside the choice, 0 or more.
        owner: (B, patches) integers, 0 or more: whose each patch is, for `hits`.
        path: "auto" picks; "plain" is the definition, "tiled" torch with a few heads' scores at a time, "triton" the kernels.
    Returns:
        out (B, H, N, D), and hits (B, H, N) without gradient: hits / count averaged over patches is the homologous accuracy.
    Raises:
        ValueError: shapes, types, `count` or `prefix` do not fit. ImportError: path="triton" without Triton.
    """
    _check(query, key, value, count, prefix, owner)
    if path == "auto":
        path = choose(query)
    if path == "plain" or query.numel() == 0:
        with torch.autocast(query.device.type, enabled=False):
            return TopK(*reference(query, key, value, owner, count, prefix))
    batch, heads, n, width = query.shape
    if path == "triton":
        require(query)
        if not _fits(query):
            tokens, widest = LARGEST[query.element_size()]
            raise ValueError(
                f'path="triton" holds up to {tokens} tokens of width {widest} on chip, got {n} of width {width}; use path="tiled"'
            )
    flat = (t.reshape(batch * heads, n, width).contiguous() for t in (query, key, value))
    out, _, _, hits = _topk_attention(*flat, owner, heads, count, prefix, path == "triton")
    return TopK(out.view(query.shape), hits.view(batch, heads, n))


def choose(query: Tensor) -> Literal["plain", "tiled", "triton"]:
    """The path that "auto" takes: Triton never runs on a CPU."""
    if query.dtype == torch.float64:
        return "plain"
    return "triton" if query.is_cuda and AVAILABLE and _fits(query) else "tiled"


def _fits(query: Tensor) -> bool:
    tokens, width = LARGEST[query.element_size()]
    return query.shape[2] <= tokens and query.shape[3] <= width


def _check(query: Tensor, key: Tensor, value: Tensor, count: int, prefix: int, owner: Tensor | None) -> None:
    if query.ndim != 4 or not query.is_floating_point() or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: expected three of one shape (B, H, N, D)"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query ({query.dtype}), key ({key.dtype}) and value ({value.dtype}) differ; cast them to one type")
    patches = query.shape[2] - prefix
    if prefix < 0 or patches < 1:
        raise ValueError(f"prefix={prefix}: expected 0 to {query.shape[2] - 1} of the {query.shape[2]} tokens")
    if not 1 <= count <= patches:
        raise ValueError(f"count={count}: expected 1 to {patches}, the number of patches")
    if owner is not None and (owner.shape != (query.shape[0], patches) or owner.is_floating_point()):
        raise ValueError(f"owner: expected ({query.shape[0]}, {patches}) integers, got {tuple(owner.shape)} {owner.dtype}")
