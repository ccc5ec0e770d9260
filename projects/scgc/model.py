"""SCGC and SCGC* (Kulatilleke et al., arXiv 2204.12656): an auto-encoder whose code is clustered under a neighbour-contrastive loss.

Top to bottom: what forward and objective return · auto-encoder · model with centres · soft assignment and target · objective.
The contrastive term is in `contrast.py`, the structure weights in `graph.py`. SCGC* has no decoder and weights that add up 1..R hops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from common.contrastive import gather_rows
from common.engine import mean_over_processes
from projects.scgc.contrast import Structure, contrast
from projects.scgc.features import Features

WIDTHS = (500, 500, 2000)
EMBEDDING = 10


@dataclass
class Code:
    """`z` (N, 10) embeddings; `q` (N, K) soft assignment; `squared_error` 0-d, summed over all N*d entries, or None without a decoder."""

    z: Tensor
    q: Tensor
    squared_error: Tensor | None


@dataclass
class Output:
    """`loss` = alpha * contrast + beta * cluster + reconstruction, all 0-d; `p` (N, K) target, no gradient."""

    loss: Tensor
    contrast: Tensor
    cluster: Tensor
    reconstruction: Tensor | None
    p: Tensor


class AutoEncoder(nn.Module, PyTorchModelHubMixin):
    """Fully connected auto-encoder, ReLU between layers, linear code and output; parameter names are those of SDCN's files.

    Args:
        in_dim: features a node.
        encoder: hidden widths, then the width of the code.
        decoder: hidden widths of the decoder, or None: no decoder, and no parameters of one.
    """

    def __init__(self, in_dim: int, encoder: Sequence[int] = (*WIDTHS, EMBEDDING), decoder: Sequence[int] | None = WIDTHS[::-1]) -> None:
        super().__init__()
        self.in_dim, self.hidden = in_dim, len(encoder) - 1
        self.has_decoder, self.decoder_hidden = decoder is not None, len(decoder or ())
        before = in_dim
        for number, after in enumerate(encoder[:-1], start=1):
            setattr(self, f"enc_{number}", nn.Linear(before, after))
            before = after
        self.z_layer = nn.Linear(before, encoder[-1])
        if decoder is None:
            return
        before = encoder[-1]
        for number, after in enumerate(decoder, start=1):
            setattr(self, f"dec_{number}", nn.Linear(before, after))
            before = after
        self.x_bar_layer = nn.Linear(before, in_dim)

    def hidden_states(self, x: Features) -> list[Tensor]:
        """Hidden layers of the encoder after their ReLU, (N, width) each."""
        if x.shape[1] != self.in_dim:
            raise ValueError(f"features: expected (N, {self.in_dim}), found {tuple(x.shape)}; was the model trained on another data set?")
        states = [F.relu(x.linear(self.enc_1), inplace=True)]  # in place: no backward pass reads what stood there
        for number in range(2, self.hidden + 1):
            states.append(F.relu(getattr(self, f"enc_{number}")(states[-1]), inplace=True))
        return states

    def encode(self, x: Features | Tensor) -> Tensor:
        """(N, code) embeddings; this is all that inference needs."""
        return self.z_layer(self.hidden_states(x if isinstance(x, Features) else Features(x))[-1])

    def decode(self, z: Tensor) -> Tensor:
        """(N, last hidden width): the decoder up to its last layer."""
        for number in range(1, self.decoder_hidden + 1):
            z = F.relu(getattr(self, f"dec_{number}")(z), inplace=True)
        return z

    def reconstruct(self, z: Tensor) -> Tensor:
        """(N, d) features from embeddings."""
        return self.x_bar_layer(self.decode(z))

    def squared_error(self, z: Tensor, x: Features) -> Tensor:
        """0-d: sum of squared differences between reconstruction and features."""
        return x.squared_error(self.decode(z), self.x_bar_layer)

    def forward(self, x: Features) -> Tensor:
        """0-d: sum over all entries of the squared reconstruction error (what pre-training averages)."""
        return self.squared_error(self.encode(x), x)


class SCGC(nn.Module, PyTorchModelHubMixin):
    """Auto-encoder and cluster centres. `decoder=None` makes SCGC*.

    Args:
        in_dim, encoder, decoder: of the auto-encoder.
        clusters: K.
        nu: degrees of freedom of the Student-t kernel (1 in every published run).
    """

    def __init__(
        self,
        in_dim: int,
        clusters: int,
        encoder: Sequence[int] = (*WIDTHS, EMBEDDING),
        decoder: Sequence[int] | None = WIDTHS[::-1],
        nu: float = 1.0,
    ) -> None:
        super().__init__()
        if clusters < 2 or nu <= 0:
            raise ValueError(f"clusters={clusters}, nu={nu}: expected at least 2 clusters and nu above 0")
        self.ae = AutoEncoder(in_dim, encoder, decoder)
        self.cluster_layer = nn.Parameter(nn.init.xavier_normal_(torch.empty(clusters, encoder[-1])))
        self.nu = float(nu)

    def forward(self, x: Features | Tensor, reconstruct: bool = True) -> Code:
        """Embeddings, assignments and, with a decoder, the reconstruction error of the nodes x (N, d)."""
        x = x if isinstance(x, Features) else Features(x)
        z = self.ae.encode(x)
        error = self.ae.squared_error(z, x) if reconstruct and self.ae.has_decoder else None
        return Code(z, soft_assignment(z, self.cluster_layer, self.nu), error)

    @torch.no_grad()
    def predict(self, x: Features | Tensor) -> Tensor:
        """(N,) cluster of each node: its nearest centre."""
        return self(x, reconstruct=False).q.argmax(1)


# -- clustering (DEC) --------------------------------------------------------------------------------------------------


def soft_assignment(z: Tensor, centres: Tensor, nu: float = 1.0) -> Tensor:
    """q_ik: Student-t similarity of embedding i (N, D) and centre k (K, D), (1 + |z_i - mu_k|^2 / nu)^(-(nu+1)/2), rows sum to 1."""
    distance = (z[:, None] - centres).square().sum(2)
    kernel = (1 + distance / nu).pow(-(nu + 1) / 2)
    return kernel / kernel.sum(1, keepdim=True)


@torch.no_grad()
def target(q: Tensor, frequency: Tensor | None = None) -> Tensor:
    """p_ik = (q_ik^2 / f_k) / sum_l (q_il^2 / f_l), no gradient.

    Args:
        q: (N, K). frequency: (K,) column sums of q over ALL nodes; None = q holds all of them.
    """
    weight = q.square() / (q.sum(0) if frequency is None else frequency)
    return weight / weight.sum(1, keepdim=True)


# -- objective ---------------------------------------------------------------------------------------------------------


def objective(
    code: Code,
    structure: Structure,
    *,
    width: int,
    tau: float,
    alpha: float,
    beta: float,
    frequency: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Output:
    """L = alpha L_con + beta L_clu (+ L_rec): means over all nodes of the batch, whichever process they are on.

    Args:
        code: of this process's nodes. structure: their weights against all nodes of the batch.
        width: d, features a node (L_rec is a mean over N*d entries).
        frequency: column sums of q over all nodes of the data set; None = the batch is the data set.
        counts: nodes of each process, in order of rank; None = one process.
    """
    count, place = len(code.z), 0 if counts is None else dist.get_rank()
    if frequency is None:
        frequency = code.q.detach().sum(0)
        if counts is not None:
            dist.all_reduce(frequency)
    p = target(code.q, frequency)
    cluster = mean_over_processes(F.kl_div(code.q.log(), p, reduction="sum"), count)
    if alpha == 0:
        contrastive = torch.zeros_like(cluster)
    elif counts is None:
        contrastive = contrast(code.z, structure, tau).per_row.mean()
    else:
        keys = gather_rows(code.z, "full", counts=counts)
        contrastive = mean_over_processes(contrast(code.z, structure, tau, keys=keys, offset=sum(counts[:place])).per_row.sum(), count)
    loss = alpha * contrastive + beta * cluster
    reconstruction = None
    if code.squared_error is not None:
        reconstruction = mean_over_processes(code.squared_error, count) / width
        loss = loss + reconstruction
    return Output(loss, contrastive, cluster, reconstruction, p)
