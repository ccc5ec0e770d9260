"""Where the kernels run: compiled on a GPU, else interpreted on the CPU (tests/conftest.py sets TRITON_INTERPRET before anything imports Triton)."""

import pytest
import torch

from common.kernels import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    if not _triton.AVAILABLE:
        pytest.skip("no Triton: pip install triton")
    if DEVICE == "cpu" and not _triton.INTERPRETED:
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set")
    return DEVICE


@pytest.fixture
def exact(device: str) -> tuple[torch.dtype, float]:
    """Type and relative error of an exact comparison: the interpreter works in float64, a GPU in three TF32 products."""
    return (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 2e-5)
