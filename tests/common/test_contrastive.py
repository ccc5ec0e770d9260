"""Contrastive losses against two Python loops from the papers in float64, closed forms, every convention that works in one process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import contrastive as c

PATHS = ["plain", "tiled"]


def rows(count: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def cross_entropy(logits: list[Tensor], target: int) -> Tensor:
    return sum((x.exp() for x in logits), torch.zeros((), dtype=torch.float64)).log() - logits[target]


def same(got: Tensor, want: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, leaves, retain_graph=True), torch.autograd.grad(want, leaves, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- InfoNCE
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offset", [0, 2, 4])
def test_info_nce_at_both_ends_of_the_keys(offset: int, path: Any) -> None:
    query, key, log_scale = rows(3), rows(7, seed=1), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q, k, s = c.unit(query), c.unit(key), log_scale.exp()
    want = sum(cross_entropy([s * q[i] @ k[j] for j in range(7)], offset + i) for i in range(3)) / 3
    same(c.info_nce(q, k, s, offset=offset, path=path), want, query, key, log_scale)


@pytest.mark.parametrize("path", PATHS)
def test_symmetric_info_nce_with_equal_captions(path: Any) -> None:
    """Rows of one group are no negatives of each other (text-guided video MAE, clips of one video in CrossVideoMAE)."""
    a, b, group = rows(5), rows(5, seed=1), [0, 1, 0, 2, 1]
    want = torch.zeros((), dtype=torch.float64)
    for one, other in ((a, b), (b, a)):
        for i in range(5):
            allowed = [i] + [j for j in range(5) if group[j] != group[i]]
            want = want + cross_entropy([3 * one[i] @ other[j] for j in allowed], 0) / 10
    same(c.symmetric_info_nce(a, b, 3.0, group=torch.tensor(group), path=path), want, a, b)
    plain = sum(cross_entropy([3 * x[i] @ y[j] for j in range(5)], i) for x, y in ((a, b), (b, a)) for i in range(5)) / 10
    same(c.symmetric_info_nce(a, b, 3.0, path=path), plain, a, b)


def test_detached_gather_in_one_process_keeps_the_value_and_halves_the_paths() -> None:
    a, b = rows(4), rows(4, seed=1)
    want = (c.info_nce(a, b.detach(), 2.0) + c.info_nce(b, a.detach(), 2.0)) / 2
    same(c.symmetric_info_nce(a, b, 2.0, gather="none"), want, a, b)
    for gather in ("local", "full"):
        same(c.symmetric_info_nce(a, b, 2.0, gather=gather), c.symmetric_info_nce(a, b, 2.0), a, b)
    views = c.nt_xent(a, b, 2.0, gather="none")
    torch.testing.assert_close(views, c.nt_xent(a, b, 2.0))
    assert not torch.allclose(torch.autograd.grad(views, a)[0], torch.autograd.grad(c.nt_xent(a, b, 2.0), a)[0])


@pytest.mark.parametrize("path", PATHS)
def test_nt_xent(path: Any) -> None:
    a, b = rows(4), rows(4, seed=1)
    z = torch.cat([a, b])
    want = (
        sum(
            cross_entropy([z[i] @ z[j] / 0.7 for j in [(i + 4) % 8, *(j for j in range(8) if j not in (i, (i + 4) % 8))]], 0)
            for i in range(8)
        )
        / 8
    )
    same(c.nt_xent(a, b, 1 / 0.7, path=path), want, a, b)
    assert c.nt_xent(a, b, 1.0, reduction="none", path=path).shape == (8,)


@pytest.mark.parametrize("count", [2, 5, 300])
def test_all_equal_rows_give_the_logarithm_of_their_number(count: int) -> None:
    equal = c.unit(torch.ones(count, 3, dtype=torch.float64))
    assert c.nt_xent(equal, equal, 10.0).item() == pytest.approx(math.log(2 * count - 1), rel=1e-12)
    assert c.symmetric_info_nce(equal, equal, 10.0).item() == pytest.approx(math.log(count), rel=1e-12)
    assert c.supcon(equal, torch.zeros(count, dtype=torch.long), 10.0).loss.item() == pytest.approx(math.log(count - 1), abs=1e-12)


def test_a_sharp_loss_keeps_its_gradient_in_float32() -> None:
    """Loss about 1e-7 at scale 100: softmax minus one has no digit left here, the target left out keeps four."""
    a = c.unit(torch.eye(8, 16) + 0.01 * rows(8, 16).float()).detach()
    b = c.unit(a + 0.01 * rows(8, 16, 1).float()).detach()
    spread = 16.0  # logits of about 16 against 0
    low, high = (a.clone().requires_grad_(), b), (a.double().requires_grad_(), b.double())
    for x, y in (low, high):
        c.symmetric_info_nce(x, y, spread).backward()
    error = (low[0].grad.double() - high[0].grad).norm() / high[0].grad.norm()
    assert c.symmetric_info_nce(*high, spread) < 2e-6
    assert error < 1e-4


# ---------------------------------------------------------------------------------------------------------------- SupCon
def supcon_loops(z: Tensor, labels: list[int], scale: float, anchors: list[int], keep_all: bool) -> Tensor:
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for i in anchors:
        others = [j for j in range(len(z)) if j != i]
        positive = [j for j in others if labels[j] == labels[i]]
        counted += bool(positive) or keep_all
        for j in positive:
            total = total + cross_entropy([scale * z[i] @ z[k] for k in others], others.index(j)) / len(positive)
    return total / max(counted, 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alone", ["drop", "zero"])
def test_supcon(alone: Any, path: Any) -> None:
    z, labels = rows(7), [3, 1, 3, 3, -9, 1, 2**40]  # any integers; two anchors without a positive
    got = c.supcon(z, torch.tensor(labels), 1.5, alone=alone, path=path)
    same(got.loss, supcon_loops(z, labels, 1.5, list(range(7)), alone == "zero"), z)
    assert got.anchors.item() == 5
    assert got.has_positive.tolist() == [True, True, True, True, False, True, False]
    assert got.per_row[4] == 0
    assert got.per_row.shape == (7,)


def test_supcon_of_unknown_classes_among_keys() -> None:
    """A query's class that no other key has, at the very end of the sorted labels."""
    key = rows(4)
    got = c.supcon(key[2:], torch.tensor([9, 0]), 1.0, key=key, key_labels=torch.tensor([0, 0, 9, 0]), offset=2)
    want = supcon_loops(key, [0, 0, 9, 0], 1.0, [3], False)
    same(got.loss, want, key)
    assert got.has_positive.tolist() == [False, True]


@pytest.mark.parametrize("anchors", ["all", "first", "all_but_last"])
@pytest.mark.parametrize("supervised", [False, True])
def test_multi_view_supcon(anchors: Any, supervised: bool) -> None:
    features = rows(4 * 3).detach().reshape(4, 3, 6).requires_grad_()
    labels = [0, 1, 0, 2] if supervised else list(range(4))
    z = features.transpose(0, 1).reshape(12, 6)  # exit-major: row = view * 4 + image
    used = {"all": 12, "first": 4, "all_but_last": 8}[anchors]
    got = c.multi_view_supcon(features, torch.tensor(labels) if supervised else None, 2.0, anchors=anchors)
    same(got.loss, supcon_loops(z, labels * 3, 2.0, list(range(used)), False), features)
    assert got.per_row.shape == (used,)


def test_supcon_within_sequences_is_supcon_of_each() -> None:
    features = rows(2 * 6).detach().reshape(2, 6, 6).requires_grad_()
    labels = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5]])
    got = c.supcon_within(features, labels, 4.0)
    for g in range(2):
        want = c.supcon(features[g], labels[g], 4.0).per_row
        torch.testing.assert_close(got[g], want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(got.sum(), features)[0].isfinite().all()
    assert got[1].abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------- MoCo
def test_queue_goes_around_its_end_and_is_checkpointed() -> None:
    queue = c.Queue(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(5))
    before, keys = queue.keys(), c.unit(torch.arange(12.0).reshape(4, 3) + 1)
    queue.push(keys[:3])
    assert queue.pointer.item() == 3
    assert torch.equal(queue.rows[3:], before[3:])
    queue.push(keys)  # rows 3, 4, 0, 1
    assert queue.pointer.item() == 2
    assert torch.equal(queue.rows, torch.stack([keys[2], keys[3], keys[2], keys[0], keys[1]]))
    other = c.Queue(5, 3)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows)
    assert other.pointer.item() == 2
    with pytest.raises(ValueError, match=r"keys \(6, 3\) do not fit a queue of \(5, 3\)"):
        queue.push(torch.zeros(6, 3))


@pytest.mark.parametrize("path", PATHS)
def test_queue_loss_survives_a_push_before_the_backward_pass(path: Any) -> None:
    query, key, queue = rows(3), rows(3, seed=1), c.Queue(8, 6).double()
    keys = queue.keys()
    want = sum(cross_entropy([query[i] @ key[i].detach() * 5, *(query[i] @ k * 5 for k in keys)], 0) for i in range(3)) / 3
    loss = c.queue_info_nce(query, key, keys, 5.0, path=path)
    queue.push(key.detach())
    same(loss, want, query)
    assert not torch.autograd.grad(c.queue_info_nce(query, key, keys, 5.0).sum() + 0 * key.sum(), key)[0].any()


# ---------------------------------------------------------------------------------------------------------------- SCGC, soft targets
@pytest.mark.parametrize("path", PATHS)
def test_weighted_positives(path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(c, "ENTRIES_AT_ONCE", 3)
    z = rows(6)
    weights = torch.rand(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * (
        torch.rand(6, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    )
    index = weights.nonzero().T
    u = c.unit(z)
    want = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        e = [torch.ones((), dtype=torch.float64) if i == j else (0.7 * u[i] @ u[j]).exp() for j in range(6)]
        want = want - (sum(w * x for w, x in zip(weights[i], e, strict=True)) / sum(e) + 1e-8).log() / 6
    got = c.weighted_positives(c.unit(z), index, weights[index[0], index[1]], 0.7, path=path)
    same(got.loss, want, z)
    # half of the rows against all of them, as one of two processes sees it
    mine = index[0] >= 3
    part = c.weighted_positives(
        u[3:], torch.stack([index[0] - 3, index[1]])[:, mine], weights[index[0], index[1]][mine], 0.7, key=u, offset=3, path=path
    )
    torch.testing.assert_close(part.per_row, got.per_row[3:], rtol=1e-12, atol=1e-12)


def test_soft_targets_are_a_cross_entropy_both_ways() -> None:
    preds, targets = rows(5), rows(5, seed=1)
    want = torch.zeros((), dtype=torch.float64)
    t = targets.detach()
    for i in range(5):
        soft = torch.stack([t[i] @ t[j] * 2 for j in range(5)]).softmax(0)
        want = (
            want
            + sum(
                soft[j]
                * (cross_entropy([2 * preds[i] @ t[k] for k in range(5)], j) + cross_entropy([2 * t[i] @ preds[k] for k in range(5)], j))
                for j in range(5)
            )
            / 10
        )
    same(c.soft_targets(preds, targets, 2.0), want, preds)
    one_hot = torch.eye(5, dtype=torch.float64)
    same(c.soft_info_nce(preds, t, one_hot, 2.0), c.info_nce(preds, t, 2.0), preds)


# ---------------------------------------------------------------------------------------------------------------- heads, rows
def test_projection_heads() -> None:
    names = lambda head: [type(layer).__name__ for layer in head]  # noqa: E731
    assert names(c.projection_head((8, 4))) == ["Linear"]
    assert names(c.projection_head((8, 6, 4))) == ["Linear", "ReLU", "Linear"]
    byol = c.projection_head((8, 6, 6, 4), batch_norm=True, hidden_bias=False)
    assert names(byol) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert byol[0].bias is None
    assert byol[3].bias is None
    assert isinstance(byol[6], nn.Linear)
    assert byol[6].bias is not None
    assert byol(torch.randn(3, 8)).shape == (3, 4)
    with pytest.raises(ValueError, match="an input and an output width"):
        c.projection_head((8,))


def test_unit_rows() -> None:
    assert c.unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    with torch.autocast("cpu", torch.bfloat16):
        assert c.unit(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    zero = torch.zeros(1, 3, requires_grad=True)
    c.unit(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_gather_in_one_process() -> None:
    z = rows(3)
    assert c.gather_rows(z, "full") is z
    assert not c.gather_rows(z, "none").requires_grad
    assert c.row_counts(z) == [3]
    with pytest.raises(ValueError, match="expected 1 counts"):
        c.gather_rows(z, "full", counts=[2, 1])


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"query \(4, 6\) at offset 1 has targets beyond key \(4, 6\)"):
        c.info_nce(rows(4), rows(4), 1.0, offset=1)
    with pytest.raises(ValueError, match="expected pairs of rows"):
        c.symmetric_info_nce(rows(4), rows(3), 1.0)
    with pytest.raises(ValueError, match="two views of the same images"):
        c.nt_xent(rows(4), rows(3), 1.0)
    with pytest.raises(ValueError, match="one key a query"):
        c.queue_info_nce(rows(4), rows(3), rows(8), 1.0)
    with pytest.raises(ValueError, match="one label a row"):
        c.supcon(rows(4), torch.arange(3), 1.0)
    with pytest.raises(ValueError, match="at least two views"):
        c.multi_view_supcon(rows(4)[:, None], None, 1.0, anchors="all_but_last")
    with pytest.raises(ValueError, match=r"expected \(2, E\)"):
        c.weighted_positives(rows(4), torch.zeros(3, 2, dtype=torch.long), torch.zeros(2), 1.0)
