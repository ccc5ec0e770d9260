"""One training loop over plain functions: precision, accumulation, EMA, trackers, progress, exact resume, clean stop.

A project gives a model, a loss function, batches and an optimiser; it inherits nothing. A method that does not fit (two optimisers,
L-BFGS) writes its own loop from `common.checkpoint` and `common.schedule`.

A run killed at any step and started again ends with the same weights: the shuffle of an epoch, the random draws of a sample and those
of a collate function depend on (seed, epoch, index) alone, whichever worker makes them, and the state of every generator is kept.
"""

from __future__ import annotations

import json
import math
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env, send_to_device
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from common.checkpoint import latest, read_state, write_state, write_text
from common.recipe import to_yaml

# A resumed run may change these fields of its recipe (matched by their last name): they do not touch the weights.
MAY_CHANGE = frozenset({"data_root", "cache", "out", "workers", "log_every", "checkpoint_every", "trackers"})


@dataclass(frozen=True)
class Training:
    """How long and in what arithmetic a model is trained."""

    epochs: PositiveInt | None = None
    """Passes over the data; give this or `steps`."""
    steps: PositiveInt | None = None
    """Optimiser steps; give this or `epochs`."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Automatic mixed precision."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are averaged for one optimiser step."""
    clip_norm: PositiveFloat | None = None
    """Largest L2 norm of the whole gradient."""
    ema_decay: OpenUnitInterval | None = None
    """Decay of an exponential moving average of the weights, updated each optimiser step."""
    compile: bool = False
    """Run the model through torch.compile."""
    log_every: PositiveInt = 10
    """Optimiser steps between lines of metrics.jsonl."""
    checkpoint_every: NonNegativeInt | None = None
    """Optimiser steps between saved states; not given: once an epoch; 0: only at the end and when stopped."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate's trackers by name (tensorboard, wandb, ...), beside metrics.jsonl."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"training: expected epochs or steps, found epochs={self.epochs}, steps={self.steps}; give exactly one")


@dataclass(frozen=True)
class Budget:
    """Optimiser steps of an epoch and of the whole training."""

    per_epoch: int
    total: int


@dataclass
class Fitted:
    """What `fit` returns: the trained model (unwrapped), its moving average, the steps made, and the lines of metrics.jsonl."""

    model: nn.Module
    ema: nn.Module | None
    step: int
    history: list[dict[str, Any]]


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names it, its step and the last good state."""


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, well spread (the finaliser of SplitMix64 after each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices; call it before the model is built."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def _draw_from(seed: int) -> None:
    """Seed the processor's generators alone: samples are made there, and an accelerator's generator belongs to the model."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.default_generator.manual_seed(seed)


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Run a block that seeds and draws, then put back the generators' states."""
    kept = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.random.set_rng_state(kept[2])


class _Seeded(torch.utils.data.Dataset[Any]):
    """A map-style data set whose random draws depend on (seed, epoch, index) alone."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see the new epoch

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        epoch = int(self.epoch)
        with _kept_generators():
            items = []
            for index in indices:
                _draw_from(_mix(self.seed, epoch, index))
                items.append((index, self.data[index]))
            return items


class _SeededCollate:
    """A collate function whose random draws depend on (seed, epoch, first index of the batch) alone."""

    def __init__(self, collate: Callable[[list[Any]], Any], data: _Seeded) -> None:
        self.collate, self.data = collate, data

    def __call__(self, items: list[tuple[int, Any]]) -> Any:
        with _kept_generators():
            _draw_from(_mix(self.data.seed, int(self.data.epoch), items[0][0], 1))
            return self.collate([sample for _, sample in items])


def _prepared(loader: DataLoader[Any], seed: int, accelerator: Accelerator) -> DataLoader[Any]:
    """The same batches, split over processes, on this process's device, drawn reproducibly."""
    if isinstance(loader.dataset, IterableDataset):
        return prepare_data_loader(loader, device=accelerator.device, put_on_device=True)
    data = _Seeded(loader.dataset, seed)
    rest = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "persistent_workers",
            "prefetch_factor",
            "multiprocessing_context",
        )
    }
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if getattr(sampler, "generator", 0) is None:
        sampler.generator = torch.Generator()  # type: ignore[union-attr]  # seeded each epoch in `_epoch_batches`
    seeded = DataLoader(
        data, batch_sampler=loader.batch_sampler, collate_fn=_SeededCollate(loader.collate_fn, data), generator=torch.Generator(), **rest
    )
    return prepare_data_loader(seeded, device=accelerator.device, put_on_device=True, use_seedable_sampler=False, rng_types=[])


def _epoch_batches(
    loader: DataLoader[Any] | Sequence[Any], original: Any, epoch: int, skip: int, seed: int, device: torch.device
) -> Iterator[Any]:
    """Batches of `epoch` from number `skip` on."""
    if not isinstance(loader, DataLoader):
        yield from (send_to_device(batch, device) for batch in islice(loader, skip, None))
        return
    sampler = getattr(original.batch_sampler, "sampler", None)
    rest: Any = skip_first_batches(loader, skip) if skip else loader
    part: Any
    for part in (original.batch_sampler, sampler, loader.dataset, rest):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    for number, part in enumerate((sampler, rest)):
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(_mix(seed, epoch, number))
    yield from rest


def _local_length(loader: DataLoader[Any] | Sequence[Any], processes: int) -> int:
    length = len(loader)
    if not isinstance(loader, DataLoader):
        return length
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        return length // processes
    return math.ceil(length / processes)


def _processes() -> int:
    """How many processes run; asked before `fit`, it must start the group on the device that `fit` will use."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes


def budget(loader: DataLoader[Any] | Sequence[Any], training: Training) -> Budget:
    """Optimiser steps per epoch and in total, with the loader's batches shared among the processes that run."""
    processes = _processes()
    batches = _local_length(loader, processes)
    per_epoch = math.ceil(batches / training.accumulation)
    if per_epoch < 1:
        raise ValueError(
            f"loader: expected at least one batch a process, found {len(loader)} for {processes} processes; use a smaller batch or keep the last one"
        )
    return Budget(per_epoch, training.steps if training.steps is not None else per_epoch * (training.epochs or 0))


def mean_over_processes(total: Tensor, count: Tensor | int) -> Tensor:
    """Mean over all processes' terms, scaled so that DDP's averaged gradient equals that of one process with the whole batch.

    Args:
        total: 0-d sum of this process's loss terms.
        count: how many terms that is.
    Returns:
        total · processes / (sum of `count` over the processes); with one process total / count.
    """
    count = torch.as_tensor(count, device=total.device, dtype=total.dtype)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total / count
    everywhere = count.clone()
    torch.distributed.all_reduce(everywhere)
    return total * torch.distributed.get_world_size() / everywhere


def _terms(output: Any) -> dict[str, Tensor]:
    """The 0-d tensors of a loss function's output by name, `loss` among them."""
    named = (
        output if isinstance(output, Mapping) else {f.name: getattr(output, f.name) for f in fields(output)} if is_dataclass(output) else {}
    )
    if not isinstance(named.get("loss"), Tensor) or named["loss"].ndim:
        raise TypeError(f"loss function: expected a dataclass or mapping with a 0-d tensor `loss`, found {type(output).__name__}")
    return {name: value for name, value in named.items() if isinstance(value, Tensor) and value.ndim == 0}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in nested.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def check_recipe(folder: Path, text: str) -> None:
    """Refuse to go on in a run folder that another recipe began.

    Raises:
        ValueError: naming the fields that differ, with both values.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    old, new = (_flat(yaml.safe_load(t) or {}) for t in (path.read_text(), text))
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k.rpartition(".")[2] not in MAY_CHANGE]
    if differing:
        named = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in differing[:5])
        raise ValueError(f"run folder {folder} was begun with another recipe: {named}; choose another folder or remove it")


def _peak_memory_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class _Log:
    """metrics.jsonl, trackers, and a progress bar on the main process of a terminal or plain lines elsewhere."""

    def __init__(self, folder: Path, accelerator: Accelerator, total: int, step: int, label: str) -> None:
        self.path, self.accelerator, self.total, self.label = folder / "metrics.jsonl", accelerator, total, label
        self.main = accelerator.is_main_process
        self.history: list[dict[str, Any]] = []
        if self.path.is_file():
            lines = (json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}"))
            self.history = [line for line in lines if line["step"] <= step]
        if self.main:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.history))  # lines of steps that will be made again go
        self.bar = (
            tqdm(total=total, initial=step, desc=label, unit="step", dynamic_ncols=True) if self.main and sys.stderr.isatty() else None
        )
        self.spoken = time.monotonic()

    def line(self, values: dict[str, Any]) -> None:
        self.history.append(values)
        if not self.main:
            return
        with self.path.open("a") as stream:
            stream.write(json.dumps(values) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])
        shown = {k: v for k, v in values.items() if k == "loss" or k not in ("step", "epoch", "lr", "seconds", "peak_memory_mib")}
        if self.bar is not None:
            self.bar.update(values["step"] - self.bar.n)
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()})
        elif time.monotonic() - self.spoken > 5 or values["step"] == self.total:
            self.spoken = time.monotonic()
            print(f"{self.label}: step {values['step']}/{self.total} " + " ".join(f"{k} {v:.4g}" for k, v in shown.items()), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for tracker in self.accelerator.trackers:  # end_training() would also take down the process group that evaluation still needs
            tracker.finish()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying from them, so that the state can be saved first."""
    received: list[int] = []
    old: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            old[number] = signal.signal(number, lambda got, _frame: received.append(got))
    except ValueError:  # not the main thread: the caller keeps its own handlers
        pass
    try:
        yield received
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Any],
    loader: DataLoader[Any] | Sequence[Any],
    optimizer: Optimizer,
    training: Training,
    folder: str | Path,
    *,
    recipe: object,
    seed: int = 0,
    lr_at: Callable[[int], float] | None = None,
    after_step: Callable[[int], None] | None = None,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
) -> Fitted:
    """Train `model` and leave a run folder behind; called again with the same recipe it goes on where it was, or returns at once.

    Args:
        model: on any device; moved to this process's.
        loss: (model, batch) -> dataclass or mapping with `loss` (0-d, differentiable) and other 0-d tensors, which are logged by name.
        loader: a DataLoader, whose batches are shared among the processes, or a list of batches that every process uses as it stands.
        optimizer: over the model's parameters.
        folder: gets recipe.yaml, metrics.jsonl and state/.
        recipe: dataclass that made all this; a folder begun with another one is refused.
        seed: of the shuffles, samples and (with the process's rank) of everything drawn inside the model.
        lr_at: learning rate at a 0-based optimiser step, times a group's `lr_scale` if it has one.
        after_step: called with the number of optimiser steps made (momentum teachers).
        evaluate: (unwrapped model, epochs made) -> figures to log, every `evaluate_every` epochs; called on every process.
    Returns:
        the unwrapped model with its final weights, its moving average if any, the steps made, and the logged lines.
    Raises:
        NonFiniteLoss: a term is NaN or infinite; names the term, the step and the last good state.
        ValueError: the folder holds a run of another recipe or another number of processes.
        SystemExit: after SIGTERM or SIGINT, with the state saved; status 128 + signal.
    """
    folder = Path(folder)
    text = to_yaml(recipe)
    check_recipe(folder, text)
    AcceleratorState._reset_state()  # several trainings in one process may differ in precision
    accelerator = Accelerator(mixed_precision=training.precision, log_with=training.trackers or None, project_dir=str(folder))
    plan = budget(loader, training)
    rank, processes = accelerator.process_index, accelerator.num_processes

    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(training.ema_decay), use_buffers=True) if training.ema_decay else None
    model, optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        ema.to(accelerator.device)
    bare = accelerator.unwrap_model(model)
    compiled: Any = torch.compile(model) if training.compile else model
    batches = _prepared(loader, seed, accelerator) if isinstance(loader, DataLoader) else loader
    per_epoch_batches = _local_length(loader, processes)

    seed_everything(_mix(seed, rank))
    step = 0
    if (found := latest(folder / "state")) is not None:
        kept = read_state(found, rank=rank)
        if kept["processes"] != processes:
            raise ValueError(
                f"{found}: expected {kept['processes']} processes as when it was saved, found {processes}; start as many, or choose another folder"
            )
        step = kept["step"]
        bare.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        if ema is not None:
            ema.load_state_dict(kept["ema"])
        if accelerator.scaler is not None and kept["scaler"]:
            accelerator.scaler.load_state_dict(kept["scaler"])
    elif accelerator.is_main_process:
        write_text(folder / "recipe.yaml", text)

    def save() -> None:
        shared = {
            "step": step,
            "processes": processes,
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict() if ema is not None else None,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        write_state(folder / "state", step, shared, rank=rank, barrier=accelerator.wait_for_everyone)

    label = "/".join(folder.parts[-2:])
    log = _Log(folder, accelerator, plan.total, step, label)
    if step >= plan.total:
        log.close()
        return Fitted(bare, ema.module if ema is not None else None, step, log.history)
    if training.trackers:
        accelerator.init_trackers(
            "contramask", config={k: v for k, v in _flat(yaml.safe_load(text)).items() if isinstance(v, int | float | str | bool)}
        )
    if accelerator.is_main_process:
        local = loader.batch_size if isinstance(loader, DataLoader) and loader.batch_size else None
        if local:
            print(
                f"{label}: batch {local} per process x {processes} processes x {training.accumulation} accumulation = {local * processes * training.accumulation}",
                flush=True,
            )
        if step:
            print(f"{label}: going on from step {step} of {plan.total}", flush=True)

    pending: list[tuple[int, dict[str, Tensor]]] = []
    clock, counted, samples = time.monotonic(), step, 0
    saved_at = step
    elapsed_before = log.history[-1]["seconds"] if log.history else 0.0
    began = clock

    def flush() -> dict[str, float]:
        """Mean of the terms since the last flush; stops the run at the first one that is not finite."""
        if not pending:
            return {}
        names = list(pending[0][1])
        table = torch.stack([torch.stack([terms[name].float() for name in names]) for _, terms in pending]).cpu()
        bad = (~table.isfinite()).nonzero()
        if len(bad):
            at, name = pending[int(bad[0, 0])][0], names[int(bad[0, 1])]
            last = latest(folder / "state")
            raise NonFiniteLoss(
                f"step {at}: term {name!r} is {float(table[bad[0, 0], bad[0, 1]])}; the last good state is {last or 'none: nothing was saved yet'}"
            )
        pending.clear()
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    def report(rate: float, **more: float) -> None:
        nonlocal clock, counted, samples
        values = flush()
        now = time.monotonic()
        line = {"step": step, "epoch": round(step / plan.per_epoch, 4), **values, "lr": rate, **more}
        line["steps_per_second"] = round((step - counted) / max(now - clock, 1e-9), 3)
        if samples:
            line["samples_per_second"] = round(samples * processes / max(now - clock, 1e-9), 1)
        line["peak_memory_mib"] = round(_peak_memory_mib(), 1)
        line["seconds"] = round(elapsed_before + now - began, 2)
        log.line(line)
        clock, counted, samples = time.monotonic(), step, 0

    every = plan.per_epoch if training.checkpoint_every is None else training.checkpoint_every
    try:
        with _stop_requests() as stop:
            model.train()
            while step < plan.total:
                epoch, inside = divmod(step, plan.per_epoch)
                first = inside * training.accumulation
                for number, batch in enumerate(_epoch_batches(batches, loader, epoch, first, seed, accelerator.device), start=first):
                    group = min(training.accumulation, per_epoch_batches - number // training.accumulation * training.accumulation)
                    last = (number + 1) % training.accumulation == 0 or number + 1 == per_epoch_batches
                    rate = lr_at(step) if lr_at is not None else optimizer.param_groups[0]["lr"]
                    with nullcontext() if last else accelerator.no_sync(model):
                        with accelerator.autocast():
                            output = loss(compiled, batch)
                        terms = _terms(output)
                        accelerator.backward(terms["loss"] / group)
                    pending.append((step, {name: value.detach() for name, value in terms.items()}))
                    samples += (loader.batch_size or 0) if isinstance(loader, DataLoader) else 0
                    if not last:
                        continue
                    if lr_at is not None:
                        for g in optimizer.param_groups:
                            g["lr"] = rate * g.get("lr_scale", 1.0)
                    if training.clip_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if ema is not None:
                        ema.update_parameters(bare)
                    step += 1
                    if after_step is not None:
                        after_step(step)
                    ended = step % plan.per_epoch == 0
                    figures: dict[str, float] = {}
                    if evaluate is not None and evaluate_every and ended and (step // plan.per_epoch) % evaluate_every == 0:
                        bare.eval()
                        figures = dict(evaluate(bare, step // plan.per_epoch))
                        model.train()
                    looking = step % training.log_every == 0 or step == plan.total or bool(figures)
                    saving = step == plan.total or (every and step - saved_at >= every)
                    # one process asks all others only where they meet anyway; alone, each step is looked at
                    asked = bool(stop) if processes == 1 else (looking or saving) and bool(_any_process(bool(stop), accelerator))
                    if looking or saving or asked:
                        report(rate, **figures)
                    if saving or asked:
                        save()
                        saved_at = step
                    if asked and step < plan.total:
                        why = signal.Signals(stop[0] if stop else signal.SIGTERM)
                        if accelerator.is_main_process:
                            print(
                                f"{label}: stopped at step {step} of {plan.total} by {why.name}; the same command goes on from there",
                                flush=True,
                            )
                        raise SystemExit(128 + why)
                    if step == plan.total:
                        break
    finally:
        log.close()
    return Fitted(bare, ema.module if ema is not None else None, step, log.history)


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())
