"""Checkpoints of the reference (`checkpoint-99.pth`, fine-tuned folds): their names, read into our models.

The reference keeps `{"model", "optimizer", "epoch", "scaler", "args"}`; position tables are not in it. SHA-256 of the released files is unknown: they
lie on a university share that could not be reached.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.weights import load_into, read_state_dict
from projects.hicmae.emotion import EmotionModel
from projects.hicmae.model import HiCMAE

PRETRAIN_ONLY = ("decoder.*", "decoder_audio.*")
"""Our names of what fine-tuning drops."""
FINETUNE_ONLY = ("video_layer_weights", "audio_layer_weights", "fc_norm.*", "head.*")

_RULES = (  # reference -> ours; each is undone by the pair read backwards
    (r"^(encoder(?:_audio)?)\.patch_embed\.", r"\1.embed."),
    (r"^(encoder(?:_audio)?)\.(blocks|norm)\.", r"\1.stack.\2."),
    (r"\.attn\.([qv])_bias$", r".attn.qkv.\1_bias"),
    (r"\.cross_attn\.q_bias$", r".cross_attn.q.bias"),
    (r"\.cross_attn\.v_bias$", r".cross_attn.kv.v_bias"),
    (r"^encoder_to_decoder(_audio)?\.", r"decoder\1.embed."),
    (r"^mask_token(_audio)?$", r"decoder\1.mask_token"),
)
_BACK = (
    (r"^(encoder(?:_audio)?)\.embed\.", r"\1.patch_embed."),
    (r"^(encoder(?:_audio)?)\.stack\.", r"\1."),
    (r"\.attn\.qkv\.([qv]_bias)$", r".attn.\1"),
    (r"\.cross_attn\.q\.bias$", r".cross_attn.q_bias"),
    (r"\.cross_attn\.kv\.v_bias$", r".cross_attn.v_bias"),
    (r"^decoder(_audio)?\.embed\.", r"encoder_to_decoder\1."),
    (r"^decoder(_audio)?\.mask_token$", r"mask_token\1"),
)


def our_name(name: str) -> str:
    """Name in our models of a parameter of the reference."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def reference_name(name: str) -> str:
    """Inverse of `our_name`."""
    for pattern, replacement in _BACK:
        name = re.sub(pattern, replacement, name)
    return name


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """State dict of a released file: entry `model`, else `module`, else the file itself. Pickled code is never run.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or one that holds more than tensors and the reference's argument list.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of the file: a bag of plain values
        if Path(path).suffix != ".safetensors":
            for key in ("model", "module"):
                try:
                    return read_state_dict(path, key=key)
                except ValueError as err:
                    if f"expected an entry {key!r}" not in str(err):
                        raise
        return read_state_dict(path)


def load_reference(model: HiCMAE | EmotionModel, state: Mapping[str, Tensor] | str | Path, *, whole: bool = False) -> None:
    """Put a state dict of the reference, or the file of one, into our model.

    A fine-tuning model takes a pre-trained file (its six own tensors start fresh, decoders are dropped) or a fine-tuned one; of the latter, a head with
    another number of outputs is dropped with a warning. Everything else that is missing or left over is an error.

    Args:
        whole: nothing may start fresh: the file must be a fine-tuned one with the model's own head (to test it as it is).
    Raises:
        ValueError: names or shapes that do not fit (another size, a fine-tuned file for pre-training, not a checkpoint of HiCMAE).
    """
    origin = "state dict" if isinstance(state, Mapping) else str(state)
    content = dict(state) if isinstance(state, Mapping) else read_checkpoint(state)
    if not any(name.startswith(("encoder.", "encoder_audio.")) for name in content):
        raise ValueError(f"{origin}: expected names that begin with encoder. or encoder_audio., found {sorted(content)[:5]}")
    place_state(model, {our_name(name): value for name, value in content.items()}, origin, whole=whole)


def place_state(model: HiCMAE | EmotionModel, state: dict[str, Tensor], origin: str, *, whole: bool = False) -> None:
    """As `load_reference`, of a state dict with our own names (a run of `pretrain.py`, say)."""
    if isinstance(model, HiCMAE) or whole:
        load_into(model, state, origin=origin)
        return
    absent: list[str] = []
    unused = [*PRETRAIN_ONLY]
    if model.modality != "av":  # one encoder alone is taken out of the pair
        unused += ["encoder_fusion.*", "encoder.*" if model.modality == "a" else "encoder_audio.*"]
    if "head.weight" not in state:
        absent += FINETUNE_ONLY
    elif state["head.weight"].shape != model.head.weight.shape:
        warnings.warn(
            f"{origin}: its head has {len(state['head.weight'])} outputs, the model {len(model.head.weight)}; the head starts fresh",
            stacklevel=2,
        )
        absent += ["head.*"]
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if model.feature_fusion == "last":
        unused += ["*_layer_weights"]
    load_into(model, state, absent=absent, unused=unused, origin=origin)


def reference_state(model: nn.Module) -> dict[str, Any]:
    """State dict under the reference's names, for use with its code."""
    return {reference_name(name): value for name, value in model.state_dict().items()}
