"""The method: distances, masks, encoders on any grid, losses, gradients, sizes, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.masking import from_keep, from_noise
from common.patch import patchify
from projects.croma import alibi
from projects.croma.alibi import Places, attend, bias_between, places, table
from projects.croma.model import CROMA, SIZES, Encoders
from tests.projects.croma.ranks import contrast_by_rule, contrast_of_rank, gradients, pairs, small


def encoders(**changes: Any) -> Encoders:
    torch.manual_seed(0)
    return Encoders(16, 2, 4, **changes).eval()


def images(rows: int = 16, columns: int = 24, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(batch, bands, rows, columns, generator=generator) for name, bands in (("radar", 2), ("optical", 12))}


# -- distances


def test_distances_of_a_rectangular_grid_are_euclidean_in_patches() -> None:
    at = places((2, 3))
    bias = bias_between(at, at, 2)
    assert bias.shape == (1, 2, 6, 6)
    slope = [2**-4.0, 2**-8.0]
    for u, v in ((0, 5), (2, 3), (1, 4)):
        apart = math.hypot(u // 3 - v // 3, u % 3 - v % 3)
        assert [float(bias[0, a, u, v]) for a in range(2)] == pytest.approx([-s * apart for s in slope])
    assert bias.diagonal(dim1=2, dim2=3).abs().max() == 0


def test_distances_stay_float32_under_autocast() -> None:
    at = places((15, 15))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = table(at, at, torch.tensor([0.7071]))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, table(at, at, torch.tensor([0.7071])))


def test_attention_under_autocast_adds_the_exact_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=generator).bfloat16() for _ in range(3))
    bias = bias_between(places((3, 3)) * 30, places((3, 3)) * 30, 2)
    weights = (q.double() @ k.double().mT / 8**0.5 + bias.double()).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), (weights @ v.double()).bfloat16().double(), rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("count", [6, 100])
def test_every_path_of_attention_agrees(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (count, count + 3, count + 3))
    at = torch.rand(2, count, 2, generator=generator), torch.rand(2, count + 3, 2, generator=generator)
    slope = torch.tensor(alibi.slopes(4))
    dense = table(*at, slope)
    expected = ((q @ k.mT / 8**0.5 + dense).softmax(-1)) @ v
    torch.testing.assert_close(attend(q, k, v, dense), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(q, k, v, Places(*at, slope)), expected, rtol=1e-5, atol=1e-6)
    one = at[0][:1], at[1][:1]
    torch.testing.assert_close(attend(q, k, v, Places(*one, slope)), attend(q, k, v, table(*one, slope)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(q, k, v), (q @ k.mT / 8**0.5).softmax(-1) @ v, rtol=1e-5, atol=1e-6)


# -- encoders


def test_a_rectangular_image_is_its_transpose_transposed() -> None:
    """Distances know no axis: with patches that are their own transpose, rows and columns can be swapped."""
    model = encoders()
    with torch.no_grad():
        for encoder in (model.radar_encoder, model.optical_encoder):
            weight = encoder.embed.weight.view(16, -1, 8, 8)
            encoder.embed.weight.copy_(((weight + weight.mT) / 2).flatten(1))
    given = images()
    found, turned = model(**given), model(**{name: image.mT for name, image in given.items()})
    torch.testing.assert_close(turned.joint.view(2, 3, 2, 16).transpose(1, 2).flatten(1, 2), found.joint, rtol=1e-4, atol=1e-5)
    assert torch.allclose(turned.radar_gap, found.radar_gap, atol=1e-5)


def test_larger_images_need_nothing_but_another_table() -> None:
    model = encoders()
    names = set(model.state_dict())
    assert not any("pos" in name or "alibi" in name or "bias_table" in name for name in names)
    assert model(**images(40, 72, 1)).joint.shape == (1, 45, 16)


def test_one_sensor_runs_alone_and_says_what_there_is() -> None:
    model, given = encoders(), images()
    both = model(**given)
    radar = model(radar=given["radar"])
    assert torch.equal(radar.radar_gap, both.radar_gap)
    with pytest.raises(ValueError, match=r"joint was asked for, but .* only \['radar', 'radar_gap'\]"):
        radar.tokens("joint")
    assert torch.equal(both.vector("joint"), both.joint.mean(1))
    assert torch.equal(both.vector("radar"), model.radar_head(both.radar))
    assert torch.equal(both.vector("optical", "mean"), both.optical.mean(1))
    assert torch.equal(both.vector("joint", "concat"), torch.cat([both.joint_gap, both.radar_gap, both.optical_gap], 1))
    with pytest.raises(ValueError, match="got neither"):
        model()


def test_masked_tokens_are_those_of_an_image_without_the_hidden_patches() -> None:
    """Only visible patches are encoded: what the hidden ones hold changes nothing."""
    model, given = encoders(), images()
    mask = from_keep(torch.tensor([[4, 1], [0, 3]]), 6)
    changed = given["radar"].clone()
    changed[0, :, 8:, 16:] = 0.9  # patch 5, hidden in the first sample
    before, after = model(radar=given["radar"], radar_mask=mask), model(radar=changed, radar_mask=mask)
    assert torch.equal(before.radar, after.radar)
    changed[0, :, 8:, 8:16] = 0.9  # patch 4, visible
    assert not torch.equal(model(radar=changed, radar_mask=mask).radar, before.radar)


def test_bytes_and_floats_give_the_same() -> None:
    model = encoders()
    whole = {name: (image * 255).to(torch.uint8) for name, image in images().items()}
    found = model(**whole)
    torch.testing.assert_close(found.joint, model(**{name: image.float() / 255 for name, image in whole.items()}).joint)


def test_cross_bias_and_its_switch() -> None:
    given, mask = images(), {}
    generator = torch.Generator().manual_seed(3)
    mask = {f"{name}_mask": from_noise(torch.rand(2, 6, generator=generator), 3) for name in ("radar", "optical")}
    reference, own, none = (encoders(**change) for change in ({}, {"joint_self_bias": "self"}, {"positions": "alibi_self"}))
    torch.testing.assert_close(reference(**given).joint, own(**given).joint)  # without masks both are the same table
    assert not torch.allclose(reference(**given, **mask).joint, own(**given, **mask).joint, atol=1e-4)
    assert not torch.allclose(none(**given).joint, own(**given).joint, atol=1e-4)
    assert torch.equal(none(**given).radar, own(**given).radar)


def test_sensors_may_keep_different_numbers_of_patches() -> None:
    given = images()
    masks = {"radar_mask": from_keep(torch.tensor([[0], [5]]), 6), "optical_mask": from_keep(torch.tensor([[1, 2], [3, 0]]), 6)}
    assert encoders(joint_self_bias="self")(**given, **masks).joint.shape == (2, 1, 16)
    with pytest.raises(ValueError, match=r"radar keeps 1 and optical 2 .* joint_self_bias='self'"):
        encoders()(**given, **masks)
    with pytest.raises(ValueError, match=r"joint_self_bias='self'"):
        CROMA({"embed_dim": 16, "depth": 2, "num_heads": 4}, optical_mask_ratio=0.5)
    model = CROMA({"embed_dim": 16, "depth": 2, "num_heads": 4, "joint_self_bias": "self"}, optical_mask_ratio=0.5)
    found = model(torch.rand(2, 14, 32, 32))
    assert (found.radar_mask.kept, found.optical_mask.kept) == (4, 8)


def test_sine_cosine_positions_recomputed_and_interpolated() -> None:
    given, wide = images(16, 16), images(32, 32)
    again, resized = (encoders(positions=scheme, trained_grid=(2, 2)) for scheme in ("sincos", "sincos_interpolated"))
    torch.testing.assert_close(again(**given).joint, resized(**given).joint)
    assert not torch.allclose(again(**wide).joint, resized(**wide).joint, atol=1e-4)
    keep = from_keep(torch.tensor([[3], [0]]), 4)
    assert again(**given, radar_mask=keep).radar.shape == (2, 1, 16)


# -- losses


def by_hand(model: CROMA, batch: Tensor, found: Any) -> tuple[Tensor, Tensor]:
    """Reconstruction losses from their definition, patch by patch."""
    patches = patchify(batch, (8, 8), "first")
    totals = []
    for mask, part in ((found.optical_mask, slice(0, 768)), (found.radar_mask, slice(768, 896))):
        errors = []
        for b, n in mask.hidden.nonzero().tolist():
            p = patches[b, n]
            target = (p - p.mean()) / (p.var() + 1e-6).sqrt()
            errors.append((found.prediction[b, n, part] - target[part]).square().mean())
        totals.append(torch.stack(errors).mean())
    return totals[0], totals[1]


def test_losses_are_their_definitions() -> None:
    model = small()
    batch, radar, optical = pairs()
    found = model(batch, radar, optical)
    for got, want in zip((found.optical, found.radar), by_hand(model, batch, found), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(found.reconstruction, found.optical + found.radar)
    torch.testing.assert_close(found.loss, found.contrastive + found.reconstruction)
    r = F.normalize(model.radar_proj(found.encodings.radar_gap), dim=1)
    o = F.normalize(model.optical_proj(found.encodings.optical_gap), dim=1)
    logits, own = (o @ r.T) / 0.07, torch.arange(8)
    torch.testing.assert_close(found.contrastive, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, rtol=1e-6, atol=0)


def test_gathered_features_carry_no_gradient_unless_asked() -> None:
    none, full = gradients(0, "none", False), gradients(0, "full", False)
    torch.testing.assert_close(none["loss"], full["loss"])
    torch.testing.assert_close(none["logit_scale"], full["logit_scale"])
    assert (none["radar_proj.weight"] - full["radar_proj.weight"]).norm() > 0.1 * full["radar_proj.weight"].norm()


def test_ranks_follow_the_rule_of_detached_keys(two_processes: Any) -> None:
    model, generator = small().float(), torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 16, generator=generator) for _ in range(2)]
    expected = contrast_by_rule(model, *rows, 2)
    model.zero_grad()
    for part in two_processes(contrast_of_rank, model, *rows):
        for name, value in part.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("gather", ["none", "full"])
def test_two_processes_give_the_gradient_of_one(two_processes: Any, gather: str) -> None:
    whole = gradients(0, gather, False)
    for part in two_processes(gradients, gather, True):
        for name, grad in part.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_loss_of_weight_zero_is_not_computed_and_what_it_alone_trains_is_frozen() -> None:
    batch, radar, optical = pairs()
    for changes, dead, alive in (
        ({"reconstruction_weight": 0.0}, ("decoder.", "encoders.joint_encoder."), "radar_proj.weight"),
        ({"contrastive_weight": 0.0}, ("radar_proj.", "encoders.radar_head.", "logit_scale"), "decoder.head.weight"),
    ):
        model = small(**changes)
        found = model(batch, radar, optical)
        assert float(found.contrastive if "contrastive_weight" in changes else found.reconstruction) == 0
        found.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all((grad is None) == name.startswith((*dead, "optical_proj.", "encoders.optical_head.") if "contrastive_weight" in changes else dead) for name, grad in grads.items())  # fmt: skip
        assert grads[alive].norm() > 0
    with pytest.raises(ValueError, match="not both 0"):
        small(contrastive_weight=0.0, reconstruction_weight=0.0)


def test_optical_targets_leave_the_radar_error_out() -> None:
    found = small(targets="optical")(*pairs())
    torch.testing.assert_close(found.loss, found.contrastive + found.optical)


def test_masks_are_drawn_for_each_sample_and_sensor() -> None:
    batch = torch.rand(3, 14, 48, 48)
    generator = torch.Generator().manual_seed(0)
    found = small().float()(batch, generator=generator)
    assert found.radar_mask.kept == 9
    assert not torch.equal(found.radar_mask.hidden, found.optical_mask.hidden)
    assert len({tuple(row) for row in found.radar_mask.hidden.tolist()}) == 3
    again = small().float()(batch, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.radar_mask.order, again.radar_mask.order)
    shared = small(shared_mask=True).float()(batch)
    assert torch.equal(shared.radar_mask.order, shared.optical_mask.order)


def test_bfloat16_training_stays_close_to_float32() -> None:
    batch, radar, optical = pairs()
    model = small().float()
    exact = model(batch.float(), radar, optical)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch.float(), radar, optical)
    assert rough.contrastive.dtype == rough.optical.dtype == torch.float32
    assert rough.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


def test_recomputed_layers_give_the_same_gradient() -> None:
    batch, radar, optical = pairs()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = CROMA({"embed_dim": 16, "depth": 2, "num_heads": 4, "checkpointing": checkpointing}, decoder_dim=8, decoder_heads=2)
        model(batch.float(), radar, optical).loss.backward()
        grads.append(model.encoders.radar_encoder.embed.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("size", "released", "trained"), [("base", 194_365_440, 199_552_385), ("large", 672_557_056, 678_793_089)])
def test_published_sizes_have_the_published_parameters(size: str, released: int, trained: int) -> None:
    with torch.device("meta"):
        model = CROMA(SIZES[size])
    assert sum(p.numel() for p in model.encoders.parameters()) == released
    assert sum(p.numel() for p in model.parameters()) == trained
    stacks = (model.encoders.optical_encoder.stack, model.encoders.radar_encoder.stack, model.encoders.joint_encoder)
    depth = SIZES[size]["depth"]
    assert [len(stack.layers) for stack in stacks] == [depth, depth // 2, depth // 2]


# -- what is refused


def test_wrong_images_are_refused() -> None:
    model = small().float()
    with pytest.raises(ValueError, match=r"expected \(B, 14, H, W\), 12 optical bands then radar, got \(2, 15, 16, 16\)"):
        model(torch.rand(2, 15, 16, 16))
    with pytest.raises(ValueError, match=r"got \(20, 16\); the next valid size is \(24, 16\)"):
        model(torch.rand(2, 14, 20, 16))
    with pytest.raises(ValueError, match=r"input range \[0, .*\]; CROMA expects \[0, 1\]"):
        encoders()(optical=torch.linspace(0, 9000, 12 * 256).view(1, 12, 16, 16))
    with pytest.raises(ValueError, match="expected 12 bands"):
        encoders()(optical=torch.rand(1, 13, 16, 16))
    with pytest.raises(ValueError, match=r"radar \(1, 2, 16, 16\) and optical \(1, 12, 24, 24\)"):
        encoders()(torch.rand(1, 2, 16, 16), torch.rand(1, 12, 24, 24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_dim": 6}, "decoder_dim=6: expected a multiple of 4"),
        ({"decoder_dim": 12, "decoder_heads": 8}, "decoder_heads=8"),
        ({"encoders": {"embed_dim": 10, "num_heads": 4}}, "width 10 and 4 heads"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CROMA(**{"encoders": {"embed_dim": 8, "depth": 1, "num_heads": 2}} | changes)


def test_ratios_that_leave_nothing_or_all_and_a_batch_of_one() -> None:
    for ratio, kept in ((0.75, 0), (0.9, 0)):
        with pytest.raises(ValueError, match=rf"mask_ratio: ratio={ratio} keeps {kept} of 1 tokens"):
            small(mask_ratio=ratio).float()(torch.rand(2, 14, 8, 8))
    with pytest.raises(ValueError, match="needs at least 2 samples"):
        small().float()(torch.rand(1, 14, 16, 16))
    assert float(small(contrastive_weight=0.0).float()(torch.rand(1, 14, 16, 16)).loss.detach()) > 0
