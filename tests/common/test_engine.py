"""The training loop: exact resume, accumulation, schedules, moving averages, clean stops, two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.checkpoint import latest
from common.engine import NonFiniteLoss, Training, budget, fit, mean_over_processes, seed_everything
from common.schedule import cosine
from tests.processes import Pair


@dataclass(frozen=True)
class Recipe:
    """A small regression."""

    width: int = 8
    """Hidden width."""
    workers: int = 0
    """Loader workers."""
    training: Training = field(default_factory=lambda: Training(epochs=3, log_every=1, checkpoint_every=1))
    """Budget."""


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples whose augmentation draws from all three generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((4,), index / 22) + 0.1 * torch.randn(4) + random.random() + float(np.random.rand())
        return x, x.sum(0, keepdim=True)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    error = model(batch[0]) - batch[1]
    return {"loss": error.square().mean(), "bias": error.mean()}


def train(folder: Path, recipe: Recipe, stop_after: int | None = None, *, shuffle: bool = True, **more: object) -> dict[str, Tensor]:
    """One run; `stop_after` ends the process's work by an exception right after that optimiser step, as a kill would."""
    seed_everything(5)
    model = net(recipe.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = DataLoader(Noisy(), batch_size=4, shuffle=shuffle, num_workers=recipe.workers)
    plan = budget(loader, recipe.training)

    def killed(step: int) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    lr = lambda step: cosine(step, total=plan.total, peak=0.01)  # noqa: E731
    fitted = fit(model, squared, loader, optimizer, recipe.training, folder, recipe=recipe, seed=3, lr_at=lr, after_step=killed, **more)  # type: ignore[arg-type]
    return {**fitted.model.state_dict(), **({f"ema.{k}": v for k, v in fitted.ema.state_dict().items()} if fitted.ema else {})}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_a_run_stopped_at_any_step_ends_with_the_same_weights(tmp_path: Path, stop_after: int, accumulation: int) -> None:
    recipe = Recipe(training=Training(epochs=3, log_every=1, checkpoint_every=1, accumulation=accumulation, ema_decay=0.9, clip_norm=1.0))
    whole = train(tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", recipe, stop_after)
    torch.manual_seed(99)  # a new process starts with other generators
    assert same(train(tmp_path / "parts", recipe), whole)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))


def test_states_saved_rarely_and_workers_give_the_same_weights(tmp_path: Path) -> None:
    rare = Recipe(training=Training(epochs=3, checkpoint_every=4))
    whole = train(tmp_path / "whole", rare)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", rare, 7)
    assert latest(tmp_path / "parts" / "state").name == "step-00000004"  # type: ignore[union-attr]
    assert same(train(tmp_path / "parts", replace(rare, workers=2)), whole)


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = train(tmp_path, Recipe())
    assert same(train(tmp_path, Recipe(), stop_after=1), first)


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    results = []
    for name, batches, accumulation in (("one", [(x, x[:, :1])], 1), ("two", [(x[:4], x[:4, :1]), (x[4:], x[4:, :1])], 2)):
        seed_everything(0)
        model = nn.Linear(4, 1)
        recipe = Recipe(training=Training(steps=5, accumulation=accumulation))
        fit(model, squared, batches, torch.optim.SGD(model.parameters(), lr=0.1), recipe.training, tmp_path / name, recipe=recipe)
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_schedule_scales_and_moving_average(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}], lr=1.0)
    seen: list[list[float]] = []
    x = torch.zeros(2, 4)
    recipe = Recipe(training=Training(steps=3, ema_decay=0.5))
    fitted = fit(
        model,
        squared,
        [(x, x[:, :1] + 1)],
        optimizer,
        recipe.training,
        tmp_path,
        recipe=recipe,
        lr_at=lambda step: 0.1 * (step + 1),
        after_step=lambda step: seen.append([g["lr"] for g in optimizer.param_groups] + [float(model.bias.detach())]),
    )
    assert [pytest.approx(row[:2]) for row in seen] == [[0.05, 0.1], [0.1, 0.2], [0.15, 0.3]]
    average = seen[0][2]  # the average starts at the first updated weights
    for row in seen[1:]:
        average = 0.5 * average + 0.5 * row[2]
    assert float(fitted.ema.bias) == pytest.approx(average)  # type: ignore[union-attr, arg-type]


def test_evaluation_is_logged_at_its_epochs(tmp_path: Path) -> None:
    recipe = Recipe(training=Training(epochs=4, log_every=100))
    model = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    fitted = fit(
        model,
        squared,
        [(x, x[:, :1])] * 2,
        torch.optim.SGD(model.parameters(), lr=0.1),
        recipe.training,
        tmp_path,
        recipe=recipe,
        evaluate=lambda m, epoch: {"probe": float(epoch)},
        evaluate_every=2,
    )
    assert [(line["step"], line["probe"]) for line in fitted.history if "probe" in line] == [(4, 2.0), (8, 4.0)]


def test_a_loss_that_is_not_finite_names_term_step_and_state(tmp_path: Path) -> None:
    calls = iter(range(100))

    def breaks(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        terms = squared(model, batch)
        return {**terms, "contrast": terms["bias"] * (float("nan") if next(calls) == 5 else 1.0)}

    model = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    recipe = Recipe(training=Training(steps=20, log_every=4, checkpoint_every=4))
    with pytest.raises(NonFiniteLoss, match=r"step 5: term 'contrast' is nan; the last good state is .*step-00000004"):
        fit(model, breaks, [(x, x[:, :1])], torch.optim.SGD(model.parameters(), lr=0.1), recipe.training, tmp_path, recipe=recipe)


def test_another_recipe_is_refused_and_harmless_changes_are_not(tmp_path: Path) -> None:
    train(tmp_path, Recipe())
    with pytest.raises(ValueError, match=r"begun with another recipe: width \(8 there, 16 now\)"):
        train(tmp_path, Recipe(width=16))
    train(tmp_path, Recipe(workers=1, training=Training(epochs=3, log_every=5, checkpoint_every=2)))


def test_budget_is_given_once() -> None:
    with pytest.raises(ValueError, match="give exactly one"):
        Training()
    with pytest.raises(ValueError, match="give exactly one"):
        Training(epochs=1, steps=1)
    assert budget([1, 2, 3], Training(epochs=4, accumulation=2)).total == 8


SCRIPT = """
    import sys, os, signal, time
    from pathlib import Path
    import tests.common.test_engine as t
    recipe = t.Recipe(training=t.Training(epochs=6, log_every=1, checkpoint_every=3))
    def act(step):
        if step == {at}:
            os.kill(os.getpid(), signal.{signal})
    model = t.net(); t.seed_everything(5)
    model = t.net()
    loader = t.DataLoader(t.Noisy(), batch_size=4, shuffle=True)
    fitted = t.fit(model, t.squared, loader, t.torch.optim.AdamW(model.parameters(), lr=0.01), recipe.training, Path(sys.argv[1]), recipe=recipe, after_step=act)
    t.torch.save(fitted.model.state_dict(), sys.argv[2])
"""


def run_script(folder: Path, at: int, by: str = "SIGKILL") -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(SCRIPT.format(at=at, signal=by))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(folder.with_suffix(".pt"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_kill_9_and_sigterm_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script(whole, at=-1).returncode == 0
    assert run_script(parts, at=8).returncode == -signal.SIGKILL
    assert latest(parts / "state").name == "step-00000006"  # type: ignore[union-attr]
    stopped = run_script(parts, at=11, by="SIGTERM")
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped at step 11 of 36 by SIGTERM" in stopped.stdout
    assert latest(parts / "state").name == "step-00000011"  # type: ignore[union-attr]
    assert run_script(parts, at=-1).returncode == 0
    assert same(torch.load(whole.with_suffix(".pt")), torch.load(parts.with_suffix(".pt")))


class Fixed(Dataset[tuple[Tensor, Tensor]]):
    """Eight samples without randomness."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([index, 1.0, -index, 2.0]) / 8, torch.tensor([index / 4])


def fit_fixed(rank: int, folder: str, batch: int, steps: int) -> tuple[Tensor, int]:
    seed_everything(0)
    model = nn.Linear(4, 1)
    recipe = Recipe(training=Training(steps=steps))
    loader = DataLoader(Fixed(), batch_size=batch)
    fitted = fit(model, squared, loader, torch.optim.SGD(model.parameters(), lr=0.1), recipe.training, folder, recipe=recipe)
    return fitted.model.weight.detach(), budget(loader, Training(epochs=1)).total  # type: ignore[return-value]


def uneven_mean(rank: int) -> tuple[Tensor, Tensor]:
    """Gradient of a mean over 3 terms here and 1 there."""
    weight = nn.Parameter(torch.ones(2))
    module = nn.ParameterList([weight])
    terms = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) if rank == 0 else torch.tensor([[7.0, 8.0]])
    loss = mean_over_processes((terms @ weight).square().sum(), len(terms))
    loss.backward()
    gradient = weight.grad.clone()  # type: ignore[union-attr]
    torch.distributed.all_reduce(gradient)
    del module
    return loss.detach(), gradient / 2


def test_two_processes_equal_one(tmp_path: Path, two_processes: Pair) -> None:
    alone, _ = fit_fixed(0, str(tmp_path / "one"), 4, 6)
    (first, steps), (second, _) = two_processes(fit_fixed, str(tmp_path / "two"), 2, 6)
    assert steps == 2
    torch.testing.assert_close(first, alone)
    torch.testing.assert_close(second, first)


def test_mean_over_uneven_processes_has_the_gradient_of_one(two_processes: Pair) -> None:
    (_, gradient), _ = two_processes(uneven_mean)
    weight = torch.ones(2, requires_grad=True)
    terms = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    (terms @ weight).square().mean().backward()
    torch.testing.assert_close(gradient, weight.grad)
    torch.testing.assert_close(mean_over_processes(terms.sum(), 4), terms.sum() / 4)


def test_resume_with_another_number_of_processes_is_refused(tmp_path: Path, two_processes: Pair) -> None:
    fit_fixed(0, str(tmp_path), 2, 4)
    with pytest.raises(AssertionError, match="expected 1 processes as when it was saved, found 2"):
        two_processes(fit_fixed, str(tmp_path), 2, 4)
