"""Checkpoints in MAE's naming, which is ours too: pre-training started from MAE, encoders handed to a classifier.

MixedAE released none. MAE's files (`mae_pretrain_vit_base.pth`, `mae_visualize_vit_base.pth`) hold the state dict under `model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from torch import Tensor

from common.patch import interpolate_positions
from common.weights import load_into, read_state_dict
from projects.mixed_ae.model import Classifier, MixedAE

DECODER = ("decoder_*", "mask_token")


def read(path: str | Path) -> dict[str, Tensor]:
    """State dict of one of our run folders (`model.safetensors`), of a safetensors file, or of MAE's file (under `model`, or bare)."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if path.suffix == ".safetensors":
        return read_state_dict(path)
    try:
        return read_state_dict(path, key="model")
    except ValueError as err:
        if "expected an entry" not in str(err):
            raise
        return read_state_dict(path)


def load_mae(model: MixedAE, state: Mapping[str, Tensor] | str | Path, *, interpolate: bool = False) -> None:
    """Start pre-training from a checkpoint of MAE or MixedAE; what MAE lacks (segments, projector; a decoder, if none is in the file) stays fresh.

    Args:
        interpolate: resize position tables of another image size instead of refusing them.
    Raises:
        ValueError: names or shapes that do not fit, another group size among them.
    """
    state, origin = _state(state)
    absent = ["segment_embed", "projector.*"]
    if not any(name.startswith("decoder_") for name in state):
        absent += DECODER
    own = model.state_dict()
    segments = state.get("segment_embed")
    if segments is not None and "segment_embed" in own and segments.shape != own["segment_embed"].shape:
        raise ValueError(
            f"{origin}: segment_embed has {len(segments)} rows, expected {model.group}, one an image of a group; use ratio={1 / len(segments):g} or drop the entry"
        )
    resized = _fitted(state, own, origin, interpolate)
    load_into(model, resized, absent=absent, unused=["segment_embed", "projector.*", "head.*", "fc_norm.*"], origin=origin)


def load_encoder(model: Classifier, state: Mapping[str, Tensor] | str | Path, *, segments: bool = False, interpolate: bool = False) -> None:
    """Give a classifier a pre-trained encoder; only `head` and `fc_norm` may be missing, segments, decoder and final norm are dropped.

    Args:
        segments: add the mean segment vector to the position of every patch, so that patches look as they did in pre-training.
    """
    state, origin = _state(state)
    resized = _fitted(state, model.state_dict(), origin, interpolate)
    if segments:
        if "segment_embed" not in state:
            raise ValueError(f"{origin}: segments=True expects a segment_embed, found none")
        table = resized["pos_embed"].clone()
        table[:, 1:] += state["segment_embed"].mean(0)
        resized["pos_embed"] = table
    unused = ["segment_embed", "projector.*", "norm.*", *DECODER]
    load_into(model, resized, absent=["head.*", "fc_norm.*"], unused=unused, origin=origin)


def _state(state: Mapping[str, Tensor] | str | Path) -> tuple[dict[str, Tensor], str]:
    return (dict(state), "state dict") if isinstance(state, Mapping) else (read(state), str(state))


def _fitted(state: dict[str, Tensor], own: Mapping[str, Tensor], origin: str, interpolate: bool) -> dict[str, Tensor]:
    """Position tables at the model's grid; a patch kernel of another size is refused."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[2:] != own["patch_embed.proj.weight"].shape[2:]:
        raise ValueError(
            f"{origin}: patches of {tuple(kernel.shape[2:])}, expected {tuple(own['patch_embed.proj.weight'].shape[2:])}; give patch_size={kernel.shape[-1]}"
        )
    out = dict(state)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in out and name in own and out[name].shape[1] != own[name].shape[1]:
            old, new = isqrt(out[name].shape[1] - 1), isqrt(own[name].shape[1] - 1)
            if not interpolate:
                raise ValueError(
                    f"{origin}: {name} {tuple(out[name].shape)} is of a {old} x {old} grid, expected {tuple(own[name].shape)} ({new} x {new}); "
                    "set interpolate=True to resize the table, or give the image size of the checkpoint"
                )
            out[name] = interpolate_positions(out[name], (old, old), (new, new), prefix=1)
    return out
