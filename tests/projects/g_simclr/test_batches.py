"""The index arithmetic of batches against counting by hand, and the sampler under Accelerate, over epochs and processes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from projects.g_simclr.batches import (
    GuidedBatches,
    account,
    compose,
    fewest_pairs,
    max_strict_batches,
    reference_order,
    same_label_pairs,
)


def power_law(images: int = 500, clusters: int = 20, seed: int = 0) -> Tensor:
    """Cluster numbers whose sizes fall as 1 / rank, no cluster empty, shuffled."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, clusters + 1)
    labels = np.concatenate([np.arange(clusters), rng.choice(clusters, images - clusters, p=share / share.sum())])
    return torch.from_numpy(rng.permutation(labels))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(batch: list[int], labels: Tensor) -> int:
    """Same-cluster pairs of one batch, pair by pair."""
    return sum(int(labels[a] == labels[b]) for a, b in combinations(batch, 2))


@pytest.mark.parametrize("mode", ["reference", "balanced", "strict", "random"])
def test_batches_are_whole_and_repeat_no_image(mode: Any) -> None:
    labels = power_law()
    made = compose(labels, 8, mode, generator())
    assert made.shape[1] == 8
    assert made.unique().numel() == made.numel()
    assert same_label_pairs(made, labels).tolist() == [counted(batch, labels) for batch in made.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_balanced_spreads_every_cluster_evenly_and_beats_the_other_rules(seed: int) -> None:
    labels = power_law(seed=seed)
    made = compose(labels, 8, "balanced", generator(seed))
    assert len(made) == len(labels) // 8
    for cluster in range(20):
        counts = (labels[made] == cluster).sum(1)
        assert int(counts.max() - counts.min()) <= 1
    sizes = labels[made.flatten()].bincount()
    pairs = {
        mode: int(same_label_pairs(compose(labels, 8, mode, generator(seed)), labels).sum()) for mode in ("balanced", "reference", "random")
    }
    assert pairs["balanced"] == fewest_pairs(sizes, len(made))
    # with a few heavy clusters the published rule, whose last batches hold little else, has more pairs than chance
    assert pairs["balanced"] < pairs["random"] < pairs["reference"]


def test_with_clusters_of_one_size_the_published_rule_is_clean() -> None:
    labels = torch.arange(80) % 10
    assert int(same_label_pairs(compose(labels, 10, "reference"), labels).sum()) == 0


def test_what_balanced_leaves_out_comes_from_the_largest_clusters_and_changes() -> None:
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 5)
    left = []
    for seed in range(6):
        made = compose(labels, 8, "balanced", generator(seed))
        out = sorted(set(range(19)) - set(made.flatten().tolist()))
        assert labels[out].tolist() == [0, 0, 0]
        left.append(tuple(out))
    assert len(set(left)) > 1


@pytest.mark.parametrize("seed", range(4))
def test_strict_never_repeats_a_cluster_and_makes_the_most_batches(seed: int) -> None:
    labels = power_law(seed=seed)
    made = compose(labels, 8, "strict", generator(seed))
    assert int(same_label_pairs(made, labels).sum()) == 0
    sizes = labels.bincount()
    possible = [t for t in range(1, 63) if int(sizes.clamp(max=t).sum()) >= 8 * t]
    assert len(made) == max(possible) == max_strict_batches(sizes, 8)


def test_with_as_many_clusters_as_places_strict_makes_as_many_batches_as_the_smallest_cluster_has_images() -> None:
    labels = power_law(400, 8)
    assert len(compose(labels, 8, "strict", generator())) == int(labels.bincount().min())


def test_reference_drops_the_highest_ranks_of_the_largest_clusters() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    assert reference_order(labels).tolist() == [0, 5, 7, 1, 6, 2, 3, 4]
    assert compose(labels, 3, "reference").tolist() == [[0, 5, 7], [1, 6, 2]]


def test_an_empty_cluster_is_as_if_it_were_not_there() -> None:
    labels = torch.tensor([0, 0, 2, 2, 3, 3])  # number 1 names nothing
    assert int(same_label_pairs(compose(labels, 3, "balanced", generator()), labels).sum()) == 0
    assert len(compose(labels, 3, "strict", generator())) == 2
    with pytest.raises(ValueError, match=r"strict batches of 4 need at least 4 clusters; got 3"):
        compose(labels, 4, "strict", generator())


def test_account_counts_wrong_negatives_pair_by_pair() -> None:
    labels, truth = power_law(), power_law(clusters=5, seed=9)
    made = compose(labels, 8, "random", generator())
    found = account(made, labels, truth)
    assert found.images_used == made.numel() / 500
    assert found.same_cluster_pairs == pytest.approx(sum(counted(b, labels) for b in made.tolist()) / len(made))
    assert found.false_negatives == pytest.approx(sum(counted(b, truth) for b in made.tolist()) / (28 * len(made)))
    assert account(made, labels).terms().keys() == {"same_cluster_pairs", "images_used"}


@pytest.mark.parametrize(
    ("labels", "batch", "message"),
    [(torch.zeros(7, dtype=torch.int64), 8, "7 images cannot fill one batch of 8"), (torch.zeros(7, dtype=torch.int64), 1, "batch=1")],
)
def test_too_few_images_are_refused(labels: Tensor, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(labels, batch, "balanced")


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 10 on 4 processes"):
        GuidedBatches(power_law(), 10, processes=4)


def test_strict_batches_that_use_little_warn_with_the_share() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50 + [2, 2, 3, 3])
    with pytest.warns(UserWarning, match=r"2 batches use 8 % of the images; the smallest cluster holds 2"):
        GuidedBatches(labels, 4, "strict")


def test_epochs_differ_repeat_and_do_not_depend_on_what_came_before() -> None:
    sampler = GuidedBatches(power_law(), 8, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        torch.rand(1)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(sampler) == len(epochs[0]) == 62


def test_the_published_batches_stay_unless_their_order_is_asked_to_change() -> None:
    fixed, mixed = (GuidedBatches(power_law(), 8, "reference", reshuffle=flag) for flag in (False, True))
    assert torch.equal(fixed.compose(0), fixed.compose(1))
    assert not torch.equal(mixed.compose(0), mixed.compose(1))
    assert Counter(map(tuple, mixed.compose(1).tolist())) == Counter(map(tuple, fixed.compose(0).tolist()))


def shards(sampler: GuidedBatches, epoch: int, **how: Any) -> list[list[list[int]]]:
    """What each of two processes would be given under Accelerate."""
    out = []
    for rank in range(2):
        loader = DataLoader(TensorDataset(torch.arange(500)), batch_sampler=sampler)
        prepared = prepare_data_loader(loader, num_processes=2, process_index=rank, **how)
        prepared.set_epoch(epoch)
        out.append([batch[0].tolist() for batch in prepared])
    return out


@pytest.mark.parametrize("how", ["split", "in turn"])
def test_two_processes_hold_one_global_batch_together_in_every_epoch(how: str) -> None:
    labels, epochs = power_law(), []
    for epoch in (0, 1):
        if how == "split":
            sampler = GuidedBatches(labels, 8, "strict")
            first, second = shards(sampler, epoch, split_batches=True, even_batches=False)
        else:
            sampler = GuidedBatches(labels, 8, "strict", processes=2)
            first, second = shards(sampler, epoch)
        whole = [a + b for a, b in zip(first, second, strict=True)]
        assert {len(part) for part in first + second} == {4}
        assert whole == GuidedBatches(labels, 8, "strict").compose(epoch).tolist()
        assert sum(counted(batch, labels) for batch in whole) == 0
        epochs.append(whole)
    assert epochs[0] != epochs[1]  # without `sampler` pointing to itself, every epoch would be the first
