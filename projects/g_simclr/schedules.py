"""The learning rate of the CIFAR-10 recipe; the ImageNet subset's is `common.schedule.cosine`."""

from __future__ import annotations

import math


def warm_restarts(step: int, *, first: int, peak: float, growth: float = 2.0, decay: float = 1.0, floor: float = 0.0) -> float:
    """Half a cosine from `peak` to `floor` times the peak, begun again after `first` steps and then after periods that grow (SGDR).

    Args:
        step: 0-based optimiser step.
        first: steps of the first period; each later one is `growth` times the one before it.
        decay: factor of the peak at each restart.
        floor: share of the peak that is left at a period's end.
    """
    length = float(first)
    begun = 0.0
    while step >= begun + length:
        begun, length, peak = begun + length, length * growth, peak * decay
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - begun) / length)))
