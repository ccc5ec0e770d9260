"""G-SimCLR's contrastive stage (arXiv 2009.12007): SimCLR with a three-layer head on batches chosen by `batches.py`.

Encoder, projection head, NT-Xent, in this order; `autoencoder.py` and `pseudo_labels.py` come before it, `augment.py` makes the two views. The
method changes nothing here: guided and plain SimCLR differ in their batches alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.contrastive import Gather, nt_xent, projection_head, unit
from projects.g_simclr.encoders import Name, build, glorot_uniform, pooled, without_cancelled_biases

PROBES = ("P1", "P2", "P3")


@dataclass
class Output:
    """`loss`: 0-d NT-Xent. `alignment`: 0-d mean cosine of the two views of an image. `first`, `second`: (B, D) unit projections."""

    loss: Tensor
    alignment: Tensor
    first: Tensor
    second: Tensor


class GSimCLR(nn.Module, PyTorchModelHubMixin):
    """Encoder and projection head under NT-Xent.

    Args:
        encoder: name, see `encoders.build`, as are channels, blocks, width and cifar_stem.
        head: widths of the head's layers, ReLU between them, no batch norm.
        temperature: of the softmax.
        channels_last: memory layout of images and kernels; a fifth faster on a CPU, where torch then sums batch statistics less exactly
            (its relative error grows from 1e-8 to 1e-6 or so in float32, which nobody but a parity test notices).
    Raises:
        ValueError: a temperature that is not positive, or a head of one layer.
    """

    def __init__(
        self,
        encoder: Name = "cifar-resnet",
        channels: int = 3,
        blocks: int = 4,
        width: int = 64,
        cifar_stem: bool = True,
        head: Sequence[int] = (256, 128, 50),
        temperature: float = 0.1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a positive number")
        if len(head) < 2:
            raise ValueError(f"head={tuple(head)}: expected two layers at least")
        self.temperature = temperature
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = build(encoder, channels=channels, blocks=blocks, width=width, cifar_stem=cifar_stem)
        self.head = projection_head((self.encoder.dim, *head))
        self.head.apply(glorot_uniform)
        without_cancelled_biases(self.encoder)
        self.to(memory_format=self.layout)

    def project(self, images: Tensor) -> Tensor:
        """z, before it is normalised: (B, C, H, W) -> (B, head[-1])."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """h, the encoder's pooled output: (B, C, H, W) -> (B, dim)."""
        return pooled(self.encoder(images.contiguous(memory_format=self.layout)))

    def forward(self, first: Tensor, second: Tensor, gather: Gather | None = "full") -> Output:
        """NT-Xent of two views (B, C, H, W) each of the same images.

        The views pass the encoder one after the other: batch norms see one view at a time and move their statistics twice.

        Args:
            gather: where negatives come from with several processes, see `common.contrastive`.
        """
        a, b = unit(self.project(first)), unit(self.project(second))
        loss = nt_xent(a, b, 1 / self.temperature, gather=gather)
        return Output(loss, (a.detach() * b.detach()).sum(1).mean(), a, b)

    def probes(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the linear probes: P3 = h, P2 after the head's first layer and ReLU, P1 after its last hidden one."""
        h = self.features(images)
        p2 = self.head[:2](h)
        return {"P1": self.head[2:-1](p2), "P2": p2, "P3": h}
