"""Masks over tokens, and gathering, scattering and restoring tokens by them.

A `Mask` says which tokens are hidden (bool, True = hidden) and in which order the visible ones enter an encoder. Every
sample of a batch keeps equally many. A model takes a `Mask`; whoever has noise, indices or a bool mask builds one with
`from_noise`, `from_keep` or `from_hidden`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rounding = Literal["keep", "hide", "nearest"]


class Mask(NamedTuple):
    hidden: Tensor  # (B, N) bool, True = hidden
    order: Tensor  # (B, N) int64: the visible tokens in the encoder's order, then the hidden ones
    kept: int  # K, visible tokens a sample

    @property
    def keep(self) -> Tensor:
        """(B, K) int64, positions of the visible tokens in the encoder's order."""
        return self.order[:, : self.kept]

    @property
    def masked(self) -> Tensor:
        """(B, N - K) int64, positions of the hidden tokens."""
        return self.order[:, self.kept :]

    @property
    def restore(self) -> Tensor:
        """(B, N) int64, place of each token in `order` (MAE's ids_restore)."""
        return self.order.argsort(dim=1)


# -- how many, and from what is given ----------------------------------------------------------------------------------


def kept_count(count: int, ratio: float, rounding: Rounding = "keep") -> int:
    """Number K of visible tokens out of `count`, 0 < K < count, by the reference's rounding, in double precision.

    "keep": int(N (1 - r)) (MAE, CROMA, MR-MAE; N = 100, r = 0.9 gives 9); "hide": N - int(N r) (VideoMAE, HiCMAE,
    Point-CMAE; gives 10); "nearest": round(N (1 - r)), half to even (SparK).
    """
    if rounding not in ("keep", "hide", "nearest"):
        raise ValueError(f"rounding: expected keep, hide or nearest, got {rounding!r}")
    kept = {"keep": int(count * (1 - ratio)), "hide": count - int(count * ratio), "nearest": round(count * (1 - ratio))}[rounding]
    if not 0 < kept < count:
        raise ValueError(f"ratio={ratio} keeps {kept} of {count} tokens (rounding {rounding!r}); expected 1 to {count - 1}")
    return kept


def from_noise(noise: Tensor, kept: int) -> Mask:
    """Keep the `kept` smallest entries of noise (B, N), visible tokens in order of rising noise; ties: lower index first.

    Scores serve as well: `from_noise(-score, k)` keeps the k highest, best first.
    """
    if noise.ndim != 2 or not 0 < kept < noise.shape[1]:
        raise ValueError(f"expected noise (B, N) and 0 < kept < N, got {tuple(noise.shape)} and kept={kept}")
    order = noise.argsort(dim=1, stable=True)
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter_(1, order[:, :kept], False)
    return Mask(hidden, order, kept)


def from_keep(keep: Tensor, count: int) -> Mask:
    """Keep the positions keep (B, K) out of `count`, in that order; the hidden ones follow in token order.

    Raises:
        ValueError: positions outside 0..count-1, a position twice, nothing hidden.
    """
    if keep.ndim != 2 or keep.is_floating_point() or not 0 < keep.shape[1] < count:
        raise ValueError(f"keep: expected integer (B, K) with 0 < K < {count}, got {keep.dtype} {tuple(keep.shape)}")
    if keep.min() < 0 or keep.max() >= count:
        raise ValueError(f"keep: expected positions 0 to {count - 1}, found {int(keep.min())} to {int(keep.max())}")
    keep = keep.long()
    hidden = torch.ones(len(keep), count, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    if len(twice := (hidden.sum(1) != count - keep.shape[1]).nonzero()):
        raise ValueError(f"keep: expected distinct positions in each sample, found one twice in sample {int(twice[0])}")
    masked = _token_order(hidden)[:, keep.shape[1] :]
    return Mask(hidden, torch.cat([keep, masked], 1), keep.shape[1])


def from_hidden(hidden: Tensor) -> Mask:
    """Mask from hidden (B, N) bool, visible tokens in token order (VideoMAE's boolean indexing).

    Raises:
        ValueError: not bool, or samples that keep different numbers (they could not be stacked).
    """
    if hidden.ndim != 2 or hidden.dtype != torch.bool:
        raise ValueError(f"hidden: expected bool (B, N), True = hidden, got {hidden.dtype} {tuple(hidden.shape)}")
    least, most = (int(n) for n in (~hidden).sum(1).aminmax())
    if least != most or not 0 < least < hidden.shape[1]:
        raise ValueError(
            f"hidden: expected 1 to {hidden.shape[1] - 1} visible tokens, equally many in each sample, found {least} to {most}"
        )
    return Mask(hidden, _token_order(hidden), least)


# -- samplers ----------------------------------------------------------------------------------------------------------


def random_mask(
    batch: int,
    count: int,
    ratio: float,
    *,
    rounding: Rounding = "keep",
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Hide a random share `ratio` of `count` tokens, in each sample on its own (MAE, Sec. 3).

    Args:
        rounding: see `kept_count`.
        noise: (B, N), the smallest K stay, in rising order; None = drawn from `generator` (None = the global one).
    """
    kept = kept_count(count, ratio, rounding)
    noise = _noise((batch, count), generator, device) if noise is None else noise
    if noise.shape != (batch, count):
        raise ValueError(f"noise: expected {(batch, count)}, got {tuple(noise.shape)}")
    return from_noise(noise, kept)


def tube(mask: Mask, frames: int) -> Mask:
    """Repeat a mask over S places in every one of `frames` layers: (B, frames * S), token index = frame * S + place (VideoMAE).

    Visible tokens are in token order. A tube mask is `tube(random_mask(batch, S, 0.9, rounding="hide"), frames)`.
    """
    hidden = mask.hidden.repeat(1, frames)
    return Mask(hidden, _token_order(hidden), mask.kept * frames)


def block_mask(
    positions: Tensor,
    ratio: float,
    *,
    rounding: Rounding = "hide",
    norm: float = 2.0,
    centre: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """Hide one block a sample: the tokens nearest to a randomly drawn one (Point-CMAE's block mask).

    Args:
        positions: (B, N, d) coordinates of the tokens; of a grid: `patch.grid_positions(grid).expand(batch, -1, -1)`.
        norm: 2 = ball; inf = square or cube, cut at the border of the grid. Ties: lower index first.
        centre: (B,) index of the middle token; None = drawn from `generator`.
    """
    if positions.ndim != 3:
        raise ValueError(f"positions: expected (B, N, d), got {tuple(positions.shape)}")
    batch, count, dim = positions.shape
    kept = kept_count(count, ratio, rounding)
    if centre is None:
        centre = (_noise((batch,), generator, positions.device) * count).long().clamp(max=count - 1)
    middle = positions.gather(1, centre[:, None, None].expand(-1, 1, dim))
    nearest = torch.linalg.vector_norm(positions - middle, ord=norm, dim=2).argsort(dim=1, stable=True)
    hidden = torch.zeros(batch, count, dtype=torch.bool, device=positions.device).scatter_(1, nearest[:, : count - kept], True)
    return Mask(hidden, _token_order(hidden), kept)


def paired_masks(
    batch: int,
    count: int,
    ratio: float,
    *,
    rounding: Rounding = "keep",
    overlap: float | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Mask, Mask]:
    """Two random masks of one count, for two views or sensors (Point-CMAE, Sec. 3.4; CROMA's independent and shared masks).

    Args:
        overlap: share of the hidden tokens of the first that the second hides too; with M hidden, round(overlap M) exactly.
            1 = the same mask twice. None = independent: M/N on average. Each mask alone stays uniform.
        noise: (2, B, N), one layer a mask; None = drawn.
    """
    kept = kept_count(count, ratio, rounding)
    noise = _noise((2, batch, count), generator, device) if noise is None else noise
    if noise.shape != (2, batch, count):
        raise ValueError(f"noise: expected {(2, batch, count)}, got {tuple(noise.shape)}")
    first = from_noise(noise[0], kept)
    if overlap is None:
        return first, from_noise(noise[1], kept)
    hide = count - kept
    common = round(overlap * hide)
    if not max(0, 2 * hide - count) <= common <= hide:
        least = max(0, 2 * hide - count) / hide
        raise ValueError(f"overlap: with {hide} of {count} tokens hidden expected {least:.3f} to 1, got {overlap}")
    if common == hide:
        return first, first
    # the second layer's noise ranks the tokens inside the first mask's visible and hidden parts; the ends of both are hidden
    parts = []
    for part, size in ((first.keep, hide - common), (first.masked, common)):
        ranked = part.gather(1, noise[1].gather(1, part).argsort(dim=1, stable=True))
        parts.append(ranked[:, ranked.shape[1] - size :])
    hidden = torch.zeros_like(first.hidden).scatter_(1, torch.cat(parts, 1), True)
    return first, Mask(hidden, _token_order(hidden), kept)


def overlap(first: Mask, second: Mask) -> Tensor:
    """(B,) share of the first mask's hidden tokens that the second hides too."""
    return (first.hidden & second.hidden).sum(1) / first.hidden.sum(1)


def enlarge(hidden: Tensor, grid: tuple[int, ...], factor: int) -> Tensor:
    """Nearest-neighbour enlarging of hidden (B, N) on a coarse grid to (B, *(side * factor)): one entry becomes a block.

    So all stages of a hierarchical encoder agree on what is hidden (MR-MAE, Sec. 3.1; SparK).
    """
    fine = hidden.reshape(len(hidden), *grid)
    for axis in range(1, fine.ndim):
        fine = fine.repeat_interleave(factor, dim=axis)
    return fine


# -- tokens ------------------------------------------------------------------------------------------------------------


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows index (B, K) of tokens (B, N, ...), or (1, N, ...) for every sample: (B, K, ...), in the order of `index`."""
    if index.ndim != 2 or tokens.ndim < 2 or tokens.shape[0] not in (1, len(index)):
        raise ValueError(f"expected tokens (B, N, ...) and index (B, K), got {tuple(tokens.shape)} and {tuple(index.shape)}")
    rest = tokens.shape[2:]
    return tokens.expand(len(index), *tokens.shape[1:]).gather(1, _rows(index, rest))


def scatter(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """base (B, N, ...) with rows index (B, K) replaced by values (B, K, ...): a new tensor; base may be (1, N, ...)."""
    if values.shape[:2] != index.shape or base.shape[2:] != values.shape[2:] or base.shape[0] not in (1, len(index)):
        raise ValueError(
            "expected base (B, N, ...), index (B, K) and values (B, K, ...), "
            f"got {tuple(base.shape)}, {tuple(index.shape)}, {tuple(values.shape)}"
        )
    return base.expand(len(index), *base.shape[1:]).scatter(1, _rows(index, values.shape[2:]), values)


def restore_tokens(visible: Tensor, mask: Mask, token: Tensor, positions: Tensor | None = None) -> Tensor:
    """All N tokens in token order: the visible ones at their places, `token` elsewhere, positions added (MAE's decoder input).

    Args:
        visible: (B, K, D) in the order of `mask.keep`; token: (1, 1, D) or (D,), the learned mask token.
        positions: (N, D) or (1, N, D), added to every token; None = none.
    Returns:
        (B, N, D), promoted as `visible + positions` would be. Built as one copy of `token + positions`, then the visible
        rows: neither the shuffled sequence nor a (B, N, D) index exists.
    """
    count, dim = mask.hidden.shape[1], visible.shape[2]
    base = token.reshape(1, 1, dim).expand(1, count, dim)
    if positions is not None:
        positions = positions.reshape(1, count, dim)
        visible = visible + gather(positions, mask.keep)
        base = base + positions
    dtype = torch.promote_types(base.dtype, visible.dtype)
    return scatter(base.to(dtype), mask.keep, visible.to(dtype))


def append_mask_tokens(visible: Tensor, mask: Mask, token: Tensor, positions: Tensor | None = None) -> Tensor:
    """As `restore_tokens`, but in the order of `mask.order`: visible tokens first, then one mask token a hidden place.

    The decoder input of VideoMAE, HiCMAE and Point-CMAE: the rows to predict are the last N - K.
    """
    batch, _, dim = visible.shape
    hidden = token.reshape(1, 1, dim).expand(batch, mask.masked.shape[1], dim)
    if positions is not None:
        positions = positions.reshape(1, mask.hidden.shape[1], dim)
        visible, hidden = visible + gather(positions, mask.keep), hidden + gather(positions, mask.masked)
    return torch.cat([visible, hidden], 1)


# -- parts -------------------------------------------------------------------------------------------------------------


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    where = device if generator is None else generator.device
    noise = torch.rand(shape, generator=generator, device=where)
    return noise if device is None else noise.to(device)


def _token_order(hidden: Tensor) -> Tensor:
    """Visible positions in token order, then the hidden ones in token order."""
    return hidden.byte().argsort(dim=1, stable=True)


def _rows(index: Tensor, rest: tuple[int, ...]) -> Tensor:
    return index.reshape(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)
