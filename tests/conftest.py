"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("ACCELERATE_USE_CPU", "false" if torch.cuda.is_available() else "true")
torch.set_num_threads(1)

from tests.processes import Pair  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def _pair() -> Iterator[list[Pair]]:
    pool: list[Pair] = []
    yield pool
    for pair in pool:
        pair.close()


@pytest.fixture
def two_processes(_pair: list[Pair]) -> Pair:
    """`two_processes(function, *arguments)` runs an importable `function(rank, *arguments)` on two gloo processes: [result 0, result 1]."""
    if not _pair or not _pair[-1].alive:
        _pair.append(Pair())
    return _pair[-1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Root of the real data sets: CONTRAMASK_DATA, else `../shared/data` beside the checkout; skips where neither is there."""
    root = Path(os.environ.get("CONTRAMASK_DATA") or ROOT.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip("real data not found: set CONTRAMASK_DATA to its root")
    return root
