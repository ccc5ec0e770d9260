"""Curves against torch's schedulers and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.schedule import cosine, linear, milestones, scaled_lr, step_decay, warmed


def torch_curve(make: object, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_torch() -> None:
    wanted = torch_curve(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=9, eta_min=0.01), 9)
    assert [cosine(s, total=9, peak=0.5, final=0.01) for s in range(9)] == pytest.approx(wanted)


def test_warmup_then_cosine() -> None:
    rates = [cosine(s, total=10, peak=1.0, warmup=4, start=0.2, final=0.1) for s in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[10:] == pytest.approx([0.1, 0.1])


def test_linear_and_warmed() -> None:
    assert [linear(s, total=6, peak=1.0, warmup=2) for s in range(7)] == pytest.approx([0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert [warmed(s, warmup=2, peak=3.0, start=1.0) for s in range(4)] == pytest.approx([1, 2, 3, 3])


def test_steps_equal_torch() -> None:
    wanted = torch_curve(lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.3), 8)
    assert [step_decay(s, every=3, factor=0.3, peak=0.5) for s in range(8)] == pytest.approx(wanted)
    wanted = torch_curve(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], 0.1), 8)
    assert [milestones(s, at=[2, 5], factor=0.1, peak=0.5) for s in range(8)] == pytest.approx(wanted)


def test_linear_scaling() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


@pytest.mark.parametrize("curve", [cosine, linear])
def test_warmup_longer_than_the_whole_is_refused(curve: object) -> None:
    with pytest.raises(ValueError, match="0 <= warmup < total"):
        curve(0, total=5, peak=1.0, warmup=5)  # type: ignore[operator]
