"""Which images share a batch: index arithmetic over cluster numbers, and a batch sampler for PyTorch and Accelerate.

No image is read here. Rules (`Mode`):

- reference: what the paper's code does. Rank images inside their cluster in data-set order, sort by rank (then cluster), cut into
  batches, drop the incomplete last one. The same in every epoch. Clean only until the smallest cluster is used up; the last batches
  hold almost only the largest clusters, and their highest ranks are what is dropped, always the same images.
- balanced: every cluster spread evenly over the batches, which gives the fewest same-cluster pairs while every image is used (but the
  N mod B that fill no batch: taken from the largest clusters, others in every epoch).
- strict: no cluster twice in a batch, as many batches as that allows; images of large clusters are left out, others in every epoch.
- random: plain SimCLR.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

Mode = Literal["reference", "balanced", "strict", "random"]


def ranks(labels: Tensor) -> Tensor:
    """1-based place of each image among those of its cluster, in data-set order: (N,) cluster numbers -> (N,)."""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(labels) + 1) - first[labels[order]]
    return rank


def reference_order(labels: Tensor) -> Tensor:
    """Image numbers sorted by rank; inside a rank by cluster (the reference leaves that open)."""
    by_cluster = labels.argsort(stable=True)
    return by_cluster[ranks(labels)[by_cluster].argsort(stable=True)]


def max_strict_batches(sizes: Tensor, batch: int) -> int:
    """Most batches of `batch` images without a repeated cluster: the largest T with sum_k min(n_k, T) >= batch T; 0 if there is none."""
    low, high = 0, int(sizes.sum()) // batch
    while low < high:  # the condition holds up to some T and not beyond
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(sizes.clamp(max=middle).sum()) >= batch * middle else (low, middle - 1)
    return low


def fewest_pairs(sizes: Tensor, slots: int) -> int:
    """Fewest same-cluster pairs, summed over `slots` batches that together hold every image: each cluster dealt out evenly."""
    each, more = sizes // slots, sizes % slots
    return int((slots * (each * (each - 1) // 2) + more * each).sum())


def same_label_pairs(batches: Tensor, labels: Tensor) -> Tensor:
    """Unordered pairs of equal labels in each batch: (T, B) image numbers, (N,) labels -> (T,)."""
    kinds = int(labels.max()) + 1
    place = torch.arange(len(batches))[:, None] * kinds + labels[batches]
    counts = place.flatten().bincount(minlength=len(batches) * kinds).view(len(batches), kinds)
    return (counts * (counts - 1) // 2).sum(1)


def _shuffled_clusters(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Image numbers cluster by cluster, clusters and their images in random order; and each image's place inside its cluster (0-based)."""
    mixed = torch.randperm(len(labels), generator=generator)
    turn = torch.randperm(int(labels.max()) + 1, generator=generator)
    order = mixed[turn[labels[mixed]].argsort(stable=True)]
    sizes = turn[labels].bincount()
    first = sizes.cumsum(0) - sizes
    return order, torch.arange(len(order)) - first[turn[labels[order]]]


def _dealt(order: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Position j of `order` goes to batch j mod `count`; then batches, and images inside each, change places."""
    batches = order.view(-1, count).T[torch.randperm(count, generator=generator)]
    inside = torch.rand(batches.shape, generator=generator).argsort(1)
    return batches.gather(1, inside)


def _cut_largest(sizes: Tensor, drop: int) -> Tensor:
    """Sizes after `drop` images were taken one by one from the cluster that was largest then."""
    sizes = sizes.clone()
    for _ in range(drop):
        sizes[sizes.argmax()] -= 1
    return sizes


def compose(labels: Tensor, batch: int, mode: Mode, generator: torch.Generator | None = None) -> Tensor:
    """Batches of one epoch, (T, batch) image numbers, no image twice.

    Args:
        labels: (N,) cluster numbers from 0 on.
        generator: of everything random; `reference` draws nothing.
    Raises:
        ValueError: fewer images than a batch holds, or (strict) fewer clusters.
    """
    if batch < 2:
        raise ValueError(f"batch={batch}: expected at least 2 images, one has no negatives")
    count = len(labels) // batch
    if count < 1:
        raise ValueError(f"{len(labels)} images cannot fill one batch of {batch}; use a smaller batch")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    sizes = labels.bincount()
    if mode == "random":
        return torch.randperm(len(labels), generator=generator)[: count * batch].view(count, batch)
    if mode == "reference":
        return reference_order(labels)[: count * batch].view(count, batch)
    order, place = _shuffled_clusters(labels, generator)
    if mode == "balanced":
        keep = _cut_largest(sizes, len(labels) - count * batch)
        return _dealt(order[place < keep[labels[order]]], count, generator)
    count = max_strict_batches(sizes, batch)
    if count < 1:
        raise ValueError(
            f"strict batches of {batch} need at least {batch} clusters; got {int((sizes > 0).sum())} that hold images. Use --clusters 4x the batch or --batches balanced"
        )
    order = order[place < count]
    extra = torch.randperm(len(order), generator=generator)[: count * batch].sort().values
    return _dealt(order[extra], count, generator)


@dataclass(frozen=True)
class Account:
    """What the batches of an epoch hold: mean same-cluster pairs a batch, share of images used, share of negatives of the same class."""

    same_cluster_pairs: float
    images_used: float
    false_negatives: float | None

    def terms(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


def account(batches: Tensor, labels: Tensor, classes: Tensor | None = None) -> Account:
    """See `Account`; the last needs true classes (N,)."""
    pairs = batches.shape[1] * (batches.shape[1] - 1) / 2
    wrong = None if classes is None else float(same_label_pairs(batches, classes).double().mean()) / pairs
    return Account(float(same_label_pairs(batches, labels).double().mean()), batches.numel() / len(labels), wrong)


class GuidedBatches(Sampler[list[int]]):
    """Batch sampler that composes each epoch from (seed, epoch) alone, so that all processes agree and a run can be resumed anywhere.

    With one process, or under Accelerate with `split_batches=True, even_batches=False`, leave `processes` at 1: it gives global batches.
    A loader that hands batches to processes in turn (Accelerate's default, and `common.engine`) gets `processes`: each global batch comes
    as that many slices in order of rank, so that the processes hold one global batch together at every step.

    Args:
        labels: (N,) cluster numbers; any, all zero say, in mode random.
        batch: images of a global batch.
        reshuffle: let the order of the fixed batches of mode reference change with the epoch.
    Raises:
        ValueError: see `compose`; a batch that the processes cannot share evenly.
    """

    drop_last = True

    def __init__(
        self, labels: Tensor, batch: int, mode: Mode = "balanced", *, seed: int = 0, processes: int = 1, reshuffle: bool = False
    ) -> None:
        if batch % processes:
            raise ValueError(f"global batch of {batch} on {processes} processes: expected a multiple of the number of processes")
        self.labels, self.global_batch, self.mode, self.seed, self.processes = labels.long().cpu(), batch, mode, seed, processes
        self.batch_size, self.reshuffle, self.epoch = batch // processes, reshuffle, 0
        self.count = len(self.compose(0))
        used = self.count * batch / len(labels)
        if mode == "strict" and used < 0.5:
            sizes = self.labels.bincount()
            warnings.warn(
                f"strict batches: {self.count} batches use {100 * used:.0f} % of the images; the smallest cluster holds {int(sizes.min())}. More clusters, or balanced batches, use more",
                stacklevel=2,
            )

    @property
    def sampler(self) -> GuidedBatches:
        """Itself: where Accelerate's sharded loaders look for `set_epoch` (without it every epoch would be the first, silently)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def compose(self, epoch: int) -> Tensor:
        """(T, global batch) image numbers of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        batches = compose(self.labels, self.global_batch, self.mode, generator)
        if self.mode == "reference" and self.reshuffle:
            batches = batches[torch.randperm(len(batches), generator=generator)]
        return batches

    def __len__(self) -> int:
        return self.count * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.compose(self.epoch).view(-1, self.batch_size).tolist()
