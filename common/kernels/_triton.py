"""Triton where there is one. Kernels are defined at import either way, so that a machine without Triton can import every file."""

import contextlib
import os
import types
from typing import Any

import torch
from torch import Tensor

__all__ = ["AVAILABLE", "INTERPRETED", "dtype_of", "on_device", "precision", "require", "tl", "triton", "up"]

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # macOS and Windows wheels of torch come without Triton
    triton: Any = types.SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    tl: Any = types.SimpleNamespace(constexpr=object)  # type: ignore[no-redef]
    AVAILABLE = False

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Kernels run in Python on the CPU: for tests alone (one operation takes 60 us whatever its size)."""


def require(tensor: Tensor) -> None:
    """Refuse a Triton path that this machine cannot run.

    Raises:
        ImportError: there is no Triton.
        ValueError: the tensor is on a CPU and kernels are compiled.
    """
    if not AVAILABLE:
        raise ImportError('path="triton" needs Triton: pip install triton (Linux), or leave path="auto"')
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f'path="triton" expects a CUDA tensor, got one on {tensor.device}; use path="auto", or set TRITON_INTERPRET=1 to test'
        )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dtype_of(dtype: torch.dtype) -> Any:
    """Triton's name of an accumulator type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def up(dtype: torch.dtype) -> bool:
    """The interpreter works on the raw bits of bfloat16 (Triton 3.6 and 3.9), so there operands become float32 as they are loaded."""
    return INTERPRETED and dtype in (torch.bfloat16, torch.float16)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: three TF32 products, or one where the user has allowed TF32."""
    return "tf32x3" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"
