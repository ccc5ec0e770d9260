"""What Regularized Auto-Encoders Learn from the Data-Generating Distribution (Alain & Bengio, ICLR 2013; JMLR 15, 2014).

An auto-encoder r(x) trained with squared error and noise of standard deviation sigma (DAE), or with a penalty on the Jacobian of the
reconstruction (RCAE), learns the score of the data density: (r(x) - x) / sigma^2 -> d log p(x) / dx, and its Jacobian the Hessian of log p.
Here: the network in its plain and its residual form, the criteria (Sec. 3.1), the estimates read off r. Closed-form densities are in
densities.py, exact optima in optima.py, energy differences and the Metropolis-Hastings sampler in sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

Criterion = Literal["dae", "rcae", "cae", "score_matching"]
Penalty = Literal["auto", "closed_form", "exact", "hutchinson"]
Field = Callable[[Tensor], Tensor]
EXACT_LIMIT = 256
"""Largest dimension for which the exact Jacobian penalty is computed by automatic differentiation."""


@dataclass
class Terms:
    """A criterion and its parts, each 0-d: sums over dimensions, means over examples."""

    loss: Tensor
    """reconstruction + weight * penalty, over sigma^2 where `scaled` was asked."""
    reconstruction: Tensor
    """mean ||r - x||^2, not scaled."""
    penalty: Tensor
    """mean squared Frobenius norm (DAE: 0; score matching: trace of the score's Jacobian), not weighted."""


class AutoEncoder(nn.Module, PyTorchModelHubMixin):
    """r(x) = net(x), or x + sigma^2 net(x) in the residual form, where net is the score itself.

    Args:
        dim: d, dimension of the data.
        hidden: widths of the hidden layers; the paper has one.
        activation: of the hidden layers.
        residual: residual form; much better conditioned for small sigma.
        sigma: standard deviation of the training noise in data units (RCAE: root of the penalty's weight). Recorded in config.json, since the
            score is (r - x) / sigma^2; None: not recorded, then only the direction of the score is defined (R9).
        output: "identity", "tanh" or "sigmoid" on the last layer; "tanh" is multiplied by `output_scale` (the author's scripts: 2).
        init: "uniform": weights in (-1, 1), biases in (-0.1, 0.1), the author's; "torch": torch's default; "normal": weights, biases and last
            weights N(0, init_stds^2): units whose steps are as narrow as the data's curves, and spread over the data.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128,),
        activation: Literal["tanh", "sigmoid", "silu"] = "tanh",
        residual: bool = False,
        sigma: float | None = None,
        output: Literal["identity", "tanh", "sigmoid"] = "identity",
        output_scale: float = 1.0,
        init: Literal["torch", "uniform", "normal"] = "torch",
        init_stds: Sequence[float] = (10.0, 3.0, 0.1),
    ) -> None:
        super().__init__()
        if dim < 1 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"auto-encoder: expected dim >= 1 and at least one hidden layer of width >= 1, found dim={dim}, hidden={list(hidden)}"
            )
        if sigma is not None and not sigma > 0:
            raise ValueError(f"sigma={sigma}: expected a positive noise level")
        if residual and (sigma is None or output != "identity"):
            raise ValueError(f"residual form: expected a sigma and an identity output, found sigma={sigma}, output={output}")
        self.dim, self.sigma, self.residual = dim, sigma, residual
        self.activation, self.output, self.output_scale = activation, output, output_scale
        widths = [dim, *hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        if init == "uniform":
            for layer in self.layers:
                nn.init.uniform_(layer.weight, -1.0, 1.0)
                nn.init.uniform_(layer.bias, -0.1, 0.1)
        elif init == "normal":
            for layer in self.layers[:-1]:
                nn.init.normal_(layer.weight, std=init_stds[0])
                nn.init.normal_(layer.bias, std=init_stds[1])
            nn.init.normal_(self.layers[-1].weight, std=init_stds[2])
            nn.init.zeros_(self.layers[-1].bias)

    def encode(self, x: Tensor) -> Tensor:
        """f(x): (B, d) to the last hidden layer (B, h)."""
        for layer in list(self.layers)[:-1]:
            x = ACTIVATIONS[self.activation][0](layer(x))
        return x

    def net(self, x: Tensor) -> Tensor:
        """(B, d) to (B, d): g(f(x)), without the residual path."""
        out = self.layers[-1](self.encode(x))
        return out if self.output == "identity" else self.output_scale * out.tanh() if self.output == "tanh" else out.sigmoid()

    def reconstruct(self, x: Tensor) -> Tensor:
        """r(x), (B, d)."""
        return x + self._sigma() ** 2 * self.net(x) if self.residual else self.net(x)

    def _sigma(self) -> float:
        if self.sigma is None:
            raise ValueError(
                "sigma unknown: only the direction is defined; use displacement(), or build the model with the sigma it was trained with"
            )
        return self.sigma

    def displacement(self, x: Tensor) -> Tensor:
        """r(x) - x, (B, d): the score up to a positive factor (R9)."""
        return self.reconstruct(x) - x

    def score(self, x: Tensor) -> Tensor:
        """(r(x) - x) / sigma^2, (B, d): the estimate of d log p / dx; minus it is the gradient of the energy.

        Raises:
            ValueError: the model does not know the noise it was trained with.
        """
        sigma = self._sigma()
        return self.net(x) if self.residual else self.displacement(x) / sigma**2

    def forward(
        self,
        x: Tensor,
        *,
        criterion: Criterion = "dae",
        noise: Tensor | None = None,
        penalty: Penalty = "auto",
        probes: Tensor | None = None,
        weight: float | None = None,
        scaled: bool = True,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """The criterion on a batch (Sec. 3.1).

        Args:
            x: (B, d) clean examples.
            criterion: dae: E||r(x + noise) - x||^2. rcae: E[||r(x) - x||^2 + sigma^2 ||dr/dx||_F^2]. cae: the classical penalty, on the encoder's
                Jacobian instead, not covered by the theorems. score_matching: E[|s|^2 / 2 + trace ds/dx], the limit sigma -> 0 (R7).
            noise: (B, d), already scaled by sigma; drawn from `generator` when not given.
            penalty: how ||dr/dx||_F^2 is computed, see `jacobian_penalty`.
            probes: (B, d) of +-1 for the Hutchinson estimate; drawn when not given.
            weight: of the penalty, default sigma^2.
            scaled: divide the loss by sigma^2: then the identity gives d with the DAE, and a perfect DAE on a k-dimensional manifold tends to k.
        """
        sigma = self._sigma()
        zero = x.new_zeros(())
        if criterion == "score_matching":
            score = self.score(x)
            trace = batch_jacobian(self.score, x).diagonal(dim1=1, dim2=2).sum(1).mean()
            return Terms(0.5 * score.square().sum(1).mean() + trace, self.displacement(x).square().sum(1).mean(), trace)
        if criterion == "dae":
            noise = sigma * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) if noise is None else noise
            error, extra = nn.functional.mse_loss(self.reconstruct(x + noise), x, reduction="sum") / len(x), zero
        elif criterion == "rcae":
            if penalty == "hutchinson" and probes is None:
                probes = torch.randint(0, 2, x.shape, device=x.device, generator=generator).to(x) * 2 - 1
            error, extra = self.displacement(x).square().sum(1).mean(), jacobian_penalty(self, x, penalty, probes)
        else:
            error, extra = self.displacement(x).square().sum(1).mean(), encoder_penalty(self, x)
        loss = error + (sigma**2 if weight is None else weight) * extra
        return Terms(loss / sigma**2 if scaled else loss, error, extra)


# ---- Jacobians --------------------------------------------------------------------------------------------------------------------


def _tanh_slope(pre: Tensor) -> Tensor:
    return 1 - pre.tanh().square()


def _sigmoid_slope(pre: Tensor) -> Tensor:
    value = pre.sigmoid()
    return value * (1 - value)


def _silu_slope(pre: Tensor) -> Tensor:
    value = pre.sigmoid()
    return value * (1 + pre * (1 - value))


ACTIVATIONS: dict[str, tuple[Field, Field]] = {
    "tanh": (torch.tanh, _tanh_slope),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "silu": (nn.functional.silu, _silu_slope),
}
"""Name to function and derivative."""


def batch_jacobian(function: Field, x: Tensor) -> Tensor:
    """(B, d) to (B, m, d): Jacobian of a row-wise function, one vector-Jacobian product an output dimension, all at once; differentiable."""
    out, pull = torch.func.vjp(function, x)
    basis = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
    rows = torch.func.vmap(lambda row: pull(row.expand_as(out))[0])(basis)
    return rows.transpose(0, 1)


def _closed_form(model: AutoEncoder) -> bool:
    return len(model.layers) == 2 and model.output == "identity"


def jacobian_penalty(model: AutoEncoder, x: Tensor, penalty: Penalty = "auto", probes: Tensor | None = None) -> Tensor:
    """mean ||dr/dx||_F^2 over the batch, 0-d, differentiable in the parameters: the RCAE penalty.

    Args:
        penalty: closed_form: one hidden layer, identity output: ||V D W||_F^2 = a^T G a with a the activation's slopes and
            G = (V^T V) * (W W^T), no d-fold cost. exact: d vector-Jacobian products. hutchinson: ||(dr/dx) probe||^2 by one
            Jacobian-vector product, unbiased. auto: closed form where there is one, else exact.
        probes: (B, d) of +-1, for hutchinson.
    Raises:
        ValueError: the exact penalty in more than 256 dimensions, a closed form that does not exist, or no probes.
    """
    if penalty == "auto":
        penalty = "closed_form" if _closed_form(model) else "exact"
    if penalty == "closed_form":
        if not _closed_form(model):
            raise ValueError(
                f"closed-form penalty: expected one hidden layer and an identity output, found {len(model.layers) - 1} and {model.output}; use penalty=exact"
            )
        first, last = model.layers[0], model.layers[1]
        slope = ACTIVATIONS[model.activation][1](first(x))
        gram = (last.weight.mT @ last.weight) * (first.weight @ first.weight.mT)
        value = ((slope @ gram) * slope).sum(1).mean()
        if not model.residual:
            return value
        scale = model._sigma() ** 2  # J = I + sigma^2 V D W
        trace = (slope * (first.weight * last.weight.mT).sum(1)).sum(1).mean()
        return model.dim + 2 * scale * trace + scale**2 * value
    if penalty == "exact":
        if model.dim > EXACT_LIMIT:
            raise ValueError(
                f"exact Jacobian penalty in {model.dim} dimensions: expected at most {EXACT_LIMIT}; use penalty=hutchinson, which is unbiased"
            )
        return batch_jacobian(model.reconstruct, x).square().sum((1, 2)).mean()
    if probes is None or probes.shape != x.shape:
        raise ValueError(
            f"hutchinson: expected probes of +-1 of shape {tuple(x.shape)}, found {None if probes is None else tuple(probes.shape)}"
        )
    return torch.func.jvp(model.reconstruct, (x,), (probes,))[1].square().sum(1).mean()


def encoder_penalty(model: AutoEncoder, x: Tensor) -> Tensor:
    """mean ||df/dx||_F^2, 0-d: the penalty of the classical contractive auto-encoder, for comparison."""
    if len(model.layers) == 2:
        first = model.layers[0]
        slope = ACTIVATIONS[model.activation][1](first(x))
        return (slope.square() @ first.weight.square().sum(1)).mean()
    basis = torch.eye(model.dim, dtype=x.dtype, device=x.device)
    columns = torch.func.vmap(lambda v: torch.func.jvp(model.encode, (x,), (v.expand_as(x),))[1])(basis)  # fewer inputs than hidden units
    return columns.square().sum((0, 2)).mean()


def second_order_term(function: Field, x: Tensor) -> Tensor:
    """mean of (r(x) - x) . laplacian r(x), 0-d: E_noise[DAE] = RCAE + sigma^2 * this + O(sigma^4) for a given r (R3)."""
    basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def along(v: Tensor) -> Tensor:
        direction = v.expand_as(x)
        return torch.func.jvp(lambda y: torch.func.jvp(function, (y,), (direction,))[1], (x,), (direction,))[1]

    return ((function(x) - x) * torch.func.vmap(along)(basis).sum(0)).sum(1).mean()


# ---- estimates --------------------------------------------------------------------------------------------------------------------


@dataclass
class HessianEstimate:
    value: Tensor
    """(B, d, d) symmetrised (J - I) / sigma^2: estimate of the Hessian of log p."""
    asymmetry: Tensor
    """(B,) ||J - J^T|| / ||J||: a trained r need not be a gradient field, the optimum is one."""


def hessian_estimate(function: Field, x: Tensor, sigma: float | None) -> HessianEstimate:
    """Hessian of log p read off the Jacobian J of a reconstruction function (R2).

    Raises:
        ValueError: sigma is None.
    """
    if sigma is None:
        raise ValueError("sigma unknown: only the direction is defined; the Hessian needs the sigma of training")
    jacobian = batch_jacobian(function, x)
    asymmetry = (jacobian - jacobian.mT).flatten(1).norm(dim=1) / jacobian.flatten(1).norm(dim=1)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return HessianEstimate((0.5 * (jacobian + jacobian.mT) - eye) / sigma**2, asymmetry)
