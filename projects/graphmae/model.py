"""GraphMAE: self-supervised masked graph autoencoder (Hou et al., KDD 2022), node and graph tasks. Read top to bottom beside Sec. 3.

Covered: masking with a learned token and random substitution, GNN encoder, re-masking, GNN or MLP decoder, scaled cosine error, edge
dropping, and every switch of the paper's ablations. The molecule model, which the reference keeps apart, is in `molecule.py`; the layers
and their two paths (plain, efficient) are in `layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from projects.graphmae.layers import DotGATLayer, GATLayer, GCNLayer, GINLayer, Graph, Path, PReLU, dropout, keep_mask

Kind = Literal["gat", "dotgat", "gin", "gcn"]
# the name under which the reference's modules hold their layers
LAYERS = {"gat": "gat_layers", "dotgat": "gat_layers", "gin": "layers", "gcn": "gcn_layers"}


# -- masks (Sec. 3.2 "masked feature reconstruction") ------------------------------------------------------------------


@dataclass(frozen=True)
class Masks:
    """Node numbers (int64). Token and noise nodes lie in `mask_nodes`; truncation can leave a masked node in neither, its features unchanged."""

    mask_nodes: Tensor
    token_nodes: Tensor
    noise_nodes: Tensor
    noise_source_nodes: Tensor


def draw_masks(
    nodes: int,
    mask_rate: float,
    replace_rate: float,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    permutations: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
) -> Masks:
    """Choose the masked nodes of a whole graph, or of a whole batch of graphs, and what stands in their place (exact counts, no replacement).

    Args:
        mask_rate: trunc(mask_rate · nodes) nodes are masked.
        replace_rate: of these trunc(replace_rate · masked) take another node's features and trunc((1 - replace_rate) · masked) the token.
        permutations: of the nodes, of the masked ones, of the nodes again; given by tests, else drawn from `generator`.
    Raises:
        ValueError: no node, or every node, would be masked; a rate out of range.
    """
    if not 0 <= replace_rate < 1:
        raise ValueError(f"replace_rate={replace_rate}: expected 0 <= replace_rate < 1")
    masked = int(mask_rate * nodes)
    if not 0 < masked < nodes:
        raise ValueError(f"mask_rate={mask_rate} masks {masked} of {nodes} nodes; expected at least one masked and one visible node")

    def permutation(which: int, count: int) -> Tensor:
        given = permutations[which] if permutations else None
        return torch.randperm(count, generator=generator, device=device) if given is None else given.long().to(device)

    mask_nodes = permutation(0, nodes)[:masked]
    none = mask_nodes[:0]
    if replace_rate == 0:
        return Masks(mask_nodes, mask_nodes, none, none)
    tokens, noise = int((1 - replace_rate) * masked), int(replace_rate * masked)
    order = permutation(1, masked)
    if noise == 0:  # the reference crashes here: a slice of its last "minus zero" nodes is all of them
        return Masks(mask_nodes, mask_nodes[order[:tokens]], none, none)
    return Masks(mask_nodes, mask_nodes[order[:tokens]], mask_nodes[order[-noise:]], permutation(2, nodes)[:noise])


def _checked(
    nodes: int, mask_nodes: Tensor, token_nodes: Tensor | None, noise_nodes: Tensor | None, noise_source_nodes: Tensor | None
) -> Masks:
    """Index sets given by the caller, int64; what is left out: every masked node takes the token, none is replaced."""
    none = mask_nodes[:0]
    sets = {"mask_nodes": mask_nodes, "token_nodes": token_nodes, "noise_nodes": noise_nodes, "noise_source_nodes": noise_source_nodes}
    if noise_nodes is not None and token_nodes is None:
        raise ValueError("noise_nodes were given without token_nodes; give both, or neither")
    sets |= {"token_nodes": mask_nodes if token_nodes is None else token_nodes}
    sets = {name: (none if given is None else given).long() for name, given in sets.items()}
    for name, given in sets.items():
        if len(given) and (int(given.min()) < 0 or int(given.max()) >= nodes):
            raise ValueError(f"{name}: expected node numbers 0 to {nodes - 1}, found {int(given.min())} to {int(given.max())}")
        if name != "noise_source_nodes" and len(given.unique()) != len(given):
            raise ValueError(f"{name}: expected each node once, found {len(given) - len(given.unique())} repeated")
    masks = Masks(**sets)
    if not 0 < len(masks.mask_nodes) < nodes:
        raise ValueError(f"mask_nodes: {len(masks.mask_nodes)} of {nodes} nodes; expected at least one masked and one visible node")
    for name in ("token_nodes", "noise_nodes"):
        outside = int((~torch.isin(sets[name], masks.mask_nodes)).sum())
        if outside:
            raise ValueError(f"{name}: {outside} of {len(sets[name])} are not in mask_nodes")
    both = int(torch.isin(masks.token_nodes, masks.noise_nodes).sum())
    if both:
        raise ValueError(f"token_nodes and noise_nodes: expected disjoint sets, found {both} nodes in both")
    if len(masks.noise_nodes) != len(masks.noise_source_nodes):
        raise ValueError(
            f"noise_nodes and noise_source_nodes: expected equal lengths, found {len(masks.noise_nodes)} and {len(masks.noise_source_nodes)}"
        )
    return masks


# -- loss (Sec. 3.2 "scaled cosine error", eq. 2) ----------------------------------------------------------------------


class _Cosine(torch.autograd.Function):
    """Cosine of each row of `prediction` (M, d) with rows of length one or zero, `unit` (M, d): one pass forward, one back."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, unit: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(prediction, dim=1)
        dot = torch.bmm(prediction[:, None], unit[:, :, None]).flatten()
        cosine = dot / norm.clamp(min=1e-12)
        ctx.save_for_backward(prediction, unit, norm, cosine)
        return cosine

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        prediction, unit, norm, cosine = ctx.saved_tensors
        inverse = 1 / norm.clamp(min=1e-12)
        along = torch.where(norm >= 1e-12, -grad * cosine * inverse * inverse, torch.zeros_like(grad))
        return torch.addcmul(unit * (grad * inverse)[:, None], prediction, along[:, None]), None


def sce(prediction: Tensor, target: Tensor, gamma: float = 1.0, *, unit: bool = False) -> Tensor:
    """Scaled cosine error: mean over rows of (1 - cos)^gamma.

    Args:
        prediction, target: (M, d); norms are taken as at least 1e-12, so a zero row has cosine 0 and its term is 1.
        gamma: >= 1; larger weighs easy rows down.
        unit: the target's rows have length one or zero already.
    """
    if gamma < 1:
        raise ValueError(f"gamma={gamma}: expected gamma >= 1")
    dtype = prediction.dtype if prediction.dtype == torch.float64 else torch.float32
    target = target if unit else F.normalize(target, dim=1)
    return (1 - _Cosine.apply(prediction.to(dtype), target.to(dtype))).pow(gamma).mean()


# -- input -------------------------------------------------------------------------------------------------------------


class Features:
    """Node features with what stays the same from step to step: rows of length one (the loss's targets) and, for a bag of words, the stored values.

    dense: (N, d); unit: (N, d) l2-normalised, zero rows stay zero; sparse: CSR (start (N + 1,), column (nnz,), value (nnz,)) or None.
    """

    def __init__(self, dense: Tensor, *, sparse_below: float = 0.1) -> None:
        """sparse_below: share of non-zeros under which the values are kept as a sparse matrix too."""
        self.dense = dense
        self.unit = F.normalize(dense, dim=1)
        self.sparse: tuple[Tensor, Tensor, Tensor] | None = None
        if dense.numel() and float(dense.count_nonzero()) / dense.numel() < sparse_below and dense.shape[1] >= 64:
            row, column = dense.nonzero(as_tuple=True)
            start = torch.zeros(len(dense) + 1, dtype=torch.int64, device=dense.device)
            start[1:] = torch.bincount(row, minlength=len(dense)).cumsum(0)
            self.sparse = start, column, dense[row, column]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Features:
        moved = object.__new__(Features)
        moved.dense, moved.unit = self.dense.to(device, non_blocking=non_blocking), self.unit.to(device, non_blocking=non_blocking)
        moved.sparse = None if self.sparse is None else tuple(part.to(device, non_blocking=non_blocking) for part in self.sparse)  # type: ignore[assignment]
        return moved


def check_features(x: Tensor) -> None:
    """Refuse features that cannot be learned from.

    Raises:
        ValueError: not (N, d), not floating point, not finite, or all zero.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"features: expected floating point (N, d), found {tuple(x.shape)} {x.dtype}")
    bad = ~x.isfinite()
    if bad.any():
        raise ValueError(f"features: {int(bad.any(0).sum())} columns and {int(bad.any(1).sum())} rows hold values that are not finite")
    if not x.any():
        raise ValueError(f"features: all {len(x)} rows are zero; a cosine needs at least one that is not")


class _SparseMap(torch.autograd.Function):
    """Sparse rows (R, d), given as CSR, times weight (out, d) transposed; gradient to the weight only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, start: Tensor, column: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(start, column, value)
        ctx.size = weight.shape[1]
        return torch.sparse_csr_tensor(start, column, value, (len(start) - 1, ctx.size), check_invariants=False) @ weight.t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        start, column, value = ctx.saved_tensors
        # the same three arrays are the transposed matrix, by columns
        turned = torch.sparse_csc_tensor(start, column, value, (ctx.size, len(start) - 1), check_invariants=False)
        return (turned @ grad.contiguous()).t(), None, None, None


def map_sparse_rows(features: Features, weight: Tensor, row_source: Tensor, token: Tensor, p: float, training: bool) -> Tensor:
    """dropout(X~) W^T without the dense X~: stored values of the visible and replaced rows; of the token rows only the kept entries differ.

    Args:
        weight: (out, d).
        row_source: (N,) the node whose features stand in each row, -1 for the token.
        token: (1, d).
    Returns:
        (N, out).
    """
    if features.sparse is None:
        raise ValueError("features: expected a sparse form, found none; they are too dense for it")
    start, column, value = features.sparse
    live, hidden = (row_source >= 0).nonzero().flatten(), (row_source < 0).nonzero().flatten()
    rows = row_source[live]
    count = start.diff()[rows]
    begin = torch.cat([count.new_zeros(1), count.cumsum(0)])
    place = torch.arange(int(begin[-1]), device=begin.device) + (start[rows] - begin[:-1]).repeat_interleave(count)
    value = dropout(value[place], p, training).to(weight.dtype)
    out = weight.new_empty(len(row_source), len(weight))
    out.index_copy_(0, live, _SparseMap.apply(weight, begin.int(), column[place].int(), value))
    if len(hidden):
        weighted = weight * token.to(
            weight.dtype
        )  # token row i is (token * keep_i) W^T = keep_i (W * token)^T: no gradient to keep_i is due
        if training and p > 0:
            keep = keep_mask((len(hidden), weight.shape[1]), p, weight.device, weight.dtype)
            out.index_copy_(0, hidden, F.linear(keep, weighted))
        else:
            out.index_copy_(0, hidden, weighted.sum(1).expand(len(hidden), -1))
    return out


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """Every intermediate result, of the plain path: masked_x (N, d), hidden: a layer's output (N, h) each, code (N, h) before re-masking, reconstruction (N, d)."""

    masked_x: Tensor
    hidden: list[Tensor]
    code: Tensor
    reconstruction: Tensor


@dataclass
class Output:
    """loss (0-d); mask_nodes (M,) rising; prediction (M, d) of these nodes' features."""

    loss: Tensor
    mask_nodes: Tensor
    prediction: Tensor
    trace: Trace | None = None


class Stack(nn.Module):
    """Layers of one family, held under the reference's name."""

    def __init__(self, kind: Kind, layers: list[nn.Module]) -> None:
        super().__init__()
        self.kind = kind
        setattr(self, LAYERS[kind], nn.ModuleList(layers))

    @property
    def layers_(self) -> nn.ModuleList:
        return getattr(self, LAYERS[self.kind])


def _layer(
    kind: Kind,
    in_dim: int,
    out_dim: int,
    heads: int,
    *,
    feat_drop: float,
    attn_drop: float,
    negative_slope: float,
    norm: str | None,
    act: str | None,
    residual: bool,
    outer: bool,
) -> nn.Module:
    """outer: with norm and activation after the layer (encoder), or without (decoder)."""
    if kind in ("gat", "dotgat"):
        cls = GATLayer if kind == "gat" else DotGATLayer
        ends = {"norm": norm if outer else None, "act": act if outer else None}
        return cls(
            in_dim, out_dim, heads, feat_drop=feat_drop, attn_drop=attn_drop, negative_slope=negative_slope, residual=residual, **ends
        )
    if kind == "gcn":
        return GCNLayer(in_dim, out_dim, feat_drop=feat_drop, residual=residual, norm=norm if outer else None, act=act if outer else None)
    raise ValueError(f"kind={kind!r}: expected one of {list(LAYERS)}")


class GraphMAE(nn.Module, PyTorchModelHubMixin):
    """Masked graph autoencoder. Defaults are those of Cora.

    Args:
        in_dim: width of the node features.
        encoder, decoder: family; the decoder is one layer, or `mlp` or `linear`, which see one node each and are never re-masked.
        hidden: width of each encoder layer's output (all heads together).
        layers: encoder layers.
        heads: attention heads of the encoder (GAT and DotGAT; `hidden` is a multiple).
        decoder_heads: 1; heads of the decoder would be concatenated into its output.
        norm: after each encoder layer; None, layernorm or batchnorm.
        in_drop, attn_drop: dropout of each layer's input and of the attention weights, encoder and decoder.
        mask_rate, replace_rate: shares of nodes masked, and of these replaced by another node's features.
        drop_edge_rate: share of edges that the encoder does not see in training.
        loss: scaled cosine error (`gamma` its power) or mean squared error.
        mask: False: nothing is masked, every node is reconstructed (ablation "w/o mask").
        remask: False: the decoder sees the masked nodes' codes (ablation "w/o re-mask").
        concat_hidden: the decoder gets all layers' outputs side by side.
    Raises:
        ValueError: an unknown name, or numbers that do not fit each other.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        encoder: Kind = "gat",
        decoder: Literal["gat", "dotgat", "gin", "gcn", "mlp", "linear"] = "gat",
        hidden: int = 512,
        layers: int = 2,
        heads: int = 4,
        decoder_heads: int = 1,
        activation: Literal["prelu", "relu", "gelu", "elu"] = "prelu",
        negative_slope: float = 0.2,
        norm: Literal["layernorm", "batchnorm"] | None = None,
        residual: bool = False,
        in_drop: float = 0.2,
        attn_drop: float = 0.1,
        mask_rate: float = 0.5,
        replace_rate: float = 0.05,
        drop_edge_rate: float = 0.0,
        loss: Literal["sce", "mse"] = "sce",
        gamma: float = 3.0,
        mask: bool = True,
        remask: bool = True,
        concat_hidden: bool = False,
    ) -> None:
        super().__init__()
        if decoder not in (*LAYERS, "mlp", "linear"):
            raise ValueError(f"decoder={decoder!r}: expected one of {[*LAYERS, 'mlp', 'linear']}")
        if loss not in ("sce", "mse"):
            raise ValueError(f"loss={loss!r}: expected sce or mse")
        if gamma < 1:
            raise ValueError(f"gamma={gamma}: expected gamma >= 1")
        if decoder_heads != 1:
            raise ValueError(f"decoder_heads={decoder_heads}: expected 1, heads would be concatenated into the reconstructed features")
        if not 0 < mask_rate < 1:
            raise ValueError(f"mask_rate={mask_rate}: expected 0 < mask_rate < 1; mask=False switches masking off")
        if not 0 <= replace_rate < 1:
            raise ValueError(f"replace_rate={replace_rate}: expected 0 <= replace_rate < 1")
        if not 0 <= drop_edge_rate < 1:
            raise ValueError(f"drop_edge_rate={drop_edge_rate}: expected 0 <= drop_edge_rate < 1")
        self.in_dim, self.hidden, self.in_drop = in_dim, hidden, in_drop
        self.mask_rate, self.replace_rate, self.drop_edge_rate = mask_rate, replace_rate, drop_edge_rate
        self.loss, self.gamma, self.mask, self.remask, self.concat_hidden = loss, gamma, mask, remask, concat_hidden
        drops = {"feat_drop": in_drop, "attn_drop": attn_drop, "negative_slope": negative_slope}
        stack: list[nn.Module] = []
        for level in range(layers):
            width = in_dim if level == 0 else hidden
            if encoder == "gin":  # without a norm the reference leaves the last layer's activation out too
                bare = norm is None and level == layers - 1
                stack.append(GINLayer(width, hidden, hidden, feat_drop=in_drop, residual=residual, norm=norm, act=activation, bare=bare))
            else:
                stack.append(_layer(encoder, width, hidden, heads, **drops, norm=norm, act=activation, residual=residual, outer=True))
        self.encoder = Stack(encoder, stack)
        self.encoder_to_decoder = nn.Linear(hidden * layers if concat_hidden else hidden, hidden, bias=False)
        self.decoder: nn.Module
        if decoder == "mlp":
            self.decoder = nn.Sequential(nn.Linear(hidden, hidden), PReLU(), nn.Dropout(0.2), nn.Linear(hidden, in_dim))
        elif decoder == "linear":
            self.decoder = nn.Linear(hidden, in_dim)
        elif decoder == "gin":
            self.decoder = Stack(
                "gin", [GINLayer(hidden, hidden, in_dim, feat_drop=in_drop, residual=False, norm=norm, act=activation, bare=True)]
            )
        else:
            self.decoder = Stack(decoder, [_layer(decoder, hidden, in_dim, 1, **drops, norm=None, act=None, residual=False, outer=False)])
        self.enc_mask_token = nn.Parameter(torch.zeros(1, in_dim), requires_grad=mask)

    # -- forward

    def forward(
        self,
        x: Tensor | Features,
        graph: Tensor | Graph,
        *,
        mask_nodes: Tensor | None = None,
        token_nodes: Tensor | None = None,
        noise_nodes: Tensor | None = None,
        noise_source_nodes: Tensor | None = None,
        kept_edges: Tensor | None = None,
        generator: torch.Generator | None = None,
        path: Path = "efficient",
    ) -> Output:
        """Mask, encode, re-mask, decode, compare (Sec. 3.2).

        Args:
            x: (N, d) node features, or `Features` of them (kept from step to step by node tasks).
            graph: edge_index (2, E) source -> target with one self-loop a node, or a `Graph`.
            mask_nodes, token_nodes, noise_nodes, noise_source_nodes: node numbers; not given: drawn by `draw_masks`.
            kept_edges: numbers of the edges (columns of edge_index) that the encoder sees; not given: drawn when drop_edge_rate > 0.
            generator: for masks and edges; dropout draws from torch's global one.
            path: "efficient" computes only what the loss needs; "plain" also fills `Output.trace`. Same loss, same gradients.
        Raises:
            ValueError: index sets that overlap, repeat or leave mask_nodes; a width or edge that does not fit.
        """
        features, graph = self._inputs(x, graph)
        nodes, device = len(features), features.device
        if mask_nodes is not None:
            masks = _checked(nodes, mask_nodes, token_nodes, noise_nodes, noise_source_nodes)
        elif self.mask:
            masks = draw_masks(nodes, self.mask_rate, self.replace_rate, device=device, generator=generator)
        else:
            everyone = torch.arange(nodes, device=device)
            masks = Masks(everyone, everyone[:0], everyone[:0], everyone[:0])
        seen = self._drop_edges(graph, kept_edges, generator)
        row_source = torch.arange(nodes, device=device)
        row_source[masks.noise_nodes] = masks.noise_source_nodes
        row_source[masks.token_nodes] = -1
        hidden = torch.zeros(nodes, dtype=torch.bool, device=device)
        hidden[masks.mask_nodes] = True
        rows = hidden.nonzero().flatten()
        remask = self.remask and self.mask and isinstance(self.decoder, Stack)
        if path == "plain":
            prediction, trace = self._plain(features, graph, seen, row_source, hidden, remask)
            prediction = prediction[rows]
        else:
            prediction, trace = self._efficient(x, graph, seen, row_source, hidden, rows, remask), None
        if self.loss == "mse":
            loss = F.mse_loss(prediction, features[rows])
        else:
            unit = x.unit[rows] if isinstance(x, Features) else F.normalize(features[rows], dim=1)
            loss = sce(prediction, unit, self.gamma, unit=True)
        return Output(loss, rows, prediction, trace)

    def _plain(self, x: Tensor, graph: Graph, seen: Graph, row_source: Tensor, hidden: Tensor, remask: bool) -> tuple[Tensor, Trace]:
        """The method as the paper writes it, all nodes at every stage."""
        masked_x = self.masked(x, row_source)
        states = self._encode(masked_x, seen, "plain")
        code = self.encoder_to_decoder(torch.cat(states, dim=1) if self.concat_hidden else states[-1])
        decoded = code.masked_fill(hidden[:, None], 0.0) if remask else code  # the paper's [DMASK] token is zeros in the code
        out = self.decoder.layers_[0](graph, decoded, "plain") if isinstance(self.decoder, Stack) else self.decoder(decoded)
        return out, Trace(masked_x, states, code, out)

    def _efficient(
        self, x: Tensor | Features, graph: Graph, seen: Graph, row_source: Tensor, hidden: Tensor, rows: Tensor, remask: bool
    ) -> Tensor:
        """The same predictions for `rows`, from the codes that they depend on."""
        if not isinstance(self.decoder, Stack):
            needed: Tensor | None = rows
        elif not remask:
            needed = None
        elif self.decoder.kind == "gin" and any(isinstance(m, nn.BatchNorm1d) for m in self.decoder.modules()):
            needed = (~hidden).nonzero().flatten()  # its batch statistics are over all nodes
        else:
            reached = torch.zeros_like(hidden)
            reached[graph.source[hidden[graph.target]]] = True
            needed = (reached & ~hidden).nonzero().flatten()
            needed = needed if len(needed) else (~hidden).nonzero().flatten()[:1]
        states = self._encode(x, seen, "efficient", needed, row_source)
        if self.concat_hidden:
            states = [state if needed is None else state[needed] for state in states[:-1]] + [states[-1]]
        code = self.encoder_to_decoder(torch.cat(states, dim=1) if self.concat_hidden else states[-1])
        if isinstance(self.decoder, Stack):
            return self.decoder.layers_[0].decode(graph, code, needed, rows)
        return self.decoder(code)

    def _encode(
        self, x: Tensor | Features, graph: Graph, path: Path, rows: Tensor | None = None, row_source: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of all layers; the last one at `rows` only."""
        layers = self.encoder.layers_
        states: list[Tensor] = []
        for level, layer in enumerate(layers):
            at = rows if level == len(layers) - 1 else None
            if level == 0 and isinstance(x, Features) and x.sparse is not None and path == "efficient" and self._maps_first(layer):
                source = torch.arange(graph.sources, device=x.dense.device) if row_source is None else row_source
                mapped = map_sparse_rows(x, layer.input_weight, source, self.enc_mask_token, self.in_drop, self.training)
                state = layer.attend(graph, mapped[:, : layer.out_dim], mapped[:, layer.out_dim :], path, at)
            else:
                if level == 0:
                    dense = x.dense if isinstance(x, Features) else x
                    state = dense if row_source is None else self.masked(dense, row_source)
                state = layer(graph, state, path, at)
            states.append(state)
        return states

    @staticmethod
    def _maps_first(layer: nn.Module) -> bool:
        """The layer multiplies its input by weights before anything else, and its residual, if any, is a map too."""
        return isinstance(layer, GATLayer) and (not layer.residual or hasattr(layer, "res_fc"))

    def masked(self, x: Tensor, row_source: Tensor) -> Tensor:
        """X~: row i holds the features of node row_source[i], or the mask token where it is -1; (N, d)."""
        return torch.where((row_source < 0)[:, None], self.enc_mask_token.to(x.dtype), x[row_source.clamp(min=0)])

    def _drop_edges(self, graph: Graph, kept_edges: Tensor | None, generator: torch.Generator | None) -> Graph:
        if kept_edges is not None:
            kept = torch.zeros(len(graph.source), dtype=torch.bool, device=graph.source.device)
            kept[kept_edges.long()] = True
            return graph.with_edges(kept if graph.order is None else kept[graph.order])
        if self.drop_edge_rate == 0 or not self.training:
            return graph
        chance = torch.rand(len(graph.source), device=graph.source.device, generator=generator)
        return graph.with_edges(chance >= self.drop_edge_rate)

    def _inputs(self, x: Tensor | Features, graph: Tensor | Graph) -> tuple[Tensor, Graph]:
        dense = x.dense if isinstance(x, Features) else x
        if dense.ndim != 2 or dense.shape[1] != self.in_dim or not dense.is_floating_point():
            raise ValueError(f"features: expected floating point (N, {self.in_dim}), found {tuple(dense.shape)} {dense.dtype}")
        graph = graph if isinstance(graph, Graph) else Graph.from_edges(graph, len(dense))
        if graph.sources != len(dense):
            raise ValueError(f"graph: expected {len(dense)} nodes as the features have, found {graph.sources}")
        return dense, graph

    # -- inference

    def embed(self, x: Tensor | Features, graph: Tensor | Graph, *, path: Path = "efficient") -> Tensor:
        """Node embeddings (N, h): the last encoder layer on the unmasked graph. Call `eval()` first; no edge is dropped."""
        _, graph = self._inputs(x, graph)
        return self._encode(x, graph, path)[-1]


def readout(nodes: Tensor, graph_of: Tensor, graphs: int, how: Literal["mean", "max", "sum"]) -> Tensor:
    """Graph embeddings (graphs, h) from node embeddings (N, h); graph_of (N,) is each node's graph."""
    if how == "max":
        index = graph_of[:, None].expand_as(nodes)
        return nodes.new_full((graphs, nodes.shape[1]), -torch.inf).scatter_reduce(0, index, nodes, "amax")
    if how not in ("mean", "sum"):
        raise ValueError(f"readout={how!r}: expected mean, max or sum")
    total = nodes.new_zeros(graphs, nodes.shape[1]).index_add(0, graph_of, nodes)
    return total if how == "sum" else total / torch.bincount(graph_of, minlength=graphs)[:, None]
