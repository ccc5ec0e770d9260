"""Checkpoints of Point-MAE (released) and Point-CMAE (none released) by the names of their repositories, into our models and back.

Released by Point-MAE: `pretrain.pth`, `scan_{hardest,objbg,objonly}.pth`, `modelnet_{1k,8k}.pth`, `part_seg.pth`. Point-wise convolutions of the
reference are linear layers here: their last axis of length 1 is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.weights import load_into, read_state_dict

HOLDERS = ("base_model", "model", "model_state_dict")
"""Entries of a checkpoint file that hold the state dict: pre-training and classifiers, other loaders, segmenters."""

_EMBED = {"first_conv.0": "first", "first_conv.1": "first_norm", "first_conv.3": "second"}
_EMBED |= {"second_conv.0": "third", "second_conv.1": "third_norm", "second_conv.3": "last"}
# official prefix -> ours, of the parts that every model has; those of the pre-training model stand behind `MAE_encoder.`
_ENCODER = {f"encoder.{theirs}": f"encoder.embed.{ours}" for theirs, ours in _EMBED.items()}
_ENCODER |= {"pos_embed": "encoder.positions", "blocks.blocks": "encoder.stack.blocks", "norm": "encoder.stack.norm"}
_TWO_BRANCHES = {f"MAE_encoder.{theirs}": ours for theirs, ours in _ENCODER.items()}
for _number, _decoder, _head in (("1", "MAE_decoder", "increase_dim.0"), ("2", "MAE_decoder_", "increase_dim_.0")):
    _ours = f"decoders.{int(_number) - 1}"
    _TWO_BRANCHES |= {
        f"MAE_encoder.cls_token{_number}": f"class_tokens.{_ours[-1]}",
        f"MAE_encoder.cls_pos{_number}": f"class_positions.{_ours[-1]}",
    }
    _TWO_BRANCHES |= {f"mask_token{_number}": f"{_ours}.mask_token", f"decoder_pos_embed{_number}": f"{_ours}.positions"}
    _TWO_BRANCHES |= {f"{_decoder}.blocks": f"{_ours}.stack.blocks", f"{_decoder}.norm": f"{_ours}.norm", _head: f"{_ours}.head"}
_ONE_BRANCH = {f"MAE_encoder.{theirs}": ours for theirs, ours in _ENCODER.items()}
_ONE_BRANCH |= {"mask_token": "decoders.0.mask_token", "decoder_pos_embed": "decoders.0.positions", "increase_dim.0": "decoders.0.head"}
_ONE_BRANCH |= {"MAE_decoder.blocks": "decoders.0.stack.blocks", "MAE_decoder.norm": "decoders.0.norm"}
# Point-MAE has no class token; that of `class_contrast` is named as branch 1's of the release, so that `transfer` treats both alike
_ONE_BRANCH |= {"MAE_encoder.cls_token1": "class_tokens.0", "MAE_encoder.cls_pos1": "class_positions.0"}
_CLASSIFIER = _ENCODER | {"cls_token": "class_token", "cls_pos": "class_position", "cls_head_finetune": "head"}
_SEGMENTER = _ENCODER | {"label_conv.0": "category.0", "label_conv.1": "category.1"}
_SEGMENTER |= {f"propagation_0.mlp_{kind}s.{i}": f"propagate.{3 * i + (kind == 'bn')}" for kind in ("conv", "bn") for i in (0, 1)}
_SEGMENTER |= {"convs1": "head.0", "bns1": "head.1", "convs2": "head.4", "bns2": "head.5", "convs3": "head.7"}
TABLES = {"two_branches": _TWO_BRANCHES, "one_branch": _ONE_BRANCH, "classifier": _CLASSIFIER, "segmenter": _SEGMENTER}
UNUSED = ("MAE_encoder.proj_cls.*",)
"""A projector that the reference computes and throws away."""


def _numpy_numbers() -> list[Any]:
    """What a pickled NumPy number is made of: the reference's files hold such accuracies beside the weights, and no code is run for them."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
    return [np.dtype, *dtypes, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]


def our_name(official: str, table: Mapping[str, str]) -> str | None:
    """Our name of an official one by the longest prefix that the table knows; None for names of other parts."""
    for prefix in sorted(table, key=len, reverse=True):
        if official == prefix or official.startswith(prefix + "."):
            return table[prefix] + official[len(prefix) :]
    return None


def official_names(model: nn.Module, kind: str) -> dict[str, str]:
    """Our name -> official name of every entry of the model's state dict, by the same table read backwards."""
    back = {ours: theirs for theirs, ours in TABLES[kind].items()}
    return {name: found for name in model.state_dict() if (found := our_name(name, back)) is not None}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """State dict of an official file (weights-only; NumPy numbers beside it are admitted), without `module.` prefixes.

    Raises:
        FileNotFoundError, ValueError: no such file; a file that holds none of the known entries, its top-level keys named.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_state_dict(path)
    reasons = []
    for key in HOLDERS:
        try:
            with torch.serialization.safe_globals(_numpy_numbers()):
                state = read_state_dict(path, key=key)
        except ValueError as err:
            reasons.append(str(err))
            continue
        return {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    raise ValueError(f"{reasons[0]}; expected one of {', '.join(HOLDERS)}, as Point-MAE and Point-CMAE write them")


def fitted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Point-wise convolutions (out, in, 1) as linear weights (out, in), where that is the model's shape."""
    own = model.state_dict()
    return {
        name: value.squeeze(-1) if name in own and value.ndim == own[name].ndim + 1 and value.shape[-1] == 1 else value
        for name, value in state.items()
    }


def load_pretraining(model: nn.Module, state: Mapping[str, Tensor], *, origin: str = "checkpoint") -> None:
    """Official pre-training weights into PointCMAE; a Point-MAE checkpoint starts both branches of a two-branch model alike.

    Raises:
        ValueError: names or shapes that do not fit; a classifier's checkpoint is pointed out.
    """
    if any("cls_head_finetune" in name for name in state):
        raise ValueError(f"{origin}: has cls_head_finetune, a classifier's checkpoint; load it with load_classifier")
    released_pair = any(name.startswith("MAE_decoder_.") for name in state)
    table = TABLES["two_branches" if released_pair else "one_branch"]
    named = {name: our_name(name, table) for name in state}
    renamed = {ours if ours is not None else name: state[name] for name, ours in named.items()}
    branches = len(model.decoders)  # type: ignore[arg-type]
    absent: tuple[str, ...] = ()
    if not released_pair and branches == 2:
        renamed |= {
            name.replace("decoders.0.", "decoders.1.", 1): value for name, value in renamed.items() if name.startswith("decoders.0.")
        }
        absent = ("class_tokens.*", "class_positions.*")  # Point-MAE has none
    load_into(model, fitted(renamed, model), absent=(*absent, "*.num_batches_tracked"), unused=UNUSED, origin=origin)


def load_complete(model: nn.Module, state: Mapping[str, Tensor], kind: str, *, origin: str = "checkpoint") -> None:
    """Official weights of a whole classifier or segmenter (`kind`), nothing missing.

    Raises:
        ValueError: names or shapes that do not fit; a pre-training checkpoint lacks the head, which would be random.
    """
    if any(name.startswith("MAE_encoder.") for name in state):
        raise ValueError(f"{origin}: a pre-training checkpoint, it has no head (it would be random); fine-tune it first")
    named = {name: our_name(name, TABLES[kind]) for name in state}
    renamed = {ours if ours is not None else name: state[name] for name, ours in named.items()}
    load_into(model, fitted(renamed, model), absent=("*.num_batches_tracked",), origin=origin)


@dataclass(frozen=True)
class Transfer:
    """Official names: what was loaded, what of the model was not in the file, what of the file was not used."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        return f"loaded {len(self.loaded)} entries, missing {len(self.missing)}, unexpected {len(self.unexpected)}"


def transfer(
    model: nn.Module, state: Mapping[str, Tensor], kind: str, *, class_token: bool = False, origin: str = "checkpoint"
) -> Transfer:
    """Encoder of an official pre-training checkpoint into a classifier or segmenter; heads stay as they were made.

    Args:
        class_token: start class token and position from branch 1. The reference does not: its names differ, so they stay fresh (False).
    Returns:
        the report, in official names with the prefix `MAE_encoder.` dropped as the reference drops it.
    Raises:
        ValueError: nothing of the encoder matched, naming the keys found; shapes that differ.
    """
    named = {re.sub(r"^(MAE_encoder|base_model)\.", "", name): value for name, value in state.items()}
    own = official_names(model, kind)
    if class_token:
        named |= {f"cls_{part}": named[f"cls_{part}1"] for part in ("token", "pos") if f"cls_{part}1" in named}
    theirs = set(own.values())
    loaded = sorted(name for name in named if name in theirs and not name.startswith("cls_head"))
    if not any(name.startswith("blocks.") for name in loaded):
        found = sorted({name.partition(".")[0] for name in state})[:8]
        raise ValueError(
            f"{origin}: nothing of the encoder matched; expected MAE_encoder.blocks... or blocks..., found names under {found}"
        )
    renamed = {ours: named[official] for ours, official in own.items() if official in loaded}
    load_into(model, fitted(renamed, model), absent=[name for name in own if name not in renamed], origin=origin)
    counters = "num_batches_tracked"
    return Transfer(
        loaded,
        sorted(name for name in theirs - set(loaded) if not name.endswith(counters)),
        sorted(name for name in named if name not in theirs),
    )


def ours_as_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """State of our PointCMAE under official names (weights keep our shapes), so that `transfer` has one form to read."""
    names = official_names(model, "two_branches" if len(model.decoders) == 2 else "one_branch")  # type: ignore[arg-type]
    return {names.get(name, name): torch.as_tensor(value) for name, value in state.items()}
