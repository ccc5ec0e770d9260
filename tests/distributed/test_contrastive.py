"""Two real processes against one: values, gradients of every policy, local batches of different sizes, the queue, DDP."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import contrastive as c

COUNTS = ([4, 4], [5, 3])


def views(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of eight images, and labels of which one occurs once."""
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, 6, generator=random, dtype=torch.float64).unbind(0)
    return a, b, torch.tensor([0, 1, 1, 2, 0, 1, 3, 2])


def loss_of(name: str, a: Tensor, b: Tensor, labels: Tensor, **options: Any) -> Tensor:
    a, b = c.unit(a), c.unit(b)
    if name == "symmetric":
        return c.symmetric_info_nce(a, b, 5.0, **options)
    if name == "groups":
        return c.symmetric_info_nce(a, b, 5.0, group=labels, **options)
    if name == "nt_xent":
        return c.nt_xent(a, b, 5.0, **options)
    if name == "supcon":
        return c.multi_view_supcon(a[:, None], labels, 5.0, **options).loss
    if name == "supcon zero":
        return c.multi_view_supcon(a[:, None], labels, 5.0, alone="zero", **options).loss
    return c.multi_view_supcon(torch.stack([a, b], 1), None if name == "views" else labels, 5.0, anchors="all_but_last", **options).loss


def half(rank: int, name: str, gather: c.Gather, counts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of one process and the gradients of its own rows; counts exchanged where they differ."""
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    a, b, labels = views()
    a, b = a[own].clone().requires_grad_(), b[own].clone().requires_grad_()
    known = None if counts[0] == counts[1] else c.row_counts(a)
    assert known in (None, counts)
    loss = loss_of(name, a, b, labels[own], gather=gather, counts=known)
    loss.backward()
    zero = torch.zeros(())
    return loss.detach(), a.grad, zero if b.grad is None else b.grad, zero


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", ["symmetric", "groups", "nt_xent", "supcon", "supcon zero", "views", "exits"])
def test_full_gather_averaged_over_processes_is_one_process(name: str, counts: list[int], two_processes: Any) -> None:
    a, b, labels = views()
    a, b = a.requires_grad_(), b.requires_grad_()
    want = loss_of(name, a, b, labels)
    want.backward()
    results = two_processes(half, name, "full", counts)
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([results[0][1], results[1][1]]) / 2, a.grad, rtol=1e-10, atol=1e-13)
    if b.grad is not None:
        torch.testing.assert_close(torch.cat([results[0][2], results[1][2]]) / 2, b.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gather", ["none", "local"])
def test_policies_stop_the_gradient_where_they_say(gather: c.Gather, two_processes: Any) -> None:
    """CROMA's plain all_gather ("none"), and own rows inside the gathered keys ("local")."""
    results = two_processes(half, "symmetric", gather, [4, 4])
    for rank in range(2):
        own = slice(4 * rank, 4 * rank + 4)
        a, b, _ = views()
        a, b = a.requires_grad_(), b.requires_grad_()
        mine = torch.zeros(8, 1, dtype=torch.bool)
        mine[own] = gather == "local"
        keys = [torch.where(mine, c.unit(x), c.unit(x).detach()) for x in (a, b)]
        want = (c.info_nce(c.unit(a)[own], keys[1], 5.0, offset=4 * rank) + c.info_nce(c.unit(b)[own], keys[0], 5.0, offset=4 * rank)) / 2
        want.backward()
        loss, grad_a, grad_b, _ = results[rank]
        torch.testing.assert_close(loss, want.detach())
        torch.testing.assert_close(grad_a, a.grad[own])
        torch.testing.assert_close(grad_b, b.grad[own])


def gathered(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = c.gather_rows(torch.arange(2 + rank) + 10 * rank, "none", counts=[2, 3])
    flags = c.gather_rows(torch.tensor([rank == 0]), "none")
    queue = c.Queue(6, 2)
    queue.push(torch.full((2, 2), float(rank)))
    return ids, flags, queue.rows[:4], queue.pointer


def test_gather_of_integers_and_the_queue(two_processes: Any) -> None:
    for ids, flags, rows, pointer in two_processes(gathered):
        assert ids.tolist() == [0, 1, 10, 11, 12]
        assert flags.tolist() == [True, False]
        assert rows.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
        assert pointer.item() == 4


class Pair(nn.Module):
    """A tiny encoder with a learned scale and its loss, seeded."""

    def __init__(self, gather: c.Gather | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.log_scale, self.gather = nn.Linear(6, 5).double(), nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), gather

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return c.symmetric_info_nce(c.unit(self.net(a)), c.unit(self.net(b)), self.log_scale.exp(), gather=self.gather)


def ddp_gradients(rank: int) -> list[Tensor]:
    model = DistributedDataParallel(Pair("full"))
    a, b, _ = views()
    model(a[rank * 4 : rank * 4 + 4], b[rank * 4 : rank * 4 + 4]).backward()
    return [parameter.grad.clone() for parameter in model.module.parameters()]


def test_two_processes_give_the_gradient_of_one(two_processes: Any) -> None:
    model = Pair(None)
    a, b, _ = views()
    model(a, b).backward()
    for grads in two_processes(ddp_gradients):
        for got, parameter in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-13)
