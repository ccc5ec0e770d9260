"""The method's own promises: nothing leaks from hidden patches, each token set has its target, both paths agree, sizes are the published ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork

from common.masking import from_keep, random_mask
from common.patch import patchify, unpatchify
from projects.mr_mae.classifier import Classifier, fine_tuning_groups, pretraining_groups
from projects.mr_mae.dense import DetectionBackbone, SegmentationBackbone
from projects.mr_mae.mimic import focused_mask, mimic_loss
from projects.mr_mae.model import MRMAE, SIZES, Encoder

TINY: dict[str, Any] = {
    "image_size": 64,
    "stage_dims": (8, 12, 16),
    "stage_depths": (1, 1, 3),
    "num_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
PLAIN = TINY | {"backbone": "vit", "stage_patch": (16,), "stage_dims": (16,), "stage_depths": (3,), "mlp_ratio": (4,)}
BACKBONE = {name: value for name, value in TINY.items() if not name.startswith("decoder")}


def batch(size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def built(**changes: Any) -> MRMAE:
    torch.manual_seed(0)
    return MRMAE(**(TINY | changes))


def mask_of(model: MRMAE, seed: int = 0) -> Any:
    return random_mask(2, model.count, model.mask_ratio, generator=torch.Generator().manual_seed(seed))


# -- the backbone


@pytest.mark.parametrize("path", ["visible", "dense"])
@pytest.mark.parametrize("config", [{}, {"stage_patch": (2, 2, 2)}, {"class_token": True}, {"kernel": 3}, PLAIN], ids=str)
def test_hidden_pixels_never_reach_visible_tokens(config: dict[str, Any], path: Any) -> None:
    model = built(targets="pixels", **config)
    mask, images = mask_of(model), batch()
    patches = patchify(images, (model.patch, model.patch))
    changed = torch.where(mask.hidden[..., None], torch.randn_like(patches), patches)
    other = unpatchify(changed, (model.grid, model.grid), (model.patch, model.patch))
    first, second = (model.encoder(x, mask, path=path).tokens for x in (images, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.encoder(batch(seed=1), mask, path=path).tokens)


@pytest.mark.parametrize(("size", "stage_patch"), [(48, (4, 2, 2)), (64, (2, 2, 2)), (32, (2, 2, 1)), (96, (4, 2, 2))])
def test_visible_blocks_give_the_numbers_of_whole_maps(size: int, stage_patch: tuple[int, ...]) -> None:
    model = built(image_size=size, stage_patch=stage_patch, stage_depths=(2, 2, 2), teacher_dims=[5]).double()
    images, teacher = batch(size).double(), torch.randn(2, model.count, 5, dtype=torch.float64)
    found = {}
    for path in ("visible", "dense"):
        model.zero_grad()
        out = model(images, [teacher], mask_of(model), path=path)
        out.loss.backward()
        found[path] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"pixel": out.pixel, "mimic": out.mimic}
    for name, value in found["dense"].items():
        torch.testing.assert_close(found["visible"][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_stages_agree_on_what_is_visible_and_the_sum_comes_before_the_norm() -> None:
    model = built(targets="pixels")
    images, mask = batch(), mask_of(model)
    seen: dict[str, Tensor] = {}
    for name in ("blocks1", "blocks2"):
        getattr(model.encoder, name)[0].register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[1]}))
    encoded = model.encoder(images, mask, taps=[3], path="dense")
    first, second = (seen[name][..., 0] for name in ("blocks1", "blocks2"))
    assert first.shape == (2, 16, 16)
    assert torch.equal(first[:, ::2, ::2], second)
    assert torch.equal(second[:, ::2, ::2].flatten(1), ~mask.hidden)
    plain = model.encoder.norm(encoded.taps[3])
    assert (encoded.tokens - plain).abs().mean() > 0.1  # stages 1 and 2 are in the sum
    torch.testing.assert_close(encoded.tokens.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)  # and the norm came last


def test_the_class_token_sees_and_is_seen_but_has_no_target() -> None:
    model = built(class_token=True, teacher_dims=[5])
    out = model(batch(), [torch.randn(2, 16, 5)], mask_of(model))
    out.loss.backward()
    assert out.prediction.shape == (2, 12, 768)
    assert model.encoder.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["convmae", "vit"])
def test_a_step_learns(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MRMAE(**config, teacher_dims=[5, 7], mimic_weights=[1.0, 0.5], mimic_layers=(1, 3))
    update = torch.optim.AdamW(pretraining_groups(model, 0.05), lr=3e-3)
    teachers = [torch.randn(2, 16, 5), torch.randn(2, 16, 7)]
    losses = []
    for _ in range(12):
        update.zero_grad()
        out = model(batch(), teachers, mask_of(model))
        out.loss.backward()
        update.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- the two targets


def test_the_pixel_loss_leaves_the_mimic_head_alone_and_the_mimic_loss_the_decoder() -> None:
    model = built(teacher_dims=[5])
    out = model(batch(), [torch.randn(2, 16, 5)], mask_of(model))
    parts = {"mimics": list(model.mimics.parameters()), "decoder": list(model.decoder.parameters())}
    for loss, part in ((out.pixel, "mimics"), (out.mimic, "decoder")):
        assert all(g is None for g in torch.autograd.grad(loss, parts[part], allow_unused=True, retain_graph=True))


def test_the_mimic_loss_reads_visible_tokens_of_pupil_and_teacher_alone() -> None:
    model, mask, images = built(teacher_dims=[5]), from_keep(torch.tensor([[3, 9, 0, 12], [1, 2, 7, 15]]), 16), batch()
    teacher = torch.randn(2, 16, 5)
    elsewhere = torch.where(mask.hidden[..., None], torch.randn(2, 16, 5), teacher)
    first, second = (model(images, [features], mask) for features in (teacher, elsewhere))
    assert torch.equal(first.mimic, second.mimic)
    prediction = model.mimics[0](model.encoder(images, mask).tokens, {})
    target = torch.stack([teacher[b, mask.keep[b, k]] for b in range(2) for k in range(4)]).view(2, 4, 5)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(first.mimic, (prediction - target).square().mean())


def test_targets_choose_the_losses() -> None:
    images, teacher = batch(), [torch.randn(2, 16, 5)]
    pixels, mimic, entangled = (built(targets=t, teacher_dims=[] if t == "pixels" else [5]) for t in ("pixels", "mimic", "entangled"))
    out = pixels(images, mask=mask_of(pixels))
    assert out.mimic is None
    assert torch.equal(out.loss, out.pixel)
    out = mimic(images, teacher, mask_of(mimic))
    assert (out.pixel, out.prediction, mimic.decoder) == (None, None, None)
    out = entangled(images, teacher, mask_of(entangled))
    assert out.prediction.shape == (2, 12, 768)
    assert len(entangled.mimics) == 0
    shuffled = teacher[0].clone()
    rows = out.mask.keep[0]
    shuffled[0, rows] = 0  # teacher features of visible tokens are not its target
    assert torch.equal(entangled(images, [shuffled], out.mask).mimic, out.mimic)


def test_raw_pixels_are_the_target_without_norm_pix() -> None:
    model = built(targets="pixels", norm_pix=False)
    images, mask = batch(), mask_of(model)
    out = model(images, mask=mask)
    truth = patchify(images, (16, 16)).gather(1, mask.masked[..., None].expand(-1, -1, 768))
    torch.testing.assert_close(out.pixel, (out.prediction - truth).square().mean())


def test_focus_keeps_what_the_teacher_looks_at() -> None:
    score = torch.tensor([[0.0, 0.1, 0.6, 0.3, 0, 0, 0, 0]]).expand(400, -1)
    assert focused_mask(score[:1], 2, "top").keep.tolist() == [[2, 3]]
    sampled = focused_mask(score, 1, generator=torch.Generator().manual_seed(0)).keep.flatten().bincount(minlength=8) / 400
    torch.testing.assert_close(sampled, score[0], atol=0.06, rtol=0)
    model = built(focus="top", teacher_dims=[5])
    weights = torch.rand(2, 16)
    out = model(batch(), [torch.randn(2, 16, 5)], score=weights)
    assert torch.equal(out.mask.keep, weights.topk(4).indices)
    assert model(batch(), [torch.randn(2, 16, 5)]).mask.kept == 4  # without attention: at random


# -- published sizes, groups


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    million = {"small": 21.9, "base": 84.6, "large": 322.0, "huge": 679.5}
    with torch.device("meta"):
        for name, expected in million.items():
            settings = {k: v for k, v in SIZES[name].items() if not k.startswith("decoder")}
            assert sum(p.numel() for p in Classifier(0, **settings).parameters()) / 1e6 == pytest.approx(expected, abs=0.06), name
        base = MRMAE(targets="pixels", **SIZES["base"])
        tuned = Classifier(1000, **{k: v for k, v in SIZES["base"].items() if not k.startswith("decoder")})
        plain = MRMAE(targets="pixels", **SIZES["vit_base"])
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == 114_790_528
    assert sum(p.numel() for p in base.parameters()) + base.decoder.positions.numel() == 115_041_408
    assert sum(p.numel() for p in tuned.parameters()) == 85_374_824
    assert sum(p.numel() for p in plain.encoder.parameters()) / 1e6 == pytest.approx(85.6, abs=0.3)


@pytest.mark.parametrize("size", list(SIZES))
def test_published_sizes_take_a_real_step(size: str) -> None:
    torch.manual_seed(0)
    kind = torch.bfloat16 if size in ("large", "huge") else torch.float32  # half the memory
    model = MRMAE(**SIZES[size], teacher_dims=[768]).to(kind)
    images, teacher = torch.randn(1, 3, 224, 224).to(kind), torch.randn(1, 196, 768).to(kind)
    mask = random_mask(1, 196, 0.75, generator=torch.Generator().manual_seed(0))
    update = torch.optim.SGD(model.parameters(), lr=0.01)
    first = model(images, [teacher], mask)
    first.loss.backward()
    update.step()
    with torch.no_grad():
        second = model(images, [teacher], mask)
    assert second.pixel < first.pixel
    assert second.mimic < first.mimic
    assert first.prediction.shape == (1, 147, 768)


def test_decay_spares_vectors_and_reaches_the_mask_token() -> None:
    model = built(targets="pixels")
    off, on = pretraining_groups(model, 0.05)
    assert (off["weight_decay"], on["weight_decay"]) == (0.0, 0.05)
    assert any(p is model.decoder.mask_token for p in on["params"])
    assert all(p.ndim == 1 for p in off["params"])
    assert all(p is not model.encoder.pos_embed for p in off["params"] + on["params"])  # fixed


def test_fine_tuning_groups_cover_each_parameter_once() -> None:
    model = Classifier(3, **BACKBONE, drop_path=0.2)
    groups = fine_tuning_groups(model, 0.5, 0.05)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert (scale["head.weight"], scale["blocks3.2.mlp.fc1.bias"], scale["blocks3.0.norm1.weight"], scale["blocks2.0.conv1.weight"]) == (
        1.0,
        0.5,
        0.125,
        0.0625,
    )
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks3]
    assert [getattr(model.blocks1[0].drop_path, "drop_prob", 0.0), model.blocks2[0].drop_path.drop_prob, *rates] == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2]
    )


# -- dense backbones


def test_dense_backbones_give_four_scales_and_learn_their_biases() -> None:
    settings = BACKBONE | {"stage_depths": (1, 1, 4)}
    detection = DetectionBackbone(window=2, global_blocks=(0, 3), **settings)
    maps = detection(batch())
    assert {name: tuple(m.shape[1:]) for name, m in maps.items()} == {
        "s0": (8, 16, 16),
        "s1": (12, 8, 8),
        "s2": (16, 4, 4),
        "s3": (16, 2, 2),
    }
    pyramid = FeaturePyramidNetwork(list(detection.channels), 8)(maps)  # torchvision's, as its Mask R-CNN uses it
    assert [m.shape[1] for m in pyramid.values()] == [8] * 4
    segmentation = SegmentationBackbone(**settings).eval()
    assert [tuple(m.shape[1:]) for m in segmentation(batch())] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (16, 1, 1)]
    sum(m.square().mean() for m in [*maps.values(), *segmentation(batch())]).backward()
    for table in (detection.windowed_rel_pos_bias, detection.global_rel_pos_bias, segmentation.blocks3[0].attn):
        assert table.relative_position_bias_table.grad.abs().sum() > 0


def test_windows_confine_attention() -> None:
    torch.manual_seed(0)
    images = batch(128)
    other = images.clone()
    other[:, :, 112:, 112:] += 1  # the last patch; convolutions reach 24 pixels further
    for everywhere in ((), (1,)):
        model = DetectionBackbone(window=2, global_blocks=everywhere, **BACKBONE | {"image_size": 128}).eval()
        difference = (model(images)["s2"] - model(other)["s2"]).abs().amax((0, 1))
        assert difference[7, 7] > 1e-3
        assert (difference[:4].max() > 0) == bool(everywhere)


# -- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 50}, r"image_size=50: expected a multiple of the patch of 16 pixels; the nearest are 48 and 64"),
        ({"mask_ratio": 0.99}, r"ratio=0.99 keeps 0 of 16 tokens"),
        ({"mask_ratio": 0.01, "image_size": 16}, r"keeps 0 of 1 tokens"),
        ({"num_heads": 3}, r"num_heads=3: expected a divisor of the last stage's 16 channels"),
        ({"stage_depths": (1, 3)}, r"stage_depths=\[1, 3\]: expected 3 entries"),
        ({"targets": "both"}, r"targets='both' with teacher_dims=\[\]"),
        ({"teacher_dims": [5, 6], "mimic_weights": [1, 2, 3]}, r"mimic_weights=\[1, 2, 3\]"),
        ({"teacher_dims": [5], "mimic_layers": [4]}, r"mimic_layers=\[4\]: expected block numbers 1 to 3"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRMAE(**(TINY | {"targets": "both" if "teacher_dims" in changes else "pixels"} | changes))


def test_wrong_inputs_are_named() -> None:
    model = built(teacher_dims=[5])
    with pytest.raises(ValueError, match=r"expected \(B, 3, 64, 64\), found \(2, 3, 48, 48\)"):
        model(batch(48), [torch.randn(2, 16, 5)])
    with pytest.raises(
        ValueError, match=r"expected a 4x4 grid as the student's, found 3x3; give the teacher an input of 4 times its patch"
    ):
        model(batch(), [torch.randn(2, 9, 5)])
    with pytest.raises(ValueError, match=r"expected 5 channels \(teacher_dims\), found 6"):
        model(batch(), [torch.randn(2, 16, 6)])
    with pytest.raises(ValueError, match=r"expected features of 1 teachers, found 0"):
        model(batch())
    with pytest.raises(ValueError, match=r"mask: expected \(2, 16\)"):
        model(batch(), [torch.randn(2, 16, 5)], random_mask(2, 9, 0.5))
    with pytest.raises(ValueError, match=r"distinct positions"):
        from_keep(torch.tensor([[1, 1]]), 16)
    with pytest.raises(ValueError, match=r"expected positions 0 to 15, found 3 to 16"):
        from_keep(torch.tensor([[3, 16]]), 16)
    with pytest.raises(ValueError, match=r"expected \(2, 4\) tokens of the teacher's 6 channels"):
        mimic_loss(torch.randn(2, 4, 5), torch.randn(2, 16, 6), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"window=3: expected a divisor of the 4x4 grid"):
        DetectionBackbone(window=3, **BACKBONE)
    with pytest.raises(ValueError, match=r"mask: expected \(2, 16\)"):
        Encoder(**BACKBONE)(batch(), random_mask(3, 16, 0.5))
