"""Optimiser and rate of every script of this paper (Sec. 5 of the release), and batch norms over processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from common.engine import Budget
from common.schedule import cosine, warmed

M = TypeVar("M", bound=nn.Module)
LOWEST = 1e-6
"""Rate at which the warm-up starts and the cosine ends."""
Clock = Literal["epoch", "step"]


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to vectors, biases and whatever is called a token; class positions decay."""
    return parameter.ndim > 1 and not name.endswith(".bias") and "token" not in name


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what the model trains, in a group that decays and one that does not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p) is wanted], "weight_decay": weight_decay * wanted} for wanted in (True, False)
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=float(lr), fused=True)


def rate_in_epoch(epoch: int, *, peak: float, epochs: int, warmup: int = 10, start: float = LOWEST, final: float = LOWEST) -> float:
    """Rate during a 0-based epoch, as the reference's loop has it: one epoch late, so that epochs 0 and 1 run at `start`.

    Straight line from `start` over `warmup` epochs, then a cosine to `final` that counts from epoch 0 (the rate drops where the two meet),
    then `final`.
    """
    told = max(epoch - 1, 0)
    return warmed(told, warmup=warmup, peak=peak, start=start) if told < warmup else cosine(told, total=epochs, peak=peak, final=final)


def rate_at(plan: Budget, *, peak: float, epochs: int, warmup: int, clock: Clock) -> Callable[[int], float]:
    """Rate at an optimiser step: `clock` "epoch" is the reference's, "step" a plain warm-up and cosine over all steps for short runs.

    Args:
        epochs, warmup: length of the schedule in epochs; with "step" the warm-up alone counts, in epochs.
    """
    if clock == "epoch":
        return lambda step: rate_in_epoch(step // plan.per_epoch, peak=float(peak), epochs=epochs, warmup=warmup)
    early = min(warmup * plan.per_epoch, plan.total // 2)
    return lambda step: cosine(step, total=plan.total, peak=float(peak), final=LOWEST, warmup=early, start=LOWEST)


# -- several processes ---------------------------------------------------------------------------------------------------------------


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def local_batch(batch: int, *, samples: int) -> int:
    """Samples a step and process, of `batch` over all processes.

    Raises:
        ValueError: a batch that the processes do not divide, fewer than 2 a process (batch norm needs them), or more than there are samples.
    """
    if batch % processes():
        raise ValueError(f"batch={batch}: expected a multiple of the {processes()} processes")
    if batch // processes() < 2:
        raise ValueError(f"batch={batch} over {processes()} processes: batch norm needs at least 2 samples each; use a larger batch")
    if batch > samples:
        raise ValueError(f"batch={batch}: the data set has {samples} samples, not one full batch; use a smaller batch")
    return batch // processes()


class _Moments(torch.autograd.Function):
    """Sum over processes, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        out = values.clone()
        torch.distributed.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad.clone()
        torch.distributed.all_reduce(out)
        return out


class BatchNormOverProcesses(nn.BatchNorm1d):
    """Batch statistics over the rows of all processes, also on a CPU (torch's SyncBatchNorm is for GPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        rows = x.float()
        # centred on the running mean, so that the difference of the two moments keeps its digits
        base = self.running_mean if self.running_mean is not None else rows.new_zeros(rows.shape[1])
        shifted = rows - base
        count = rows.new_full((1,), len(rows))
        total, square, number = _Moments.apply(torch.cat([shifted.sum(0), shifted.square().sum(0), count])).split(
            [x.shape[1], x.shape[1], 1]
        )
        mean = total / number
        variance = (square / number - mean.square()).clamp(min=0)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                unbiased = variance * number / (number - 1).clamp(min=1)
                self.running_mean.lerp_(self.running_mean + mean, self.momentum or 0.1)
                self.running_var.lerp_(unbiased, self.momentum or 0.1)
        out = (shifted - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return out.to(x.dtype)


def synchronised(model: M) -> M:
    """With several processes, batch norms over the rows of all of them, as one big batch would have; names and parameters stay."""
    if processes() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm1d:
                module.__class__ = BatchNormOverProcesses
    return model
