"""Log of the sum of exponentials over allowed pairs of rows: the one primitive behind every contrastive loss.

row_i = log sum over j with query_group_i != key_group_j of exp(scale * query_i . key_j); column_j is the same over i.

The pair that a loss pulls together is left out of the sum by its group and comes back outside, softplus(row_i - scale * q_i . k_target):
the value of cross entropy, without the cancellation that costs its gradient every digit once the loss is small.
No (N, M) array is kept; the backward pass computes the tiles again. Same input, same shape, same device: same bits.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from common.kernels._triton import AVAILABLE, dtype_of, on_device, precision, require, tl, triton, up

Path = Literal["auto", "plain", "tiled", "triton"]

PLAIN_PAIRS = {"cpu": 2**20, "cuda": 2**22}
"""Up to here the (N, M) array is small change and plain torch is as fast. Fitted on a CPU, not on a GPU yet."""
TRITON_WIDTH = {2: 512, 4: 256, 8: 512}
"""Widest rows that "auto" gives to Triton, by bytes of an entry; wider ones go through the matrix library in tiles."""
ROW_TILE, COLUMN_TILE = 256, 1024
"""Rows and columns of a block of the CPU path: 1 MiB, which stays in the cache."""
MIRRORED_TILE = 512
"""The same for rows against themselves: square blocks, so that each has its mirror image."""
CUDA_TILE_BYTES = 64 * 2**20
"""Logits that the tiled path holds at once on a GPU."""
SAFE_LOGIT = 32.0
"""Logits no larger than this (unit rows at scale <= 32) need no maximum: sums of e^-32 to e^32 are safe in float32, and one exponential serves rows and columns."""
COLUMN_BYTES = 2**28
"""Partial sums of columns that one launch of the forward kernel may write; more rows take further launches, so that memory stays linear."""
PROGRAMS = 264
"""Programs that a launch should reach, two for each of the 132 processors of an H100; never read from the device, so that sums keep their order."""

# (rows, columns, chunk of the width, warps, stages) by bytes of an entry, and by width; checked by the compile test, not fitted on a GPU yet.
FORWARD_TILES = {2: (128, 128, 32, 8, 3), 4: (64, 64, 32, 8, 2), 8: (32, 32, 16, 4, 1)}
BACKWARD_TILES = {
    2: {64: (128, 64, 64, 8, 2), 128: (128, 64, 128, 8, 2), 256: (64, 64, 256, 8, 2), 512: (64, 32, 64, 8, 2)},
    4: {64: (64, 32, 32, 8, 2), 128: (64, 32, 32, 8, 2), 256: (32, 32, 32, 8, 2), 512: (16, 16, 32, 8, 1)},
    8: {64: (32, 32, 32, 8, 1), 128: (32, 32, 32, 8, 1), 256: (16, 16, 32, 8, 1), 512: (16, 16, 32, 8, 1)},
}


# ---------------------------------------------------------------------------------------------------------------- definition
def reference(
    query: Tensor, key: Tensor | None, scale: Tensor, query_group: Tensor | None = None, key_group: Tensor | None = None, both: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, by autograd over the whole (N, M) array; arguments as in `pair_lse`, `column` is empty unless `both`."""
    kind = _kind(query)
    rows = query.to(kind)
    columns = rows if key is None else key.to(kind)
    logits = scale.to(kind) * (rows @ columns.T)
    others = query_group if key is None else key_group
    if query_group is not None and others is not None:
        logits = logits.masked_fill(query_group[:, None] == others[None], -math.inf)
    return logits.logsumexp(1), logits.logsumexp(0) if both else logits.new_empty(0)


def _kind(query: Tensor) -> torch.dtype:
    """Type of sums and results: float32, or float64 for float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------- tiles in torch
def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 (float64) sums and result, in the operands' type where the matrix library can."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out=out)


def _logits(rows: Tensor, columns: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    if rows.is_cuda:  # reading the scale would stall the device
        return _product(rows, columns.T, out=out).mul_(scale)
    return out.addmm_(rows, columns.T, beta=0, alpha=float(scale))


def _operands(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides; on a CPU in the type of the sums, since matrix products there have no mixed precision."""
    if not query.is_cuda:
        query, key = query.to(_kind(query)), None if key is None else key.to(_kind(query))
    return query, query if key is None else key


def _tiles(query: Tensor, columns: Tensor, mirrored: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of the (N, M) array, row by row. `mirrored` (rows against themselves): only those on and right of the diagonal."""
    n, m = query.shape[0], columns.shape[0]
    if query.is_cuda:  # few large launches: whole rows
        high, wide = max(16, CUDA_TILE_BYTES // (4 * m)), m
        mirrored = False
    else:
        high, wide = (MIRRORED_TILE, MIRRORED_TILE) if mirrored else (ROW_TILE, COLUMN_TILE)
    for top in range(0, n, high):
        for left in range(top if mirrored else 0, m, wide):
            yield slice(top, min(top + high, n)), slice(left, min(left + wide, m))


def _small(query: Tensor, columns: Tensor, scale: Tensor) -> bool:
    """Whether every logit is small enough to do without a maximum (never asked on a GPU: the answer would stall it)."""
    if query.is_cuda:
        return False
    longest = torch.linalg.vector_norm(query, dim=1).amax() * torch.linalg.vector_norm(columns, dim=1).amax()
    return float(scale.abs() * longest) <= SAFE_LOGIT


class _LeftOut:
    """Puts a value where groups are equal. On a CPU the pairs are listed once if they are few, which spares two passes over every tile."""

    def __init__(self, query_group: Tensor | None, others: Tensor | None) -> None:
        self.query_group, self.others = query_group, others
        self.pairs: tuple[Tensor, Tensor] | None = None
        if query_group is None or others is None or query_group.is_cuda:
            return
        ordered, order = others.sort()
        low = torch.searchsorted(ordered, query_group)
        counts = torch.searchsorted(ordered, query_group, right=True) - low
        ends = counts.cumsum(0)
        if ends.numel() and int(ends[-1]) <= 4 * (len(query_group) + len(others)):
            within = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
            self.pairs = torch.arange(len(query_group)).repeat_interleave(counts), order[low.repeat_interleave(counts) + within]
            self.bounds = [0, *ends.tolist()]

    def put(self, tile: Tensor, rows: slice, columns: slice, value: float) -> None:
        if self.pairs is not None:
            part = slice(self.bounds[rows.start], self.bounds[rows.stop])
            row, column = (side[part] for side in self.pairs)
            inside = (column >= columns.start) & (column < columns.stop)
            tile[row[inside] - rows.start, column[inside] - columns.start] = value
        elif self.query_group is not None and self.others is not None:
            tile.masked_fill_(self.query_group[rows, None] == self.others[None, columns], value)


class _Sums:
    """log of sums of exponentials that arrive block by block, kept as maximum and sum; without a maximum where logits are small."""

    def __init__(self, count: int, like: Tensor, small: bool) -> None:
        self.total = like.new_zeros(count)
        self.small = small
        self.highest = like.new_full((0 if small else count,), -math.inf)

    def rebase(self, place: slice, largest: Tensor) -> Tensor:
        """Take in a block's maxima; gives what to subtract from its logits (0 where all are -inf)."""
        above = torch.maximum(self.highest[place], largest)
        base = above.masked_fill(above == -math.inf, 0.0)
        self.total[place] *= (self.highest[place] - base).exp_()
        self.highest[place] = above
        return base

    def log(self) -> Tensor:
        found = self.total.log_()
        return found if self.small else found.add_(self.highest.masked_fill_(self.highest == -math.inf, 0.0))


def _tiled_forward(
    query: Tensor, key: Tensor | None, scale: Tensor, query_group: Tensor | None, key_group: Tensor | None, both: bool, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and with `keep` (N, D): the mean of the keys under each row's softmax, from the tile at hand.

    Where keys carry no gradient that mean times the upstream gradient is all the backward pass needs: it computes no tile again.
    Rows against themselves have symmetric logits: a block right of the diagonal gives its rows' sums and, by columns, those of the rows below.
    """
    left_out = _LeftOut(query_group, query_group if key is None else key_group)
    kind = _kind(query)
    query, columns = _operands(query, key)
    n, m = query.shape[0], columns.shape[0]
    scale = scale.to(kind)
    small = _small(query, columns, scale)
    like = query.new_empty(0, dtype=kind)
    row, column = _Sums(n, like, small), _Sums(m if both else 0, like, small)
    mean = query.new_zeros((n, query.shape[1]) if keep else (0,), dtype=kind)
    buffer = like
    for rows, across in _tiles(query, columns, key is None):
        buffer, tile = _block(buffer, query[rows], columns[across], scale)
        if small:
            tile.exp_()
            left_out.put(tile, rows, across, 0.0)
            row.total[rows] += tile.sum(1)
            if both:
                column.total[across] += tile.sum(0)
            elif key is None and across.start > rows.start:
                row.total[across] += tile.sum(0)
        else:
            left_out.put(tile, rows, across, -math.inf)
            if both:
                base = column.rebase(across, tile.amax(0))
                column.total[across] += (tile - base).exp_().sum(0)
            elif key is None and across.start > rows.start:
                base = row.rebase(across, tile.amax(0))
                row.total[across] += (tile - base).exp_().sum(0)
            before = row.highest[rows].clone() if keep else None
            base = row.rebase(rows, tile.amax(1))
            if before is not None:
                mean[rows] *= (before - base).exp_()[:, None]
            row.total[rows] += tile.sub_(base[:, None]).exp_().sum(1)
        if keep:
            mean[rows] += _product(tile.to(columns.dtype), columns[across])
    if keep:
        mean.div_(row.total.clamp(min=torch.finfo(kind).tiny)[:, None])
    return row.log(), column.log(), mean


def _block(buffer: Tensor, rows: Tensor, columns: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one block, in memory that every block uses again (the first is the largest)."""
    size = rows.shape[0] * columns.shape[0]
    if buffer.numel() < size:
        buffer = buffer.new_empty(size)
    return buffer, _logits(rows, columns, scale, buffer[:size].view(rows.shape[0], columns.shape[0]))


def _tiled_backward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    row: Tensor,
    column: Tensor | None,
    grad_row: Tensor,
    grad_column: Tensor | None,
    need_key: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums (not yet times scale) over j of g_ij key_j, and over i of g_ij query_i, with g_ij = d loss / d logit_ij.

    Against itself the two sums are one: logits are symmetric, so row i gathers g_ij + g_ji, and a block serves its mirror image too.
    """
    left_out = _LeftOut(query_group, query_group if key is None else key_group)
    if key is None:
        column, grad_column = row, grad_row
    kind = _kind(query)
    query, columns = _operands(query, key)
    n, m = query.shape[0], columns.shape[0]
    scale = scale.to(kind)
    small = _small(query, columns, scale)
    if small:
        row_factor = grad_row * (-row).exp_()
        column_factor = None if column is None or grad_column is None else grad_column * (-column).exp_()
    out = query.new_zeros(n, query.shape[1], dtype=kind)
    key_out = query.new_zeros(m, query.shape[1], dtype=kind) if need_key and key is not None else None
    buffer = query.new_empty(0, dtype=kind)
    for rows, across in _tiles(query, columns, key is None):
        buffer, tile = _block(buffer, query[rows], columns[across], scale)
        if small:
            tile.exp_().mul_(row_factor[rows, None] if column_factor is None else row_factor[rows, None] + column_factor[across])
        elif column is None or grad_column is None:
            tile.sub_(row[rows, None]).exp_().mul_(grad_row[rows, None])
        else:
            by_column = (tile - column[across]).exp_().mul_(grad_column[across])
            tile.sub_(row[rows, None]).exp_().mul_(grad_row[rows, None]).add_(by_column)
        left_out.put(tile, rows, across, 0.0)
        weights = tile.to(query.dtype)
        out[rows] += _product(weights, columns[across])
        if key_out is not None:
            key_out[across] += _product(weights.T, query[rows])
        elif key is None and across.start > rows.start:
            out[across] += _product(weights.T, query[rows])
    return out, key_out


# ---------------------------------------------------------------------------------------------------------------- Triton
@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    scale,
    query_group,
    key_group,
    row_max,
    row_sum,
    column_max,
    column_sum,
    n,
    m,
    tiles_a_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPED: tl.constexpr,
    BOTH: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum and sum in base 2 of one block of rows over one split of the columns; with BOTH also of every column over this block."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_inside = rows < n
    base2 = tl.load(scale).to(ACC) * 1.4426950408889634
    rows_at = rows.to(tl.int64)[:, None] * D
    highest = tl.full((ROWS,), float("-inf"), ACC)
    total = tl.zeros((ROWS,), ACC)
    if GROUPED:
        row_group = tl.load(query_group + rows, mask=row_inside, other=0)
    last = tl.minimum((split + 1) * tiles_a_split, tl.cdiv(m, COLUMNS))
    for tile in range(split * tiles_a_split, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        column_inside = columns < m
        columns_at = columns.to(tl.int64)[:, None] * D
        dots = tl.zeros((ROWS, COLUMNS), ACC)
        for start in range(0, D, CHUNK):
            width = start + tl.arange(0, CHUNK)
            inside = width < D
            a = tl.load(query + rows_at + width[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(key + columns_at + width[None, :], mask=column_inside[:, None] & inside[None, :], other=0.0)
            if UP:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            dots = tl.dot(a, tl.trans(b), acc=dots, input_precision=PRECISION, out_dtype=ACC)
        allowed = row_inside[:, None] & column_inside[None, :]
        if GROUPED:
            column_group = tl.load(key_group + columns, mask=column_inside, other=0)
            allowed = allowed & (row_group[:, None] != column_group[None, :])
        logits = tl.where(allowed, dots * base2, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(highest - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        highest = above
        if BOTH:
            above_column = tl.max(logits, 0)
            finite_column = tl.where(above_column == float("-inf"), 0.0, above_column)
            place = block.to(tl.int64) * m + columns
            tl.store(column_max + place, above_column, mask=column_inside)
            tl.store(column_sum + place, tl.sum(tl.exp2(logits - finite_column[None, :]), 0), mask=column_inside)
    place = split.to(tl.int64) * n + rows
    tl.store(row_max + place, highest, mask=row_inside)
    tl.store(row_sum + place, total, mask=row_inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    one,
    other,
    scale,
    one_group,
    other_group,
    one_lse,
    one_grad,
    other_lse,
    other_grad,
    out,
    n,
    m,
    tiles_a_split,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPED: tl.constexpr,
    BY_ONE: tl.constexpr,
    BY_OTHER: tl.constexpr,
    UP: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum over j of (one_grad_i e^(x_ij - one_lse_i) + other_grad_j e^(x_ij - other_lse_j)) other_j, for one split of the j."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_inside = rows < n
    width = tl.arange(0, WIDTH)
    inside = width < D
    base2 = tl.load(scale).to(ACC) * 1.4426950408889634
    rows_at = rows.to(tl.int64)[:, None] * D
    if CHUNK >= WIDTH:
        a = tl.load(one + rows_at + width[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        if UP:
            a = a.to(tl.float32)
    if BY_ONE:
        row_lse = tl.load(one_lse + rows, mask=row_inside, other=float("inf"))
        row_grad = tl.load(one_grad + rows, mask=row_inside, other=0.0)
    if GROUPED:
        row_group = tl.load(one_group + rows, mask=row_inside, other=0)
    total = tl.zeros((ROWS, WIDTH), ACC)
    last = tl.minimum((split + 1) * tiles_a_split, tl.cdiv(m, COLUMNS))
    for tile in range(split * tiles_a_split, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        column_inside = columns < m
        columns_at = columns.to(tl.int64)[:, None] * D
        b = tl.load(other + columns_at + width[None, :], mask=column_inside[:, None] & inside[None, :], other=0.0)
        if UP:
            b = b.to(tl.float32)
        if CHUNK >= WIDTH:
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
        else:  # three TF32 products need more registers than rows of this width leave: read both sides again in chunks
            dots = tl.zeros((ROWS, COLUMNS), ACC)
            for start in range(0, D, CHUNK):
                part = start + tl.arange(0, CHUNK)
                a_part = tl.load(one + rows_at + part[None, :], mask=row_inside[:, None] & (part < D)[None, :], other=0.0)
                b_part = tl.load(other + columns_at + part[None, :], mask=column_inside[:, None] & (part < D)[None, :], other=0.0)
                if UP:
                    a_part = a_part.to(tl.float32)
                    b_part = b_part.to(tl.float32)
                dots = tl.dot(a_part, tl.trans(b_part), acc=dots, input_precision=PRECISION, out_dtype=ACC)
        allowed = row_inside[:, None] & column_inside[None, :]
        if GROUPED:
            column_group = tl.load(other_group + columns, mask=column_inside, other=0)
            allowed = allowed & (row_group[:, None] != column_group[None, :])
        logits = tl.where(allowed, dots * base2, float("-inf"))
        weights = tl.zeros((ROWS, COLUMNS), ACC)
        if BY_ONE:
            weights += row_grad[:, None] * tl.exp2(logits - row_lse[:, None])
        if BY_OTHER:
            column_lse = tl.load(other_lse + columns, mask=column_inside, other=float("inf"))
            column_grad = tl.load(other_grad + columns, mask=column_inside, other=0.0)
            weights += column_grad[None, :] * tl.exp2(logits - column_lse[None, :])
        total = tl.dot(weights.to(b.dtype), b, acc=total, input_precision=PRECISION, out_dtype=ACC)
    place = (split.to(tl.int64) * n + rows)[:, None] * D + width[None, :]
    tl.store(out + place, total, mask=row_inside[:, None] & inside[None, :])


def _padded(rows: Tensor) -> Tensor:
    """Contiguous, width a multiple of 16: zeros change no dot product, and without the multiple the compiler gives up asynchronous copies."""
    missing = -rows.shape[1] % 16
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).contiguous()


def _splits(blocks: int, tiles: int) -> tuple[int, int]:
    """Number of column splits and column tiles in each: enough programs to fill a device where rows alone are too few."""
    splits = max(1, min(-(-PROGRAMS // blocks), tiles))
    each = -(-tiles // splits)
    return -(-tiles // each), each


def _triton_forward(
    query: Tensor, key: Tensor | None, scale: Tensor, query_group: Tensor | None, key_group: Tensor | None, both: bool
) -> tuple[Tensor, Tensor]:
    a = _padded(query)
    b, others = (a, query_group) if key is None else (_padded(key), key_group)
    n, m = a.shape[0], b.shape[0]
    block = FORWARD_TILES[a.element_size()][0]
    step = max(1, COLUMN_BYTES // (2 * _kind(query).itemsize * m)) * block if both else n
    rows, columns = [], []
    for start in range(0, n, step):
        group = None if query_group is None else query_group[start : start + step]
        row, column = _forward_launch(a[start : start + step], b, scale, group, others, both)
        rows.append(row)
        columns.append(column)
    if len(rows) == 1:
        return rows[0], columns[0]
    return torch.cat(rows), torch.stack(columns).logsumexp(0)


def _forward_launch(
    a: Tensor, b: Tensor, scale: Tensor, a_group: Tensor | None, b_group: Tensor | None, both: bool
) -> tuple[Tensor, Tensor]:
    (n, d), m, kind = a.shape, b.shape[0], _kind(a)
    rows, columns, chunk, warps, stages = FORWARD_TILES[a.element_size()]
    blocks = -(-n // rows)
    splits, each = _splits(blocks, -(-m // columns))
    row_max, row_sum = a.new_empty((2, splits, n), dtype=kind)
    column_max, column_sum = a.new_empty((2, blocks, m) if both else (2, 0, 0), dtype=kind)
    with on_device(a):
        _forward_kernel[(blocks, splits)](
            a,
            b,
            scale,
            a if a_group is None else a_group,
            a if b_group is None else b_group,
            row_max,
            row_sum,
            column_max,
            column_sum,
            n,
            m,
            each,
            D=d,
            ROWS=rows,
            COLUMNS=columns,
            CHUNK=min(chunk, triton.next_power_of_2(d)),
            GROUPED=a_group is not None,
            BOTH=both,
            UP=up(a.dtype),
            ACC=dtype_of(kind),
            PRECISION=precision(a.dtype),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return _merge(row_max, row_sum), _merge(column_max, column_sum) if both else column_sum.new_empty(0)


def _merge(highest: Tensor, total: Tensor) -> Tensor:
    """Natural logarithm of the whole sum from (parts, rows) maxima in base 2 and sums."""
    if highest.shape[0] == 1:
        return (total.log2() + highest).squeeze(0).mul_(math.log(2))
    return (total.log() + highest * math.log(2)).logsumexp(0)


def _triton_backward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    row: Tensor,
    column: Tensor | None,
    grad_row: Tensor,
    grad_column: Tensor | None,
    need_key: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `_tiled_backward`: one kernel, called with the roles swapped for the keys, and not at all where keys need no gradient."""
    a = _padded(query)
    base2 = row * (1 / math.log(2))
    if key is None:
        return _sum_of_others(a, a, scale, query_group, query_group, base2, grad_row, base2, grad_row)[:, : query.shape[1]], None
    b = _padded(key)
    column_base2 = None if column is None else column * (1 / math.log(2))
    out = _sum_of_others(a, b, scale, query_group, key_group, base2, grad_row, column_base2, grad_column)
    if not need_key:
        return out[:, : query.shape[1]], None
    key_out = _sum_of_others(b, a, scale, key_group, query_group, column_base2, grad_column, base2, grad_row)
    return out[:, : query.shape[1]], key_out[:, : query.shape[1]]


def _sum_of_others(
    one: Tensor,
    other: Tensor,
    scale: Tensor,
    one_group: Tensor | None,
    other_group: Tensor | None,
    one_lse: Tensor | None,
    one_grad: Tensor | None,
    other_lse: Tensor | None,
    other_grad: Tensor | None,
) -> Tensor:
    (n, d), m = one.shape, other.shape[0]
    kind = _kind(one)
    width = max(16, triton.next_power_of_2(d))
    rows, columns, chunk, warps, stages = BACKWARD_TILES[one.element_size()][max(64, width)]
    blocks = -(-n // rows)
    splits, each = _splits(blocks, -(-m // columns))
    out = one.new_empty(splits, n, d, dtype=kind)
    with on_device(one):
        _backward_kernel[(blocks, splits)](
            one,
            other,
            scale,
            one if one_group is None else one_group,
            one if other_group is None else other_group,
            one if one_lse is None else one_lse,
            one if one_grad is None else one_grad,
            one if other_lse is None else other_lse,
            one if other_grad is None else other_grad,
            out,
            n,
            m,
            each,
            D=d,
            WIDTH=width,
            ROWS=rows,
            COLUMNS=columns,
            CHUNK=min(chunk, width),
            GROUPED=one_group is not None,
            BY_ONE=one_lse is not None,
            BY_OTHER=other_lse is not None,
            UP=up(one.dtype),
            ACC=dtype_of(kind),
            PRECISION=precision(one.dtype),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    return out[0] if splits == 1 else out.sum(0)


# ---------------------------------------------------------------------------------------------------------------- operators
@torch.library.custom_op("contramask::pair_lse", mutates_args=())
def _pair_lse(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    both: bool,
    keep: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        if fused:
            return *_triton_forward(query, key, scale, query_group, key_group, both), query.new_empty(0, dtype=_kind(query))
        return _tiled_forward(query, key, scale, query_group, key_group, both, keep)


@_pair_lse.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    both: bool,
    keep: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    row = query.new_empty(query.shape[0], dtype=_kind(query))
    mean = torch.empty(query.shape, dtype=row.dtype, device=query.device) if keep else row.new_empty(0)
    return row, row.new_empty(key.shape[0] if both and key is not None else 0), mean


@torch.library.custom_op("contramask::pair_lse_backward", mutates_args=())
def _pair_lse_backward(
    grad_row: Tensor,
    grad_column: Tensor,
    row: Tensor,
    column: Tensor,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    both: bool,
    fused: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dead = row == -math.inf  # nothing was left: an infinite lse makes every weight of the row 0
    row, grad_row = row.masked_fill(dead, math.inf), grad_row.masked_fill(dead, 0.0)
    dead = column == -math.inf
    column, grad_column = column.masked_fill(dead, math.inf), grad_column.masked_fill(dead, 0.0)
    with torch.autocast(query.device.type, enabled=False):
        out, key_out = (_triton_backward if fused else _tiled_backward)(
            query, key, scale, query_group, key_group, row, column if both else None, grad_row, grad_column if both else None, need_key
        )
    kind = out.dtype
    along = torch.dot(query.reshape(-1).to(kind), out.reshape(-1))  # sum of g_ij q_i . k_j; against itself every pair stands in both rows
    grad_scale = (along / 2 if key is None else along).to(scale.dtype)
    factor = scale.to(kind)
    grad_key = query.new_empty(0) if key_out is None else (key_out * factor).to(query.dtype)
    return (out * factor).to(query.dtype), grad_key, grad_scale


@_pair_lse_backward.register_fake
def _(
    grad_row: Tensor,
    grad_column: Tensor,
    row: Tensor,
    column: Tensor,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    query_group: Tensor | None,
    key_group: Tensor | None,
    both: bool,
    fused: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = query.new_empty(key.shape) if key is not None and need_key else query.new_empty(0)
    return query.new_empty(query.shape), keys, torch.empty_like(scale)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, scale, query_group, key_group, ctx.both, ctx.keep, ctx.fused = inputs
    ctx.save_for_backward(*output, query, key, scale, query_group, key_group)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_row, grad_column, _grad_mean):  # type: ignore[no-untyped-def]
    row, column, mean, query, key, scale, query_group, key_group = ctx.saved_tensors
    if ctx.keep:
        along = mean * grad_row.masked_fill(row == -math.inf, 0.0)[:, None]
        grads = (along * scale).to(query.dtype), None, torch.dot(query.reshape(-1).to(along.dtype), along.reshape(-1)).to(scale.dtype)
        return *grads, None, None, None, None, None
    need_key = key is not None and ctx.needs_input_grad[1]
    given = (grad_row.contiguous(), grad_column.contiguous(), row, column, query, key, scale, query_group, key_group)
    grads = _pair_lse_backward(*given, ctx.both, ctx.fused, need_key)
    return grads[0], grads[1] if need_key else None, grads[2], None, None, None, None, None


_pair_lse.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------------------- public
def pair_lse(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor | float,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    *,
    both: bool = False,
    path: Path = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of scaled dot products of every row with all allowed others (module docstring).

    Args:
        query: (N, D) float32, bfloat16, float16 (cast to float32) or float64, as it stands: nothing is normalised here.
        key: (M, D) of the same type; None = the queries themselves, with one backward pass for both roles.
        scale: number or 0-d tensor that multiplies the dot products (1 / temperature).
        query_group: (N,) integers, key_group: (M,); a pair with equal groups is left out. Neither = nothing is left out.
            With key None, query_group serves both sides.
        both: give the sums over queries of every key too, from the same pass.
        path: "auto" picks; "plain" is the definition, "tiled" torch without the (N, M) array, "triton" the kernels.
    Returns:
        row (N,) and column (M,) ((0,) unless `both`), float32 (float64 for float64). A row with nothing left is -inf and has no gradient.
        Differentiable once, in query, key and scale; keys that need no gradient cost none.
    Raises:
        ValueError: shapes, types or devices do not fit. ImportError: path="triton" without Triton.
    """
    _check(query, key, query_group, key_group, both)
    if query.dtype == torch.float16:  # gradients of a large batch are below its smallest number
        query, key = query.float(), None if key is None else key.float()
    others = query if key is None else key
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=_kind(query), device=query.device)
    if query_group is not None and key is not None and key_group is not None and query_group.dtype != key_group.dtype:
        query_group, key_group = query_group.long(), key_group.long()
    if query.shape[0] == 0 or others.shape[0] == 0:
        path = "plain"
    if path == "auto":
        path = choose(query, others)
    if path == "plain":
        with torch.autocast(query.device.type, enabled=False):
            row, column = reference(query, key, scale, query_group, key_group, both)
    else:
        if path == "triton":
            require(query)
        if query.shape[1] > 512 and path == "triton":
            raise ValueError(f'path="triton" holds a gradient of rows up to 512 wide on chip, got {query.shape[1]}; use path="tiled"')
        query_group, key_group = (None if group is None else group.contiguous() for group in (query_group, key_group))
        fused, fixed_keys = path == "triton", key is not None and not key.requires_grad
        keep = fixed_keys and not fused and not both and query.requires_grad and torch.is_grad_enabled()
        row, column, _ = _pair_lse(query, key, scale, query_group, key_group, both, keep, fused)
    return row, column


def choose(query: Tensor, key: Tensor) -> Literal["plain", "tiled", "triton"]:
    """The path that "auto" takes: Triton never runs on a CPU."""
    if query.shape[0] * key.shape[0] <= PLAIN_PAIRS.get(query.device.type, 2**22) or query.dtype == torch.float64:
        return "plain"
    return "triton" if query.is_cuda and AVAILABLE and query.shape[1] <= TRITON_WIDTH[query.element_size()] else "tiled"


def _check(query: Tensor, key: Tensor | None, query_group: Tensor | None, key_group: Tensor | None, both: bool) -> None:
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(f"query: expected (N, D) floating point, got {tuple(query.shape)} {query.dtype}")
    if key is None:
        if both or key_group is not None:
            raise ValueError("key is None: rows against themselves have no separate columns; leave out `both` and `key_group`")
    elif key.ndim != 2 or key.shape[1] != query.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)}: widths differ")
    elif key.dtype != query.dtype or key.device != query.device:
        raise ValueError(f"query ({query.dtype}, {query.device}) and key ({key.dtype}, {key.device}) differ; cast or move one of them")
    elif (query_group is None) != (key_group is None):
        raise ValueError("query_group and key_group go together: give both or neither")
    for name, group, rows in (("query_group", query_group, query), ("key_group", key_group, query if key is None else key)):
        if group is not None and (group.shape != rows.shape[:1] or group.is_floating_point()):
            raise ValueError(f"{name}: expected ({rows.shape[0]},) integers, got {tuple(group.shape)} {group.dtype}")
