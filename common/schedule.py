"""Learning-rate, momentum and temperature curves: pure functions of the optimiser step (or of the epoch, where a paper steps by epoch)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def warmed(step: float, *, warmup: float, peak: float, start: float = 0.0) -> float:
    """Straight line from `start` at step 0 to `peak` at step `warmup`, then `peak`."""
    return peak if step >= warmup else start + (peak - start) * step / warmup


def cosine(step: float, *, total: float, peak: float, final: float = 0.0, warmup: float = 0.0, start: float = 0.0) -> float:
    """Half a cosine from `peak` to `final` over the steps after the warm-up (SGDR without restarts; MAE, GraphMAE, CROMA ...).

    Args:
        step: 0-based; steps, epochs or fractions of an epoch, in the unit of `total` and `warmup`. Past `total` the value stays `final`.
        warmup: length of the straight line from `start` to `peak` that comes first.
    Raises:
        ValueError: the warm-up is not shorter than the whole.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"warmup={warmup} of total={total}: expected 0 <= warmup < total")
    if step < warmup:
        return warmed(step, warmup=warmup, peak=peak, start=start)
    share = min((step - warmup) / (total - warmup), 1.0)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * share))


def linear(step: float, *, total: float, peak: float, final: float = 0.0, warmup: float = 0.0, start: float = 0.0) -> float:
    """Straight line from `peak` to `final` after the same warm-up as `cosine`."""
    if not 0 <= warmup < total:
        raise ValueError(f"warmup={warmup} of total={total}: expected 0 <= warmup < total")
    if step < warmup:
        return warmed(step, warmup=warmup, peak=peak, start=start)
    return peak + (final - peak) * min((step - warmup) / (total - warmup), 1.0)


def step_decay(step: float, *, every: float, factor: float, peak: float) -> float:
    """`peak` times `factor` once for each whole `every` that has passed (torch's StepLR)."""
    return peak * factor ** math.floor(step / every)


def milestones(step: float, *, at: Sequence[float], factor: float, peak: float) -> float:
    """`peak` times `factor` once for each milestone reached (torch's MultiStepLR)."""
    return peak * factor ** sum(step >= mark for mark in at)


def scaled_lr(base_lr: float, global_batch: int, *, reference: int = 256) -> float:
    """Linear scaling rule: the rate given for `reference` samples, at `global_batch` samples over all processes and accumulation."""
    return base_lr * global_batch / reference
