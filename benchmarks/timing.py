"""Steps timed in turn, round after round, in one run of one thread, so that a busy machine disturbs all alike: compare processor seconds."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from common.kernels import pair_lse, patch_loss, points, topk_attention

Step = Callable[[], Any]


@dataclass(frozen=True)
class Built:
    """A step that is ready to run."""

    step: Step
    """Trains once, or runs what else is timed."""
    parameters: int
    """Of the model, trained or not."""
    calls: int = 1
    """Steps in one call."""


Forms = Mapping[str, Callable[[], Built]]
"""By name, what builds one form of the same step; ours first."""


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns or keeps fixed."""
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def kernels_off() -> Iterator[None]:
    """Every operation of `common.kernels` whose path is chosen for it takes the plain definition."""
    with contextlib.ExitStack() as stack:
        for module in (pair_lse, patch_loss, points, topk_attention):
            stack.enter_context(mock.patch.object(module, "choose", return_value="plain"))
        yield


def without_kernels(make: Callable[[], Built]) -> Callable[[], Built]:
    """The same step on the plain definitions."""

    def build() -> Built:
        built = make()

        def step() -> Any:
            with kernels_off():
                return built.step()

        return Built(step, built.parameters, built.calls)

    return build


def held(step: Step) -> int:
    """Most bytes held during a step beyond what was there before, on a CPU or a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def interleaved(
    configurations: Mapping[str, Forms], kernels: Sequence[str] = (), rounds: int = 7, warm_up: int = 2
) -> list[dict[str, Any]]:
    """One line a form: medians of the seconds of a step, how many times the first form's they are (median over rounds), memory and parameters.

    Args:
        configurations: by name, the forms of a step; they are built together, and freed before the next configuration.
        kernels: names of configurations whose first form is also timed with the fused operations switched off.
    """
    torch.set_num_threads(1)
    lines = []
    for name, forms in configurations.items():
        ours = next(iter(forms))
        wanted = {**forms, f"{ours}, kernels off": without_kernels(forms[ours])} if name in kernels else dict(forms)
        built = {form: make() for form, make in wanted.items()}
        times: dict[str, list[tuple[float, float]]] = {form: [] for form in built}
        for number in range(warm_up + rounds):
            for form, one in built.items():
                cpu, wall = time.process_time(), time.perf_counter()
                value = one.step()
                if isinstance(value, Tensor) and value.is_cuda:
                    torch.cuda.synchronize()
                if number >= warm_up:
                    times[form].append(((time.process_time() - cpu) / one.calls, (time.perf_counter() - wall) / one.calls))
        for form, spent in times.items():
            ratios = [own[0] / first[0] for own, first in zip(spent, times[ours], strict=True)]
            lines.append(
                {
                    "configuration": name,
                    "form": form,
                    "processor_seconds_per_step": round(median(cpu for cpu, _ in spent), 6),
                    "wall_seconds_per_step": round(median(wall for _, wall in spent), 6),
                    "times_of_first_form": round(median(ratios), 2),
                    "peak_memory_mib": round(held(built[form].step) / 2**20, 1),
                    "parameters": built[form].parameters,
                }
            )
    return lines


@dataclass(frozen=True)
class Feed:
    """A project's loader over generated files or tensors."""

    batches: Iterable[Any]
    """A DataLoader; iterated again when it ends."""
    samples: int
    """In a batch."""


def fed(feeds: Mapping[str, Feed], seconds: float = 2.0) -> list[dict[str, Any]]:
    """One line a feed: samples a second of one thread, reading, augmenting and collating in this process, after one batch to warm up."""
    torch.set_num_threads(1)
    lines = []
    for name, feed in feeds.items():
        batches = itertools.chain.from_iterable(itertools.repeat(feed.batches))
        next(batches)
        count, cpu, wall = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - wall < seconds:
            next(batches)
            count += feed.samples
        lines.append(
            {
                "loader": name,
                "samples_per_processor_second": round(count / (time.process_time() - cpu), 1),
                "samples_per_second": round(count / (time.perf_counter() - wall), 1),
            }
        )
    return lines
