"""Official checkpoints: five state dicts in one file (`CROMA_base.pt`, `CROMA_large.pt`), the same with prefixes, or a pre-training state dict.

Released under MIT on the Hugging Face hub (`antofuller/CROMA`; mirrored at `torchgeo/croma` with the first digits of the SHA-256 in the name: base 0238d814, large 921e69ad).
The release holds the encoders and GAP heads only: decoder and contrastive projections start fresh.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_model, written_aside
from common.weights import load_into, read_state_dict
from projects.croma.model import CROMA, Encoders

GROUPS = {
    "s1_encoder": "radar_encoder",
    "s2_encoder": "optical_encoder",
    "joint_encoder": "joint_encoder",
    "s1_GAP_FFN": "radar_head",
    "s2_GAP_FFN": "optical_head",
}
PRETRAINING_GROUPS = {
    "radar_encoder": "s1_encoder",
    "optical_encoder": "s2_encoder",
    "cross_encoder": "joint_encoder",
    "GAP_FFN_radar": "s1_GAP_FFN",
    "GAP_FFN_optical": "s2_GAP_FFN",
}


def released_name(name: str) -> str | None:
    """Released name of a pre-training entry; None for decoder and contrastive projections, other names stay."""
    group, _, rest = name.partition(".")
    if group in ("decoder", "global_contrast_loss"):
        return None
    if group not in PRETRAINING_GROUPS:
        return name
    rest = re.sub(r"\.create_(qkv|q|k|v)\.", r".to_\1.", rest)
    rest = re.sub(r"\.out\.", ".to_out.", rest)
    rest = re.sub(r"\.net\.2\.", ".net.3.", rest)
    return f"{PRETRAINING_GROUPS[group]}.{rest}"


def our_name(name: str) -> str | None:
    """Our name in `Encoders` of a released entry (`<group>.<key>`); None where there is none."""
    group, _, rest = name.partition(".")
    if group not in GROUPS:
        return None
    ours = GROUPS[group]
    if ours.endswith("_head"):
        return f"{ours}.{rest}"
    rest = rest.removeprefix("transformer.")
    stack = ours if ours == "joint_encoder" else f"{ours}.stack"
    if rest.startswith("linear_input."):
        return f"{ours}.embed.{rest.removeprefix('linear_input.')}"
    if rest.startswith("norm_out."):
        return f"{stack}.norm.{rest.removeprefix('norm_out.')}"
    return f"{stack}.{_layer_name(rest, cross=ours == 'joint_encoder')}"


def _layer_name(rest: str, *, cross: bool) -> str:
    """`layers.i.j.<part>` of a released stack: j = 0 self-attention, [1 cross-attention,] last feed-forward."""
    found = re.fullmatch(r"layers\.(\d+)\.(\d)\.(.+)", rest)
    if found is None:
        return rest
    layer, number, part = found.groups()
    block = ("attn", "cross", "ffn")[int(number)] if cross else ("attn", "ffn")[min(int(number), 1)]
    part = part.replace("input_norm.", "norm.").replace("to_out.", "proj.").replace("to_qkv.", "qkv.")
    part = re.sub(r"^to_([qkv])\.", r"\1.", part).replace("net.0.", "mlp.fc1.").replace("net.3.", "mlp.fc2.")
    return f"layers.{layer}.{block}.{part}"


def our_pretraining_name(name: str) -> str | None:
    """Our name in `CROMA` of an entry of the reference's pre-training state dict; the fixed position table has none."""
    group, _, rest = name.partition(".")
    if group == "global_contrast_loss":
        return rest
    if group == "decoder":
        if rest == "decoder_pos_embed":
            return None
        if rest.startswith("decoder."):
            rest = (
                rest.removeprefix("decoder.").replace(".create_qkv.", ".to_qkv.").replace(".out.", ".to_out.").replace(".net.2.", ".net.3.")
            )
            return f"decoder.stack.{_layer_name(rest.replace('norm_out.', 'norm.'), cross=False)}"
        return "decoder." + rest.replace("encoder_to_decoder.", "embed.").replace("linear_output.", "head.")
    released = released_name(name)
    inner = None if released is None else our_name(released)
    return None if inner is None else f"encoders.{inner}"


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of an official file under `<group>.<key>`: five nested dicts are flattened, flat files stay as they are.

    Raises:
        FileNotFoundError, ValueError: as `common.weights.read_state_dict`; no pickled code is run.
    """
    try:
        return read_state_dict(path)
    except ValueError as err:
        if "name the entry that holds it" not in str(err):
            raise
    return {f"{group}.{name}": value for group in GROUPS for name, value in read_state_dict(path, key=group).items()}


def is_pretraining(state: Mapping[str, Tensor]) -> bool:
    """Whether a flat state dict carries the names of the reference's pre-training model."""
    return any(name.startswith(("cross_encoder.", "radar_encoder.linear_input")) for name in state)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of `Encoders` that a released state dict implies (all but the heads, which leave no trace).

    Raises:
        ValueError: entries that would tell are missing.
    """
    try:
        dim, radar_values = state["s1_encoder.linear_input.weight"].shape
        optical_values = state["s2_encoder.linear_input.weight"].shape[1]
    except KeyError as err:
        found = sorted({name.partition(".")[0] for name in state})
        raise ValueError(f"expected the groups {sorted(GROUPS)} of a CROMA checkpoint, found {found[:8]}; {err} is missing") from err
    depths = {
        group: 1 + max((int(m[1]) for name in state if (m := re.match(rf"{group}\.(?:transformer\.)?layers\.(\d+)\.", name))), default=-1)
        for group in ("s1_encoder", "s2_encoder", "joint_encoder")
    }
    # 12 optical and 2 radar bands in all releases; another patch changes both counts alike
    patch = round((radar_values / 2) ** 0.5)
    return {
        "embed_dim": dim,
        "depth": depths["s2_encoder"],
        "radar_depth": depths["s1_encoder"],
        "joint_depth": depths["joint_encoder"],
        "patch_size": patch,
        "radar_channels": radar_values // patch**2,
        "optical_channels": optical_values // patch**2,
    }


def load_encoders(source: str | Path | Mapping[str, Tensor], *, num_heads: int = 16, **changes: Any) -> Encoders:
    """Encoders from an official checkpoint (released, prefixed or pre-training layout), its state dict, or any run folder of ours.

    Args:
        num_heads: of an official checkpoint (16 in every release); a run folder knows its own.
        changes: further arguments of `Encoders` ("positions", "checkpointing"), and sizes to insist on.
    Raises:
        FileNotFoundError: nothing there.
        ValueError: names or shapes that do not fit; the message gives the sizes found in the file.
    """
    origin = "state dict" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_dir():
            config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
            if "encoders" not in config and "decoder_dim" not in config:
                return load_model(Encoders, path, **changes)
            model = Encoders(**{**(config.get("encoders") or {}), **changes})
            own = {name: value for name, value in read_state_dict(path / "model.safetensors").items() if name.startswith("encoders.")}
            load_into(model, own, rename=lambda name: name.removeprefix("encoders."), origin=origin)
            return model
    state = dict(source) if isinstance(source, Mapping) else read_checkpoint(source)
    if is_pretraining(state):
        state = {new: value for name, value in state.items() if (new := released_name(name)) is not None}
    found = {**sizes_of(state), "num_heads": num_heads}
    model = Encoders(**{**found, **changes})
    load_into(model, state, rename=our_name, origin=f"{origin} (width {found['embed_dim']}, optical depth {found['depth']})")
    return model


def load_pretraining(model: CROMA, source: str | Path | Mapping[str, Tensor], *, resume: bool = False) -> list[str]:
    """Put a checkpoint into a pre-training model: all of it, or the encoders alone where the file holds no more or is a run folder.

    Args:
        resume: insist on decoder and projections.
    Returns:
        names of our parameters that the file did not hold and that start fresh.
    Raises:
        ValueError: the file does not fit, or `resume` with encoders only.
    """
    origin = "state dict" if isinstance(source, Mapping) else str(source)
    folder = not isinstance(source, Mapping) and Path(source).is_dir()
    state = load_encoders(source).state_dict() if folder else dict(source) if isinstance(source, Mapping) else read_checkpoint(source)
    if is_pretraining(state) and any(name.startswith("decoder.") for name in state):
        load_into(model, state, rename=our_pretraining_name, unused=["decoder.decoder_pos_embed"], origin=origin)
        return []
    if resume:
        raise ValueError(
            f"{origin}: file holds encoders only; decoder and projections start fresh: pass --init instead of resuming pre-training from it"
        )
    if folder:
        load_into(model.encoders, state, origin=origin)
    else:
        if is_pretraining(state):
            state = {new: value for name, value in state.items() if (new := released_name(name)) is not None}
        sizes = sizes_of(state)
        load_into(model.encoders, state, rename=our_name, origin=f"{origin} (width {sizes['embed_dim']}, optical depth {sizes['depth']})")
    return [name for name in model.state_dict() if not name.startswith("encoders.")]


def released_state(model: Encoders) -> dict[str, dict[str, Tensor]]:
    """The five state dicts of the release, from our encoders: `torch.save` of it is a file that other readers of CROMA accept."""
    back = {ours: name for name in _released_names(model) if (ours := our_name(name)) is not None}
    out: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for ours, value in model.state_dict().items():
        group, _, rest = back[ours].partition(".")
        out[group][rest] = value
    return out


def _released_names(model: Encoders) -> list[str]:
    attn = ["to_qkv.weight", "to_out.weight", "to_out.bias", "input_norm.weight", "input_norm.bias"]
    cross = ["to_q.weight", "to_k.weight", "to_v.weight", *attn[1:]]
    ffn = ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias", "input_norm.weight", "input_norm.bias"]
    names = []
    for group, encoder in (("s1_encoder", model.radar_encoder), ("s2_encoder", model.optical_encoder)):
        names += [f"{group}.linear_input.weight", f"{group}.linear_input.bias"]
        for i in range(len(encoder.stack.layers)):
            names += [f"{group}.transformer.layers.{i}.{j}.{part}" for j, parts in enumerate((attn, ffn)) for part in parts]
        names += [f"{group}.transformer.norm_out.weight", f"{group}.transformer.norm_out.bias"]
    for i in range(len(model.joint_encoder.layers)):
        names += [f"joint_encoder.layers.{i}.{j}.{part}" for j, parts in enumerate((attn, cross, ffn)) for part in parts]
    names += ["joint_encoder.norm_out.weight", "joint_encoder.norm_out.bias"]
    heads = [f"{i}.{part}" for i in (0, 1, 3) for part in ("weight", "bias")]
    return names + [f"{group}.{part}" for group in ("s1_GAP_FFN", "s2_GAP_FFN") for part in heads]


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the released layout (five nested state dicts) of a pre-training checkpoint or of a run folder: `python -m projects.croma.weights in out`."""
    target = Path(target)
    with written_aside(target) as aside:
        torch.save(released_state(load_encoders(source)), aside)
    return target


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 3:
        sys.exit("expected: python -m projects.croma.weights CHECKPOINT_OR_RUN_FOLDER OUT.pt")
    print(convert(sys.argv[1], sys.argv[2]))
