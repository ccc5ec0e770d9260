"""What a run leaves behind: `state/` for an exact resume, `config.json` + `model.safetensors` for users.

Everything is written aside and renamed, so a run that is killed, or a disk that is full, leaves the last good state whole.
Files are read with `weights_only=True`: no pickled code is run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from common.weights import load_into, read_state_dict

M = TypeVar("M", bound=nn.Module)
FORMAT = 1
# torch and safetensors report a failed write by errors of their own
_FAILED_WRITES = ("iostream error", "inline_container", "PytorchStreamWriter", "SafetensorError")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or fill a folder at; renamed to `target` when the block ends, removed when it fails.

    Raises:
        OSError: the write failed (a full disk, say); the message names the target and the free space, and `target` is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield aside
        if target.is_dir():  # a folder is not replaced by a rename
            shutil.rmtree(target)
        aside.replace(target)
    except BaseException as err:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        if isinstance(err, OSError) or any(word in f"{type(err).__name__} {err}" for word in _FAILED_WRITES):
            free = shutil.disk_usage(target.parent).free
            raise OSError(f"could not write {target} ({err}); {free / 2**20:.0f} MiB are free there; nothing was changed") from err
        raise


def write_text(target: Path, text: str) -> None:
    """Write a text file so that it is either whole or as it was."""
    with written_aside(target) as aside:
        aside.write_text(text)


def rng_state() -> dict[str, Any]:
    """State of every generator that training draws from: Python, NumPy, torch and torch's accelerators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any) -> Any:
    """Containers, and numbers of checked types (jsonargparse's PositiveFloat ...) as plain ones: weights-only loading knows no others."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, float | int) and type(value) not in (float, int, bool):
        return float(value) if isinstance(value, float) else int(value)
    return value


def latest(folder: Path) -> Path | None:
    """The newest complete training state under `folder`, or None."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def write_state(folder: Path, step: int, shared: dict[str, Any], *, rank: int = 0, barrier: Any = lambda: None) -> Path:
    """Write `folder/step-<step>`: what all processes share once, the random generators of each process; then drop older states.

    Args:
        shared: tensors, numbers, strings and containers of them.
        rank: of this process; every process calls.
        barrier: called so that the folder is renamed only when every process has written.
    Returns:
        the folder written.
    """
    target = folder / f"step-{step:08d}"
    aside = folder / f".{target.name}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    barrier()
    with written_aside(aside / f"rng-{rank}.pt") as path:
        torch.save(rng_state(), path)
    if rank == 0:
        try:
            with written_aside(aside / "state.pt") as path:
                torch.save(_plain({"format": FORMAT, **shared}), path)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    barrier()
    if rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
        for old in folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    barrier()
    return target


def read_state(path: Path, *, rank: int = 0) -> dict[str, Any]:
    """What `write_state` wrote; sets the random generators of this process.

    Raises:
        ValueError: a damaged file, or one of another format.
    """
    try:
        shared = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        generators = torch.load(path / f"rng-{rank}.pt", map_location="cpu", weights_only=True)
    except Exception as err:
        raise ValueError(
            f"training state {path}: expected files written by this version, found damaged or foreign ones ({err}); remove the folder to start anew"
        ) from err
    if shared.get("format") != FORMAT:
        raise ValueError(
            f"training state {path}: expected format {FORMAT}, found {shared.get('format')}; resume with the version that wrote it"
        )
    set_rng_state(generators)
    return shared


def save_model(model: nn.Module, folder: str | Path, *, recipe: str | None = None) -> Path:
    """Write `config.json` and `model.safetensors` (and `recipe.yaml`) that `from_pretrained` reads and `push_to_hub` publishes.

    Args:
        model: a module with huggingface_hub's `PyTorchModelHubMixin`.
        recipe: YAML text of the recipe that made the weights.
    Raises:
        TypeError: a model without the mixin.
        OSError: the write failed; files that were there before are untouched.
    """
    if not isinstance(model, PyTorchModelHubMixin):
        raise TypeError(f"{type(model).__name__}: expected a model with huggingface_hub.PyTorchModelHubMixin, which writes its config.json")
    folder = Path(folder)
    with written_aside(folder / ".model") as aside:
        model.save_pretrained(aside)
        for file in aside.iterdir():
            if file.name != "README.md":  # the mixin's model card would hide the project's
                file.replace(folder / file.name)
    shutil.rmtree(folder / ".model", ignore_errors=True)
    if recipe is not None:
        write_text(folder / "recipe.yaml", recipe)
    return folder


def load_model(model_class: type[M], folder: str | Path, **changes: Any) -> M:
    """A model of `model_class` with the weights of a run folder or of a repository on the hub's local cache.

    Args:
        folder: holds `config.json` (constructor arguments) and `model.safetensors`.
        changes: constructor arguments that replace those of the file.
    Raises:
        FileNotFoundError: no model there.
        ValueError: the weights are those of another model; names and shapes are listed.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"model {folder}: expected config.json and model.safetensors there, found no config.json; train it first or give its run folder"
        )
    config = json.loads((folder / "config.json").read_text())
    try:
        model = model_class(**{**config, **changes})
    except TypeError as err:
        raise ValueError(
            f"model {folder}: its config.json does not fit {model_class.__name__} ({err}); is it the checkpoint of another model?"
        ) from err
    load_into(model, read_state_dict(folder / "model.safetensors"), origin=str(folder / "model.safetensors"))
    return model
