"""Official checkpoints (Keras HDF5 of the reference's releases v2.0 and v3.0), read by name with h5py; TensorFlow is not needed.

The files hold layers under session-dependent names (`conv2d_171`). They are put in order of creation and renamed `conv.i`, `bn.i`, `dense.i`
(ResNet-50: its Keras layer names), kernels transposed to PyTorch's layout. Ours hold the same layers in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from common.weights import load_into
from projects.g_simclr.encoders import KerasResNet50

_KIND = {"conv2d": "conv", "batch_normalization": "bn", "dense": "dense"}
_PART = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def keras_layers() -> list[str]:
    """Names of Keras' ResNet-50 without `_conv` and `_bn`, in the order of our modules (a block's shortcut first)."""
    blocks = [(stage + 2, block + 1) for stage, depth in enumerate(KerasResNet50.depths) for block in range(depth)]
    return ["conv1", *(f"conv{s}_block{b}_{i}" for s, b in blocks for i in range(0 if b == 1 else 1, 4))]


def names(model: nn.Module) -> dict[str, str]:
    """Canonical name of every layer of a model -> our module's name."""
    found: dict[str, list[str]] = {"conv": [], "bn": [], "dense": []}
    keras = any(isinstance(module, KerasResNet50) for module in model.modules())
    for name, module in model.named_modules():
        for kind, layer in (("conv", nn.Conv2d), ("bn", nn.BatchNorm2d), ("dense", nn.Linear)):
            if isinstance(module, layer):
                found[kind].append(name)
    out = {f"{kind}.{i}": name for kind, listed in found.items() for i, name in enumerate(listed) if not (keras and kind != "dense")}
    if keras:
        for kind in ("conv", "bn"):
            out |= {f"{layer}_{kind}": name for layer, name in zip(keras_layers(), found[kind], strict=True)}
    return out


def load_reference(
    model: nn.Module, state: Mapping[str, Tensor] | str | Path, *, absent: Sequence[str] = (), unused: Sequence[str] = ()
) -> None:
    """Load a state dict of canonical names, or an HDF5 file of the reference, into GSimCLR, a classifier or an autoencoder.

    Args:
        absent, unused: patterns of our names that it may lack, and of canonical names that may stay unread.
    Raises:
        ValueError: another number of convolutions (a network of another depth), or names or shapes that do not fit.
    """
    origin = "state dict" if isinstance(state, Mapping) else str(state)
    content = state if isinstance(state, Mapping) else read_h5(state)
    ours = names(model)
    expected, found = (
        sum(bool(re.search(r"^conv\.|_conv$", layer)) for layer in layers) for layers in (ours, {n.rpartition(".")[0] for n in content})
    )
    if expected != found:
        raise ValueError(
            f"{origin}: expected {expected} convolutions for this {type(model).__name__}, found {found}; give the number of blocks that it was trained with (n=4 has 40, n=2 has 22)"
        )

    def rename(name: str) -> str | None:
        layer, _, part = name.rpartition(".")
        return f"{ours[layer]}.{part}" if layer in ours else None

    load_into(model, content, rename=rename, absent=[*absent, "*.num_batches_tracked"], unused=unused, origin=origin)


def canonical(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keras' arrays by `layer/part` (`conv2d_7/kernel`) as canonical names and PyTorch layouts; layers numbered in order of creation.

    Raises:
        ValueError: a layer of a kind that the reference's networks do not have.
    """
    numbered: dict[str, set[int]] = {}
    parsed = []
    for name, array in arrays.items():
        layer, _, part = name.rpartition("/")
        part = _PART.get(part.removesuffix(":0"), "")
        known = re.fullmatch(r"(conv2d|batch_normalization|dense)(?:_(\d+))?", layer)
        if not part or not (known or re.fullmatch(r"conv\d(_block\d+_\d)?_(conv|bn)|auto_output", layer)):
            raise ValueError(
                f"layer {name}: expected conv2d, batch_normalization, dense or Keras' ResNet-50 names; is it a file of the reference?"
            )
        kind, number = (_KIND[known[1]], int(known[2] or 0)) if known else (layer, None)
        if number is not None:
            numbered.setdefault(kind, set()).add(number)
        parsed.append((kind, number, part, array))
    place = {kind: {number: i for i, number in enumerate(sorted(found))} for kind, found in numbered.items()}
    out: dict[str, Tensor] = {}
    for kind, number, part, array in parsed:
        if kind == "auto_output":  # the last convolution of the shallow autoencoder has a name of its own
            layer = f"conv.{len(place['conv'])}"
        else:
            layer = kind if number is None else f"{kind}.{place[kind][number]}"
        if part == "weight" and array.ndim == 4:
            array = array.permute(3, 2, 0, 1)
        elif part == "weight" and array.ndim == 2:
            array = array.T
        out[f"{layer}.{part}"] = array.contiguous()
    return out


def read_h5(path: str | Path) -> dict[str, Tensor]:
    """All arrays of a Keras HDF5 file, weights-only or whole model, under canonical names.

    Raises:
        FileNotFoundError: no such file.
        ImportError: h5py is not installed.
        ValueError: not an HDF5 file, or one of another layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; the releases of github.com/ariG23498/G-SimCLR hold them")
    try:
        import h5py
    except ImportError as err:
        raise ImportError("the reference's checkpoints need h5py: pip install -e '.[points]'") from err
    arrays: dict[str, Tensor] = {}
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            if "layer_names" not in group.attrs:
                raise ValueError(
                    f"checkpoint {path}: expected Keras' attribute layer_names, found {sorted(group)[:5]}; is it a weights file?"
                )
            for layer in (_text(name) for name in group.attrs["layer_names"]):
                for name in (_text(name) for name in group[layer].attrs["weight_names"]):
                    # nested networks prefix their own name: model/conv2d_166/kernel:0
                    arrays["/".join(name.split("/")[-2:])] = torch.from_numpy(group[layer][name][()])
    except OSError as err:
        raise ValueError(f"checkpoint {path}: expected an HDF5 file, found one that h5py cannot open ({err}); fetch it again") from err
    return canonical(arrays)


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
