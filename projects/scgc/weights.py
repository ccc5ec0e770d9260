"""SDCN's pre-trained auto-encoders (`<name>.pkl`: 16 tensors named enc_1.weight ... x_bar_layer.bias) and reference state dicts of SCGC."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.weights import load_into, read_state_dict
from projects.scgc.model import SCGC, AutoEncoder

DECODER = ("dec_*", "x_bar_layer.*")


def load_autoencoder(model: AutoEncoder, source: str | Path | Mapping[str, Tensor]) -> None:
    """Put the weights of a file, or of a state dict, into `model`; an encoder alone leaves the decoder's entries unread.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another data set's or model's weights (missing, surplus and mis-shaped names are listed), or a file that would run code.
    """
    state = source if isinstance(source, Mapping) else read_state_dict(source)
    origin = "auto-encoder" if isinstance(source, Mapping) else f"auto-encoder {source}"
    load_into(model, state, unused=() if model.has_decoder else DECODER, origin=origin)


def load_reference(model: SCGC, state: Mapping[str, Tensor]) -> None:
    """The reference's clustering state dict: `ae.` before the auto-encoder's names, and `cluster_layer`."""
    unused = () if model.ae.has_decoder else tuple(f"ae.{name}" for name in DECODER)
    load_into(model, state, unused=unused, origin="SCGC state dict")
