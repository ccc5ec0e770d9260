"""The learning rate of the CIFAR-10 recipe; the ImageNet subset's is `common.schedule.cosine`."""

from __future__ import annotations

import math


def warm_restarts(step: int, *, first: int, peak: float, growth: float = 2.0, decay: float = 1.0, floor: float = 0.0) -> float:
    """Half a cosine from `peak` to `floor` times the peak, begun again after `first` steps and then after periods that grow (TensorFlow's
    CosineDecayRestarts).

    Args:
        step: 0-based optimiser step.
        first: steps of the first period; each later one is `growth` times the one before it.
        decay: factor of the part above the floor at each restart.
        floor: share of the first peak that is left at a period's end.
    """
    begun, length, height = 0.0, float(first), 1 - floor
    while step >= begun + length:
        begun, length, height = begun + length, length * growth, height * decay
    return peak * (floor + height * 0.5 * (1 + math.cos(math.pi * (step - begun) / length)))
