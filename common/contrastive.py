"""Contrastive losses, their heads and the gather over processes; every loss rests on `common.kernels.pair_lse`.

Conventions, the same in every function:
- Rows come as they stand. Pass `unit(rows)` where the paper says cosine: it divides in float32 by the L2 norm.
- `scale` multiplies the dot products: 1 / temperature, or exp of a learned log-scale (SCGC's temperature multiplies: pass it).
- The positive pair is left out of the log-sum-exp and added outside. Nothing of size rows x keys is kept.
- `gather` = None contrasts the rows of this process alone. Otherwise keys come from every process, and the name says what flows back:
  "none" nothing, not even to own rows (CROMA); "local" to own rows inside the gathered keys; "full" to every row from every process.
  With "full", gradients averaged over processes (as DDP does) equal those of one process with the whole batch, also where local batches differ.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.pair_lse import Path, pair_lse

Gather = Literal["none", "local", "full"]
Reduction = Literal["mean", "none"]
Alone = Literal["drop", "zero"]
Anchors = Literal["all", "first", "all_but_last"]


# ---------------------------------------------------------------------------------------------------------------- rows and heads
def unit(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows (..., D) divided by max(L2 norm, eps), in float32 or better. At an exact zero row the gradient is that of rows / eps."""
    kind = torch.promote_types(rows.dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.to(kind), dim=-1, eps=eps)


def projection_head(widths: Sequence[int], *, batch_norm: bool = False, hidden_bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them: `(2048, 128)` is linear, `(2048, 2048, 128)` the usual two layers.

    Args:
        widths: input, hidden and output widths, at least two.
        batch_norm: BatchNorm1d between each hidden layer and its ReLU.
        hidden_bias: bias of hidden layers (BYOL has none); the last layer always has one.
    """
    if len(widths) < 2:
        raise ValueError(f"widths={tuple(widths)}: expected an input and an output width at least")
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=hidden_bias), *([nn.BatchNorm1d(after)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


# ---------------------------------------------------------------------------------------------------------------- processes
def _world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of processes; (0, 1) where nothing is distributed."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_available() and dist.is_initialized() else (0, 1)


def row_counts(rows: Tensor, group: dist.ProcessGroup | None = None) -> list[int]:
    """Number of rows of every process, by one small exchange that waits for the device; for loaders whose local batches differ."""
    _, world = _world(group)
    if world == 1:
        return [rows.shape[0]]
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device), group=group)
    return torch.cat(counts).tolist()


def _all_rows(rows: Tensor, counts: Sequence[int] | None, group: dist.ProcessGroup | None) -> Tensor:
    _rank, world = _world(group)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the new name since torch 2.14
    if counts is None or len(set(counts)) == 1:
        out = rows.new_empty((world * rows.shape[0], *rows.shape[1:]))
        gather(out, rows.contiguous(), group=group)
        return out
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = rows.new_empty((world, *padded.shape))
    gather(parts.flatten(0, 1), padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherFull(torch.autograd.Function):
    """All rows forwards; backwards the sum over processes of the gradient of own rows. (torch's own is moving to a private module.)"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int] | None, group: dist.ProcessGroup | None) -> Tensor:
        ctx.own, ctx.group = _own(rows, counts, group), group
        return _all_rows(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.own].clone(), None, None


def _own(rows: Tensor, counts: Sequence[int] | None, group: dist.ProcessGroup | None) -> slice:
    """Where the rows of this process stand among all rows (in order of rank)."""
    rank, world = _world(group)
    if counts is not None and (len(counts) != world or counts[rank] != rows.shape[0]):
        raise ValueError(f"counts={list(counts)}: expected {world} counts, number {rank} being {rows.shape[0]}; see row_counts")
    start = rank * rows.shape[0] if counts is None else sum(counts[:rank])
    return slice(start, start + rows.shape[0])


def gather_rows(rows: Tensor, gradient: Gather, *, counts: Sequence[int] | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of every process in order of rank, (sum of counts, ...).

    Args:
        rows: (local batch, ...) of any type.
        gradient: what flows back (module docstring); in one process "none" still detaches.
        counts: rows of every process where they differ (`row_counts`); None = every process has as many as this one,
            which is what Accelerate's loaders give and costs no exchange.
    """
    _rank, world = _world(group)
    own = _own(rows, counts, group)
    if world == 1:
        return rows.detach() if gradient == "none" else rows
    if gradient == "full":
        return _GatherFull.apply(rows, counts, group)
    everyone = _all_rows(rows.detach(), counts, group)
    return everyone if gradient == "none" else torch.cat([everyone[: own.start], rows, everyone[own.stop :]])


@dataclass(frozen=True)
class _Place:
    """Where local rows stand among the keys, and what a local sum is multiplied by to be averaged over processes."""

    offset: int
    total: int
    world: int


def _place(rows: Tensor, gather: Gather | None, counts: Sequence[int] | None, group: dist.ProcessGroup | None) -> _Place:
    if gather is None:
        return _Place(0, rows.shape[0], 1)
    _, world = _world(group)
    return _Place(_own(rows, counts, group).start, world * rows.shape[0] if counts is None else sum(counts), world)


def _reduce(per_row: Tensor, place: _Place, reduction: Reduction, rows_each: int = 1) -> Tensor:
    """Mean over the rows of all processes once gradients are averaged over processes; no row at all: 0."""
    if reduction == "none":
        return per_row
    return per_row.sum() * (place.world / max(place.total * rows_each, 1))


# ---------------------------------------------------------------------------------------------------------------- InfoNCE
def _dots(a: Tensor, b: Tensor) -> Tensor:
    kind = torch.promote_types(a.dtype, torch.float32)
    return (a.to(kind) * b.to(kind)).sum(-1)


def _positive_outside(lse: Tensor, positive: Tensor) -> Tensor:
    """-log of the positive's share of positive + rest; no rest (lse = -inf): 0, without gradient."""
    return F.softplus(lse - positive, threshold=40)


def _index(count: int, like: Tensor, start: int = 0) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int32, device=like.device)


def info_nce(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    offset: int = 0,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: Reduction = "mean",
    path: Path = "auto",
) -> Tensor:
    """One direction: -log softmax over all keys of the target's logit, query i's target being key offset + i.

    Args:
        query: (N, D). key: (M, D), M >= offset + N. Detach the keys for the "none" convention.
        scale: number or 0-d tensor.
        offset: rows of lower ranks, where query holds the rows of one rank and key those of all.
        query_group, key_group: (N,), (M,) integers; pairs with equal groups are not negatives (equal captions, clips of one video).
            A target must share its query's group. None = the target alone.
        reduction: "mean" over queries, or "none" for (N,).
    Raises:
        ValueError: a target is missing, or shapes do not fit.
    """
    if not 0 <= offset <= key.shape[0] - query.shape[0]:
        raise ValueError(f"query {tuple(query.shape)} at offset {offset} has targets beyond key {tuple(key.shape)}")
    if query_group is None and key_group is None:
        query_group, key_group = _index(query.shape[0], query, offset), _index(key.shape[0], key)
    lse, _ = pair_lse(query, key, scale, query_group, key_group, path=path)
    per_row = _positive_outside(lse, scale * _dots(query, key[offset : offset + query.shape[0]]))
    return _reduce(per_row, _Place(0, query.shape[0], 1), reduction)


def symmetric_info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    *,
    group: Tensor | None = None,
    gather: Gather | None = None,
    counts: Sequence[int] | None = None,
    processes: dist.ProcessGroup | None = None,
    path: Path = "auto",
) -> Tensor:
    """Mean of both directions, a_i and b_i being the pair (CLIP). In one process one pass serves both directions.

    Args:
        a, b: (B, D), the rows of this process.
        group: (B,) integers; rows with equal groups are not each other's negatives. None = every row its own.
        gather, counts, processes: module docstring and `gather_rows`.
    """
    if a.shape != b.shape:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: expected pairs of rows")
    place = _place(a, gather, counts, processes)
    if gather is None or (place.world == 1 and gather != "none"):
        ids = _index(a.shape[0], a) if group is None else group
        row, column = pair_lse(a, b, scale, ids, ids, both=True, path=path)
        positive = scale * _dots(a, b)
        return _reduce(_positive_outside(row, positive) + _positive_outside(column, positive), place, "mean") / 2
    all_a, all_b = (gather_rows(rows, gather, counts=counts, group=processes) for rows in (a, b))
    all_groups = None if group is None else gather_rows(group, "none", counts=counts, group=processes)
    per_row = [
        info_nce(rows, keys, scale, offset=place.offset, query_group=group, key_group=all_groups, reduction="none", path=path)
        for rows, keys in ((a, all_b), (b, all_a))
    ]
    return _reduce(per_row[0] + per_row[1], place, "mean") / 2


def nt_xent(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    *,
    gather: Gather | None = None,
    counts: Sequence[int] | None = None,
    processes: dist.ProcessGroup | None = None,
    reduction: Reduction = "mean",
    path: Path = "auto",
) -> Tensor:
    """SimCLR: 2B rows [a; b], a row's positive is its other view, all other rows but itself are negatives; mean over 2B rows.

    Args:
        a, b: (B, D) two views of the same images. Others as in `symmetric_info_nce`; reduction "none" gives (2B,), rows of a first.
    """
    if a.shape != b.shape:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: expected two views of the same images")
    place = _place(a, gather, counts, processes)
    rows = torch.cat([a, b])
    images = _index(a.shape[0], a, place.offset).repeat(2)
    if gather is None or (place.world == 1 and gather != "none"):
        lse, _ = pair_lse(rows, None, scale, images, path=path)
        positive = _dots(a, b).repeat(2)
    else:
        keys = gather_rows(torch.stack([a, b], 1), gather, counts=counts, group=processes)
        lse, _ = pair_lse(rows, keys.flatten(0, 1), scale, images, _index(place.total, a).repeat_interleave(2), path=path)
        own = keys[place.offset : place.offset + a.shape[0]]
        positive = torch.cat([_dots(a, own[:, 1]), _dots(b, own[:, 0])])
    return _reduce(_positive_outside(lse, scale * positive), place, reduction, rows_each=2)


# ---------------------------------------------------------------------------------------------------------------- MoCo
class Queue(nn.Module):
    """Keys of past batches, oldest overwritten first. `rows` (length, D) and `pointer` (0-d) are buffers: checkpoints hold them.

    DDP copies buffers of rank 0 to the others before a forward pass; with gathered keys (`push`) all are equal anyway.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, length: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", unit(torch.randn(length, width, generator=generator)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def keys(self) -> Tensor:
        """A copy of the rows, so that `push` may come before the backward pass."""
        return self.rows.clone()

    @torch.no_grad()
    def push(
        self, keys: Tensor, *, gather: bool = True, counts: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Overwrite from the pointer on, around the end, with keys (B, D); by default with those of every process."""
        if gather:
            keys = gather_rows(keys, "none", counts=counts, group=group)
        length = self.rows.shape[0]
        if keys.shape[0] > length or keys.shape[1:] != self.rows.shape[1:]:
            raise ValueError(f"keys {tuple(keys.shape)} do not fit a queue of {tuple(self.rows.shape)}")
        place = (self.pointer + torch.arange(keys.shape[0], device=keys.device)) % length
        self.rows.index_copy_(0, place, keys.detach().to(self.rows.dtype))
        self.pointer.copy_((self.pointer + keys.shape[0]) % length)


def queue_info_nce(
    query: Tensor, key: Tensor, queue: Tensor, scale: Tensor | float, *, reduction: Reduction = "mean", path: Path = "auto"
) -> Tensor:
    """MoCo: logits [q_i . k_i, q_i . queue], target the first; neither keys (N, D) nor queue (K, D) carry gradient."""
    if query.shape != key.shape:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)}: expected one key a query")
    lse, _ = pair_lse(query, queue.detach().to(query.dtype), scale, path=path)
    return _reduce(_positive_outside(lse, scale * _dots(query, key.detach())), _Place(0, query.shape[0], 1), reduction)


# ---------------------------------------------------------------------------------------------------------------- SupCon
@dataclass(frozen=True)
class SupCon:
    """A supervised contrastive loss and what it was averaged over."""

    loss: Tensor
    """0-d."""
    per_row: Tensor
    """(anchors,), 0 where an anchor has no positive."""
    has_positive: Tensor
    """(anchors,) bool."""
    anchors: Tensor
    """0-d, anchors with a positive, over all processes where keys are gathered."""


def _class_sums(key: Tensor, key_labels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum (N, D) and number (N,) of the keys that share each query's label; classes are found by sorting, without waiting for the device."""
    order = key_labels.argsort()
    ordered = key_labels[order]
    number = F.pad((ordered[1:] != ordered[:-1]).long().cumsum(0), (1, 0))
    kind = torch.promote_types(key.dtype, torch.float32)
    sums = torch.zeros(key.shape, dtype=kind, device=key.device).index_add(0, number, key.to(kind)[order])
    counts = torch.zeros(key.shape[0], dtype=kind, device=key.device).index_add(0, number, torch.ones_like(number, dtype=kind))
    place = torch.searchsorted(ordered, labels).clamp(max=key.shape[0] - 1)
    known = (ordered[place] == labels).to(kind)
    return sums[number[place]] * known[:, None], counts[number[place]] * known


def _supcon(
    query: Tensor, labels: Tensor, key: Tensor | None, key_labels: Tensor, own: Tensor, scale: Tensor | float, path: Path
) -> tuple[Tensor, Tensor]:
    """Per anchor: log of the sum over all keys but itself (key `own`) minus the mean logit of the other keys of its class."""
    keys = query if key is None else key
    lse, _ = pair_lse(query, key, scale, own, None if key is None else _index(keys.shape[0], keys), path=path)
    sums, counts = _class_sums(keys, key_labels, labels)
    sums, counts = sums - keys[own.long()], counts - 1
    has_positive = counts > 0.5
    mean = scale * _dots(query, sums) / counts.clamp(min=1)
    return torch.where(has_positive, lse - mean, 0.0), has_positive


def _supcon_mean(
    per_row: Tensor, has_positive: Tensor, place: _Place, rows_each: int, alone: Alone, processes: dist.ProcessGroup | None
) -> SupCon:
    anchors = has_positive.sum()
    if place.world > 1:
        dist.all_reduce(anchors, group=processes)
    total = anchors if alone == "drop" else torch.full_like(anchors, place.total * rows_each)
    return SupCon(per_row.sum() * place.world / total.clamp(min=1), per_row, has_positive, anchors)


def supcon(
    query: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    *,
    key: Tensor | None = None,
    key_labels: Tensor | None = None,
    offset: int = 0,
    alone: Alone = "drop",
    path: Path = "auto",
) -> SupCon:
    """Supervised contrastive loss, log inside the mean over positives (Khosla et al. 2020, L_out). A base temperature is a factor outside.

    Args:
        query: (N, D) anchors; labels: (N,) integers.
        key, key_labels: (M, D), (M,) contrasts, query i being key offset + i and left out; None = the anchors themselves.
        alone: anchors without a positive leave the mean ("drop"), or count as 0 in a mean over all ("zero"). None left: loss 0.
    """
    if (key is None) != (key_labels is None):
        raise ValueError("key and key_labels go together: give both or neither")
    keys, all_labels = (query, labels) if key is None or key_labels is None else (key, key_labels)
    if not 0 <= offset <= keys.shape[0] - query.shape[0] or labels.shape != query.shape[:1] or all_labels.shape != keys.shape[:1]:
        raise ValueError(
            f"query {tuple(query.shape)}, labels {tuple(labels.shape)}, key {tuple(keys.shape)}, key_labels {tuple(all_labels.shape)}, "
            f"offset {offset}: expected one label a row and every query among the keys"
        )
    per_row, has_positive = _supcon(query, labels, key, all_labels, _index(query.shape[0], query, offset), scale, path)
    return _supcon_mean(per_row, has_positive, _Place(0, query.shape[0], 1), 1, alone, None)


def multi_view_supcon(
    features: Tensor,
    labels: Tensor | None,
    scale: Tensor | float,
    *,
    anchors: Anchors = "all",
    alone: Alone = "drop",
    gather: Gather | None = None,
    counts: Sequence[int] | None = None,
    processes: dist.ProcessGroup | None = None,
    path: Path = "auto",
) -> SupCon:
    """SupCon over several views of each image: crops, or exits of one network (SelfCon). Every (image, view) is a row, never its own positive.

    Args:
        features: (B, V, D), the main network's view last. labels: (B,) integers; None = positives are the other views of the image.
        anchors: "all" rows, those of the "first" view, or "all_but_last" (SelfCon's sub-network term); contrasts are always all rows.
        gather, counts, processes: module docstring; `per_row` runs over views, then over the images of this process.
    """
    if features.ndim != 3 or (labels is not None and labels.shape != features.shape[:1]):
        raise ValueError(
            f"features: expected (B, V, D) with labels (B,), got {tuple(features.shape)} and {None if labels is None else tuple(labels.shape)}"
        )
    batch, views, _ = features.shape
    if anchors == "all_but_last" and views < 2:
        raise ValueError('anchors="all_but_last" needs at least two views, got one')
    place = _place(features, gather, counts, processes)
    used = {"all": views, "first": 1, "all_but_last": views - 1}[anchors]
    everyone = features if gather is None else gather_rows(features, gather, counts=counts, group=processes)
    if labels is None:
        classes, all_classes = (_index(batch, features, place.offset), _index(place.total, features))
    else:
        classes, all_classes = labels, labels if gather is None else gather_rows(labels, "none", counts=counts, group=processes)
    query = features[:, :used].transpose(0, 1).flatten(0, 1)
    key = everyone.transpose(0, 1).flatten(0, 1)
    images = _index(batch, features, place.offset)
    own = (images + place.total * _index(used, features)[:, None]).flatten()
    same = place.world == 1 and gather != "none" and used == views
    per_row, has_positive = _supcon(query, classes.repeat(used), None if same else key, all_classes.repeat(views), own, scale, path)
    return _supcon_mean(per_row, has_positive, place, used, alone, processes)


def supcon_within(features: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    """SupCon inside each of G short sequences, features (G, L, D), labels (G, L): per anchor (G, L), 0 without a positive (MixedAE, Sec. 3.4).

    Plain torch over the batch of sequences: at L = 196 the (L, L) logits are 150 KB a sequence.
    """
    if features.ndim != 3 or labels.shape != features.shape[:2]:
        raise ValueError(f"features: expected (G, L, D) with labels (G, L), got {tuple(features.shape)} and {tuple(labels.shape)}")
    rows = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):
        logits = scale * (rows @ rows.mT)
    oneself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    positive = (labels[:, :, None] == labels[:, None]) & ~oneself
    counts = positive.sum(-1)
    lse = logits.masked_fill(oneself, float("-inf")).logsumexp(-1)
    return torch.where(counts > 0, lse - (logits * positive).sum(-1) / counts.clamp(min=1), 0.0)


# ---------------------------------------------------------------------------------------------------------------- SCGC
ENTRIES_AT_ONCE = 2**18
"""Stored entries of W handled together: bounds memory at this many rows of each side."""


@dataclass(frozen=True)
class WeightedPositives:
    """Neighbour-weighted contrastive loss with its two sums."""

    loss: Tensor
    per_row: Tensor
    positives: Tensor
    denominator: Tensor


class _StoredPositives(torch.autograd.Function):
    """sum_j W_ij exp(scale * q_i . k_j) over stored entries, in chunks both ways; a row with itself counts exp(0), without gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, row: Tensor, column: Tensor, value: Tensor, scale: float, offset: int) -> Tensor:
        ctx.save_for_backward(query, key, row, column, value)
        ctx.scale, ctx.offset = scale, offset
        out = query.new_zeros(query.shape[0])
        for part in _chunks(row.shape[0]):
            r, c = row[part], column[part]
            out.index_add_(0, r, value[part] * _entries(query, key, r, c, scale, offset)[0])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, row, column, value = ctx.saved_tensors
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        for part in _chunks(row.shape[0]):
            r, c = row[part], column[part]
            similarity, oneself = _entries(query, key, r, c, ctx.scale, ctx.offset)
            weight = (grad[r] * value[part] * similarity * ctx.scale).masked_fill_(oneself, 0.0)[:, None]
            grad_query.index_add_(0, r, weight * key[c])
            grad_key.index_add_(0, c, weight * query[r])
        return grad_query, grad_key, None, None, None, None, None


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + ENTRIES_AT_ONCE) for start in range(0, count, ENTRIES_AT_ONCE)]


def _entries(query: Tensor, key: Tensor, row: Tensor, column: Tensor, scale: float, offset: int) -> tuple[Tensor, Tensor]:
    oneself = column == row + offset
    return (scale * (query[row] * key[column]).sum(1)).masked_fill_(oneself, 0.0).exp_(), oneself


def weighted_positives(
    rows: Tensor,
    index: Tensor,
    value: Tensor,
    scale: float,
    *,
    key: Tensor | None = None,
    offset: int = 0,
    eps: float = 1e-8,
    path: Path = "auto",
) -> WeightedPositives:
    """-mean log(sum_j W_ij E_ij / sum_j E_ij + eps), E_ij = exp(scale * z_i . z_j), E_ii = 1 (SCGC, Sec. 3.4: its temperature multiplies).

    Args:
        rows: (N, D) unit rows. index: (2, E) int64 row and column of the stored entries of W; value: (E,), no gradient.
        scale: SCGC's temperature (0.25 to 2.25).
        key: (M, D) rows of every process where `rows` are those of one, row i being key offset + i; index rows are local, columns global.
    Returns:
        loss (mean over rows), per_row, positives and denominator (N,). No N x N array: O(N D + E) memory.
    """
    keys = rows if key is None else key
    if index.ndim != 2 or index.shape != (2, value.shape[0]):
        raise ValueError(f"index {tuple(index.shape)} and value {tuple(value.shape)}: expected (2, E) and (E,)")
    kind = torch.promote_types(rows.dtype, torch.float32)
    own = _index(rows.shape[0], rows, offset)
    lse, _ = pair_lse(rows, key, scale, own, None if key is None else _index(keys.shape[0], keys), path=path)
    denominator = 1 + lse.exp()
    positives: Tensor = _StoredPositives.apply(rows.to(kind), keys.to(kind), index[0], index[1], value.to(kind), scale, offset)
    per_row = -(positives / denominator + eps).log()
    return WeightedPositives(_reduce(per_row, _Place(0, rows.shape[0], 1), "mean"), per_row, positives, denominator)


# ---------------------------------------------------------------------------------------------------------------- soft targets
def soft_info_nce(query: Tensor, key: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """Mean over queries of -sum_j targets_ij log softmax_j(scale * q_i . k_j); targets (N, M), whose rows need not sum to 1 (MixCo).

    Plain torch: soft targets are an (N, M) array themselves (MindEye: N <= 300).
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        logits = scale * (query.to(kind) @ key.to(kind).T)
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def soft_targets(preds: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """SoftCLIP (MindEye, Sec. 3.5): targets' own softmaxed similarities against preds-targets logits, mean of both directions; targets carry no gradient."""
    targets = targets.detach()
    kind = torch.promote_types(targets.dtype, torch.float32)
    with torch.autocast(targets.device.type, enabled=False):
        soft = (scale * (targets.to(kind) @ targets.to(kind).T)).softmax(1)
    return (soft_info_nce(preds, targets, soft, scale) + soft_info_nce(targets, preds, soft, scale)) / 2
