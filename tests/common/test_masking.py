from __future__ import annotations

import pytest
import torch

from common import masking
from common.patch import grid_positions


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("count", "ratio", "rounding", "kept"),
    [(100, 0.9, "keep", 9), (100, 0.9, "hide", 10), (49, 0.6, "nearest", 20), (10, 0.75, "nearest", 2), (1568, 0.9, "keep", 156)],
)
def test_kept_count_rounds_as_each_reference(count, ratio, rounding, kept):
    assert masking.kept_count(count, ratio, rounding) == kept


@pytest.mark.parametrize(("count", "ratio"), [(196, 1.0), (196, 0.0), (3, 0.75), (196, -0.1)])
def test_a_ratio_must_leave_visible_and_hidden_tokens(count, ratio):
    with pytest.raises(ValueError, match="expected 1 to"):
        masking.kept_count(count, ratio)


def test_unknown_rounding():
    with pytest.raises(ValueError, match="rounding"):
        masking.kept_count(10, 0.5, "floor")


def test_random_mask_keeps_the_smallest_noise_in_rising_order():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.2, 0.1]])
    mask = masking.random_mask(2, 4, 0.5, noise=noise)
    assert mask.keep.tolist() == [[1, 3], [3, 0]]  # of the equal 0.2 the lower index comes first
    assert mask.masked.tolist() == [[0, 2], [2, 1]]
    assert mask.hidden.tolist() == [[True, False, True, False], [False, True, True, False]]
    assert mask.restore.tolist() == [[2, 0, 3, 1], [1, 3, 2, 0]]


def test_random_mask_draws_from_the_generator_alone():
    first, second = (masking.random_mask(3, 50, 0.8, generator=torch.Generator().manual_seed(5), device="cpu") for _ in range(2))
    assert torch.equal(first.order, second.order)
    assert first.kept == 9
    assert not torch.equal(masking.random_mask(3, 50, 0.8).order, first.order)
    many = masking.random_mask(4000, 8, 0.5).hidden.double().mean(0)
    assert (many - 0.5).abs().max() < 0.04


def test_the_three_ways_to_give_a_mask_agree():
    mask = masking.random_mask(4, 12, 0.7)
    kept = masking.from_keep(mask.keep, 12)
    assert torch.equal(kept.keep, mask.keep)
    assert torch.equal(kept.hidden, mask.hidden)
    assert torch.equal(kept.masked, mask.masked.sort(1).values)
    hidden = masking.from_hidden(mask.hidden)
    assert torch.equal(hidden.keep, mask.keep.sort(1).values)
    assert torch.equal(hidden.restore[0, hidden.order[0]], torch.arange(12))
    score = torch.tensor([[0.1, 0.9, 0.5]])
    assert masking.from_noise(-score, 2).keep.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: masking.from_noise(torch.rand(5), 2), "noise"),
        (lambda: masking.from_noise(torch.rand(2, 5), 5), "kept=5"),
        (lambda: masking.from_keep(torch.tensor([[0, 7]]), 5), "0 to 4"),
        (lambda: masking.from_keep(torch.tensor([[1, 1]]), 5), "distinct"),
        (lambda: masking.from_keep(torch.tensor([[0.0, 1.0]]), 5), "integer"),
        (lambda: masking.from_hidden(torch.tensor([[1, 0]])), "bool"),
        (lambda: masking.from_hidden(torch.tensor([[True, False, False], [True, True, False]])), "found 1 to 2"),
        (lambda: masking.from_hidden(torch.ones(2, 3, dtype=torch.bool)), "found 0 to 0"),
        (lambda: masking.random_mask(2, 6, 0.5, noise=torch.rand(2, 5)), "noise"),
        (lambda: masking.block_mask(torch.rand(4, 2), 0.5), "positions"),
        (lambda: masking.paired_masks(2, 10, 0.6, overlap=0.1), "0.333 to 1"),
        (lambda: masking.paired_masks(2, 10, 0.6, noise=torch.rand(2, 10)), "noise"),
        (lambda: masking.gather(torch.rand(3, 4, 2), torch.zeros(2, 1, dtype=torch.long)), "index"),
        (lambda: masking.scatter(torch.rand(2, 4, 2), torch.zeros(2, 1, dtype=torch.long), torch.rand(2, 2, 2)), "values"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_tube_repeats_one_mask_in_every_layer():
    mask = masking.tube(masking.random_mask(2, 10, 0.75, rounding="hide"), 4)
    layers = mask.hidden.reshape(2, 4, 10)
    assert (layers == layers[:, :1]).all()
    assert layers.sum(2).eq(7).all()
    assert mask.kept == 12
    assert torch.equal(mask.keep, mask.keep.sort(1).values)
    assert not mask.hidden.gather(1, mask.keep).any()


def test_block_mask_hides_the_nearest_tokens():
    place = grid_positions((5, 6)).expand(3, -1, -1)
    centre = torch.tensor([14, 0, 29])  # (2, 2) and two corners
    square = masking.block_mask(place, 0.3, norm=float("inf"), centre=centre)
    assert square.kept == 21
    assert square.hidden[0].reshape(5, 6).nonzero().tolist() == [[r, c] for r in (1, 2, 3) for c in (1, 2, 3)]
    ball = masking.block_mask(place, 0.3, centre=centre)
    for sample in range(3):
        distance = (place[sample] - place[sample, centre[sample]]).norm(dim=1)
        assert distance[ball.hidden[sample]].max() <= distance[~ball.hidden[sample]].min()
    drawn = masking.block_mask(place, 0.5, generator=torch.Generator().manual_seed(1))
    assert drawn.hidden.sum(1).tolist() == [15, 15, 15]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 1.0])
def test_paired_masks_share_what_is_asked(overlap):
    first, second = masking.paired_masks(6, 40, 0.4, overlap=overlap)
    assert first.kept == second.kept == 24
    assert torch.allclose(masking.overlap(first, second), torch.full((6,), overlap))
    assert (~second.hidden).sum(1).eq(24).all()
    assert torch.equal(masking.from_hidden(second.hidden).keep.sort(1).values, second.keep.sort(1).values)


def test_each_controlled_mask_alone_is_uniform_and_independent_masks_overlap_by_chance():
    _, second = masking.paired_masks(4000, 10, 0.5, overlap=0.2)
    assert (second.hidden.double().mean(0) - 0.5).abs().max() < 0.04
    noise = torch.rand(2, 4000, 10)
    first, second = masking.paired_masks(4000, 10, 0.5, noise=noise)
    assert torch.equal(second.keep, masking.random_mask(4000, 10, 0.5, noise=noise[1]).keep)
    assert abs(masking.overlap(first, second).mean() - 0.5) < 0.02


def test_enlarge_makes_blocks():
    hidden = torch.tensor([[True, False, False, True, False, False]])
    fine = masking.enlarge(hidden, (2, 3), 2)
    assert fine.shape == (1, 4, 6)
    for row in range(4):
        for column in range(6):
            assert fine[0, row, column] == hidden[0, (row // 2) * 3 + column // 2]


def test_gather_and_scatter_against_loops():
    tokens, index = torch.rand(3, 5, 2, 4), torch.stack([torch.randperm(5)[:2] for _ in range(3)])
    taken = masking.gather(tokens, index)
    back = masking.scatter(torch.zeros(1, 5, 2, 4), index, taken)
    for b in range(3):
        for k in range(2):
            assert torch.equal(taken[b, k], tokens[b, index[b, k]])
        for n in range(5):
            assert torch.equal(back[b, n], tokens[b, n] if n in index[b] else torch.zeros(2, 4))
    assert torch.equal(masking.gather(tokens[:1], index)[2], tokens[0, index[2]])
    assert masking.gather(tokens[..., 0, 0], index).shape == (3, 2)


@pytest.mark.parametrize("with_positions", [True, False])
def test_restore_against_the_shuffled_form_of_mae_gradients_too(with_positions):
    mask = masking.random_mask(3, 7, 0.6)
    leaves = [torch.rand(3, mask.kept, 4), torch.rand(1, 1, 4), torch.rand(7, 4)]
    weight = torch.rand(3, 7, 4)

    def mae(visible, token, positions):
        full = torch.cat([visible, token.repeat(3, 7 - mask.kept, 1)], 1)
        full = full.gather(1, mask.restore[..., None].repeat(1, 1, 4))
        return full + positions if with_positions else full

    results = []
    for build in (
        mae,
        lambda v, t, p: masking.restore_tokens(v, mask, t, p if with_positions else None),
        lambda v, t, p: masking.gather(masking.append_mask_tokens(v, mask, t, p if with_positions else None), mask.restore),
    ):
        inputs = [leaf.double().requires_grad_() for leaf in leaves]
        out = build(*inputs)
        grads = torch.autograd.grad((out * weight).sum(), inputs[: 3 if with_positions else 2])
        results.append((out.detach(), *grads))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)


def test_half_precision_tokens_are_promoted_not_the_positions_rounded():
    mask = masking.random_mask(2, 6, 0.5)
    visible, token, positions = torch.rand(2, 3, 4, dtype=torch.bfloat16), torch.rand(4), torch.rand(6, 4)
    for build in (masking.restore_tokens, masking.append_mask_tokens):
        out = build(visible, mask, token, positions)
        assert out.dtype == torch.float32
        hidden = out[mask.hidden] if build is masking.restore_tokens else out[:, mask.kept :].flatten(0, 1)
        place = mask.hidden.nonzero()[:, 1] if build is masking.restore_tokens else mask.masked.flatten()
        assert torch.equal(hidden, token + positions[place])
