"""Official checkpoints: read without executing pickled code, keys renamed, whatever does not fit named and refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_state_dict(path: str | Path, *, key: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by name, on the CPU.

    Args:
        path: `.safetensors`, or a file written by `torch.save` (read with `weights_only=True`: pickled code is never run).
        key: entry that holds the state dict when the file is a dictionary of several things ("model", "state_dict", ...).
    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or corrupt file, a file that needs pickled code to be run, no such `key`, or entries that are not tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    content: Any
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except SafetensorError as err:
            raise ValueError(
                f"checkpoint {path}: expected a safetensors file, found one that is corrupt or cut short ({err}); fetch it again"
            ) from err
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as err:
            reason = str(err).strip().splitlines()[0]
            raise ValueError(
                f"checkpoint {path}: expected tensors only, found a pickle that would run code or is corrupt ({reason}); it was not loaded, convert it to safetensors where you trust it"
            ) from err
        except (RuntimeError, EOFError, OSError, ValueError) as err:
            raise ValueError(
                f"checkpoint {path}: expected a file written by torch.save, found one that is corrupt or cut short ({err}); fetch it again"
            ) from err
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"checkpoint {path}: expected an entry {key!r}, found {found}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        kind = (
            {name: type(value).__name__ for name, value in content.items() if not isinstance(value, Tensor)}
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise ValueError(f"checkpoint {path}: expected a state dict of tensors, found {kind}; name the entry that holds it with key=")
    return {str(name): value for name, value in content.items()}


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    rename: Callable[[str], str | None] | None = None,
    absent: Sequence[str] = (),
    unused: Sequence[str] = (),
    origin: str = "checkpoint",
) -> None:
    """Put `state` into `model`, or change nothing and say what does not fit.

    Args:
        rename: official name -> ours; None drops the entry (only for names that `unused` declares).
        absent: patterns (fnmatch) of our names that the checkpoint may lack; they keep their values.
        unused: patterns of official names that the model may leave unread.
        origin: what the message calls the checkpoint (its path).
    Raises:
        ValueError: missing or unexpected names, or other shapes; the first three of each kind are named with both shapes.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name, value in state.items():
        new = rename(name) if rename else name
        if new is not None and new in own:
            renamed[new] = value
        elif not any(fnmatch(name, pattern) for pattern in unused):
            unexpected.append(name)
    missing = [name for name in own if name not in renamed and not any(fnmatch(name, pattern) for pattern in absent)]
    shapes = [
        f"{name}: {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
        for name, value in renamed.items()
        if value.shape != own[name].shape
    ]
    problems = [
        f"{title} {len(found)} ({'; '.join(found[:3])})"
        for title, found in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if found
    ]
    if problems:
        raise ValueError(
            f"{origin} does not fit {type(model).__name__}: {', '.join(problems)}; is it the checkpoint of another model or size?"
        )
    model.load_state_dict(renamed, strict=False)
