"""Checkpoints of the reference, read by name into our models, which keep its parameter names.

Released: `chem/init_weights/pretrained.pth` of the reference's repository (the molecule encoder, a bare state dict). Node and graph models are
saved by the reference as `checkpoint.pt`; those of its `pyg` branch carry other names for the attention layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from common.weights import load_into, read_state_dict

PYG_BRANCH = {".lin_src.": ".fc.", ".att_src": ".attn_l", ".att_dst": ".attn_r"}  # `lin_dst` is a second name of `lin_src`


def reference_name(name: str) -> str:
    """Name in the reference's main branch of a parameter of its `pyg` branch; other names stay."""
    for theirs, ours in PYG_BRANCH.items():
        name = name.replace(theirs, ours)
    return name


def load_reference(
    model: nn.Module, state: Mapping[str, Tensor] | str | Path, *, absent: Sequence[str] = (), unused: Sequence[str] = ()
) -> None:
    """Load a state dict, or the file of one, of the reference's main or `pyg` branch.

    Args:
        absent, unused: patterns of our names that it may lack, and of its names that may stay unread.
    Raises:
        ValueError: names or shapes that do not fit, the first three of each kind with both shapes; a fine-tuned molecule model
            (names with the prefix `gnn.`) is pointed out.
    """
    origin = "state dict" if isinstance(state, Mapping) else str(state)
    content = state if isinstance(state, Mapping) else read_state_dict(state)
    if any(name.startswith("gnn.") for name in content) and not any(name.startswith("gnn.") for name in model.state_dict()):
        origin += " (its names begin with gnn.: a fine-tuned molecule model; load it into Classifier, or strip the prefix)"
    load_into(model, content, rename=reference_name, absent=absent, unused=[*unused, "*.lin_dst.weight"], origin=origin)
