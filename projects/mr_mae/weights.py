"""ConvMAE and ConvMAE-v2 checkpoints: names, shapes read off the file, and what each of our models may lack or leave unread.

A file is a dictionary with the key `model` (fine-tuned ones hold an argparse namespace beside it, which is read as plain values) or a bare state dict;
no other pickled object is ever built. Released encoders hold no decoder, mask token or stage decoders; v2 files hold a class token.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.patch import interpolate_positions
from common.weights import load_into, read_state_dict
from projects.mr_mae.classifier import Classifier, PlainClassifier
from projects.mr_mae.dense import DetectionBackbone, SegmentationBackbone
from projects.mr_mae.model import MRMAE, PlainEncoder

DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.stack.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
}
PRETRAINING_ONLY = ("decoder*", "mask_token", "stage1_output_decode.*", "stage2_output_decode.*", "mimics.*")
FIXED = ("decoder_pos_embed", "*relative_position_index", "*.num_batches_tracked")


def our_name(name: str) -> str:
    """Name in `MRMAE` of an entry of the reference's pre-training model."""
    found = next(((theirs, ours) for theirs, ours in DECODER.items() if name.startswith(theirs)), ("", "encoder."))
    return found[1] + name.removeprefix(found[0])


def their_name(name: str) -> str | None:
    """Inverse of `our_name`; None for what the reference does not have (mimic heads)."""
    back = ((ours, theirs) for theirs, ours in {**DECODER, "": "encoder."}.items())
    return next((theirs + name.removeprefix(ours) for ours, theirs in back if name.startswith(ours)), None)


def reference_state(model: MRMAE) -> dict[str, Tensor]:
    """The state of a pre-training model under the reference's names, fixed tables included, mimic heads left out."""
    out = {theirs: value for name, value in model.state_dict().items() if (theirs := their_name(name)) is not None}
    if model.decoder is not None and model.decoder.positions is not None:
        out["decoder_pos_embed"] = model.decoder.positions[None]
    return out


def read(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a released file, under the key `model` or bare; of our own run folder (`model.safetensors`) too, under the reference's names."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of a fine-tuned file
        try:
            state = read_state_dict(path, key=None if path.suffix == ".safetensors" else "model")
        except ValueError as err:
            if "expected an entry 'model'" not in str(err):
                raise
            state = read_state_dict(path)
    if any(name.startswith("encoder.") for name in state):
        state = {theirs: value for name, value in state.items() if (theirs := their_name(name)) is not None}
    return state


def plain_classifier(model: MRMAE, classes: int, *, image_size: int | None = None, drop_path: float = 0.0) -> PlainClassifier:
    """A classifier with the encoder of a pre-trained plain ViT; positions resized to `image_size`."""
    if not isinstance(model.encoder, PlainEncoder):
        raise ValueError(
            "plain_classifier: expected a model with backbone='vit', found a ConvMAE backbone; use Classifier and load_reference"
        )
    vit, patch = model.encoder.vit, model.patch
    block = vit.stack.blocks[0]
    size = image_size or model.encoder.grid * patch
    net = PlainClassifier(
        classes,
        size,
        patch,
        vit.stack.dim,
        len(vit.stack.blocks),
        block.attn.num_heads,
        block.mlp.fc1.out_features / vit.stack.dim,
        class_token=vit.class_token is not None,
        drop_path=drop_path,
    )
    renamed = {"embed.proj.": "patch_embed.proj.", "class_token": "cls_token", "stack.blocks.": "blocks."}
    state = {}
    for name, value in vit.state_dict().items():
        ours, theirs = next(((ours, theirs) for ours, theirs in renamed.items() if name.startswith(ours)), ("", ""))
        state[theirs + name.removeprefix(ours)] = value
    grid = (model.encoder.grid, model.encoder.grid)
    state["pos_embed"] = interpolate_positions(vit.positions[None], grid, (size // patch, size // patch), prefix=model.encoder.prefix)
    load_into(net, state, absent=("head.*", "fc_norm.*"), unused=("stack.norm.*",), origin="plain encoder")
    return net


def shape_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the backbone that a state dict (reference names) fits; the head count cannot be seen in it.

    Raises:
        ValueError: not a ConvMAE state dict.
    """
    try:
        maps = [state[f"patch_embed{stage}.proj.weight"] for stage in (1, 2, 3)]
        hidden = [state[f"blocks{stage}.0.mlp.fc1.weight"].shape[:2] for stage in (1, 2, 3)]
        rows = state["pos_embed"].shape[-2]
    except KeyError as err:
        raise ValueError(f"state dict: expected a ConvMAE backbone, found no entry {err}; is it the checkpoint of another model?") from err
    patch = [int(weight.shape[-1]) for weight in maps]
    grid = int(rows**0.5)  # 197 rows: a class token's row in front
    return {
        "image_size": grid * patch[0] * patch[1] * patch[2],
        "channels": int(maps[0].shape[1]),
        "stage_patch": patch,
        "stage_dims": [int(weight.shape[0]) for weight in maps],
        "stage_depths": [len({name.split(".")[1] for name in state if name.startswith(f"blocks{stage}.")}) for stage in (1, 2, 3)],
        "mlp_ratio": [int(wide) / int(narrow) for wide, narrow in hidden],
        "class_token": "cls_token" in state,
    }


def load_reference(model: nn.Module, state: Mapping[str, Tensor] | str | Path) -> list[str]:
    """Put a ConvMAE state dict into MRMAE, Classifier, DetectionBackbone or SegmentationBackbone, and say what kept its initial values.

    The position table is resized bicubically to the model's grid. What a released encoder lacks (decoder, mask token, stage decoders) is named in a
    warning; a classifier's head and fc_norm, and relative positions, are expected to be new.

    Returns:
        names of the model's entries that the file did not fill.
    Raises:
        ValueError: another size, or a class token on one side only; names and shapes are given.
    """
    origin = "state dict" if isinstance(state, Mapping) else str(state)
    pretraining = isinstance(model, MRMAE)
    if pretraining and isinstance(model.encoder, PlainEncoder):
        raise ValueError(
            f"{origin}: expected a model with the ConvMAE backbone, found a plain ViT; it can begin from a run folder of its own kind"
        )
    content = dict(state) if isinstance(state, Mapping) else read(state)
    backbone: Any = model.encoder if pretraining else model
    if ("cls_token" in content) != (backbone.cls_token is not None):
        flag = "class_token=True" if "cls_token" in content else "class_token=False"
        raise ValueError(
            f"{origin}: it holds {'a' if 'cls_token' in content else 'no'} class token (ConvMAE-v2 files do); build the model with {flag}"
        )
    rename = our_name if pretraining else _dense_name if isinstance(model, SegmentationBackbone) else None
    if "pos_embed" in content:
        table = content["pos_embed"][:, -(int(content["pos_embed"].shape[1] ** 0.5) ** 2) :]  # drop a class token's row
        old = int(table.shape[1] ** 0.5)
        content["pos_embed"] = interpolate_positions(table, (old, old), (backbone.grid, backbone.grid))
    own = model.state_dict()
    absent: tuple[str, ...] = ("mimics.*",) if backbone.pos_embed.requires_grad else ("mimics.*", "*pos_embed")  # a fixed table is known
    unused: tuple[str, ...] = FIXED
    if pretraining:
        absent += ("decoder.*", "encoder.stage?_output_decode.*")
        unused += ("fc_norm.*", "head.*")
    else:
        unused += PRETRAINING_ONLY
        if isinstance(model, Classifier):
            absent += ("head.*", "fc_norm.*")
            unused += ("norm.*",) if model.pool == "mean" else ("fc_norm.*",)
            if "head.weight" in content and "head.weight" in own and content["head.weight"].shape != own["head.weight"].shape:
                content = {name: value for name, value in content.items() if not name.startswith("head.")}
            unused += ("head.*",) if "head.weight" not in own else ()
        if isinstance(model, DetectionBackbone):
            absent += ("*_rel_pos_bias.*",)
            unused += ("norm.*", "fc_norm.*", "head.*")
        if isinstance(model, SegmentationBackbone):
            absent += ("*.relative_position_bias_table", "*.gamma", "fpn.*")
            unused += ("norm.*", "fc_norm.*", "head.*")
    load_into(model, content, rename=rename, absent=absent, unused=unused, origin=origin)
    filled = {rename(name) if rename else name for name in content}
    missing = [name for name in own if name not in filled]
    if pretraining:
        _say_what_is_new(f"{origin}: an encoder alone", (name for name in missing if not name.startswith("mimics.")))
    return missing


def begin_from(model: MRMAE, path: str | Path) -> None:
    """Put a pre-training run folder, or a released ConvMAE file (`load_reference`), into a model that is to be trained; what kept its start is named.

    Raises:
        ValueError: another size; a mimic head for a teacher of another width.
    """
    path = Path(path)
    if not path.is_dir():
        load_reference(model, path)
        return
    state, own = read_state_dict(path / "model.safetensors"), model.state_dict()
    state.pop("encoder.pos_embed", None)  # the table is fixed, whatever the image size
    for name in sorted(own.keys() & state.keys()):
        if name.startswith("mimics.") and own[name].shape != state[name].shape:
            raise ValueError(
                f"start {path}: {name} is {tuple(state[name].shape)} there, {tuple(own[name].shape)} for the teachers of this recipe; "
                "set teachers to those of that run, or begin from a file of its encoder"
            )
    parts = ("decoder.*", "mimics.*")
    load_into(model, state, absent=(*parts, "encoder.pos_embed"), unused=parts, origin=f"start {path}")
    _say_what_is_new(f"start {path}", own.keys() - state.keys())


def _say_what_is_new(origin: str, names: Iterable[str]) -> None:
    if groups := sorted({_group(name) for name in names if name != "encoder.pos_embed"}):
        warnings.warn(f"{origin}; {', '.join(groups)} keep their initial values", stacklevel=3)


def _group(name: str) -> str:
    parts = {"decoder": "decoder (mask token too)", "mimics": "mimic heads"}
    return parts.get(name.split(".")[0]) or name.removeprefix("encoder.").split(".")[0]


def _dense_name(name: str) -> str:
    return name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")
