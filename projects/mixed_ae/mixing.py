"""Mixing images patch by patch, and taking the mixture apart again.

A group is K consecutive images; an assignment says which of them owns each of the L patches of a mixed sequence, L / K patches each. Patches stay
where they were. Compose mixing makes one sequence of a group, full mixing K of them in which every patch of every image is seen once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.masking import Mask


def group_size(ratio: float) -> int:
    """Images of a group, K = 1 / ratio.

    Raises:
        ValueError: the share of an image is not one over a whole number of at least 2.
    """
    count = round(1 / ratio) if ratio > 0 else 0
    if count < 2 or abs(ratio * count - 1) > 1e-6:
        raise ValueError(f"ratio={ratio}: expected one over a whole number, 0 < ratio <= 0.5 (0.5, 0.25, 0.125 ...)")
    return count


def draw(noise: Tensor, group: int) -> Tensor:
    """Owners of the positions, (..., L) int64 in 0..K-1, from uniform noise (..., L): the L / K smallest entries go to image 0, and so on."""
    count = noise.shape[-1]
    if count % group:
        raise ValueError(f"{count} patches do not divide by a group of {group}; {_valid_groups(count)}")
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1) // (count // group)


def full(assignment: Tensor, group: int) -> Tensor:
    """The K complementary assignments (G, K, L) of an assignment (G, L): shift s gives position l to image (a_l + s) mod K."""
    return (assignment[:, None] + torch.arange(group, device=assignment.device)[:, None]) % group


def check(assignment: Tensor, group: int, groups: int, count: int) -> None:
    """Refuse an assignment that is not (groups, R, count) with equal shares of 0..group-1.

    Raises:
        ValueError: another shape, or unequal shares, naming the first such sequence and its counts.
    """
    if assignment.ndim != 3 or assignment.shape[::2] != (groups, count) or assignment.is_floating_point():
        raise ValueError(
            f"assignment: expected integers ({groups}, sequences, {count}), got {assignment.dtype} {tuple(assignment.shape)}; "
            f"the batch must hold {group} images a group"
        )
    shares = (assignment[..., None] == torch.arange(group, device=assignment.device)).sum(2)
    if (shares != count // group).any():
        at = int((shares != count // group).any(-1).flatten().nonzero()[0])
        raise ValueError(
            f"assignment: sequence {at % assignment.shape[1]} of group {at // assignment.shape[1]} gives its {group} images "
            f"{shares.flatten(0, 1)[at].tolist()} of {count} positions; expected {count // group} each"
        )


def mix(patches: Tensor, assignment: Tensor) -> Tensor:
    """Mixed sequences (G, R, L, D): position l holds patch l of image `assignment[g, r, l]` of group g; patches are (G K, L, D)."""
    members, where = patches.unflatten(0, (len(assignment), -1)), assignment.device
    groups = torch.arange(len(assignment), device=where)[:, None, None]
    return members[groups, assignment, torch.arange(assignment.shape[2], device=where)]


def ownership(assignment: Tensor, group: int) -> Mask:
    """What each image of each sequence owns, as a mask whose visible patches are its own: rows run over (group, sequence, image).

    Args:
        assignment: (G, R, L).
    """
    sequences = assignment.flatten(0, 1)
    count = sequences.shape[1]
    # positions sorted by owner, in token order inside; an image's own block comes first, the others' follow
    blocks = sequences.argsort(dim=1, stable=True).unflatten(1, (group, count // group))
    images = torch.arange(group, device=assignment.device)
    order = blocks[:, (images[:, None] + images) % group].flatten(2)
    hidden = sequences[:, None] != images[:, None]
    return Mask(hidden.flatten(0, 1), order.flatten(0, 1), count // group)


def unmix(latent: Tensor, mask: Mask, group: int) -> Tensor:
    """Each image's own latents (G R K, L / K, D), from the latents (G R, L, D) of the mixed sequences, in the order of `mask.keep`."""
    own = mask.keep.unflatten(0, (-1, group)).flatten(1)
    return latent.gather(1, own[..., None].expand(-1, -1, latent.shape[-1])).unflatten(1, (group, -1)).flatten(0, 1)


def _valid_groups(count: int) -> str:
    fitting = [k for k in range(2, count + 1) if count % k == 0]
    return f"groups of {', '.join(map(str, fitting[:6]))} would" if fitting else "no group size would"
