"""Formulas against their slowest honest version, the documented branches, bad input, checkpoints."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.point_cmae_step import plain_loss
from common.kernels.points import chamfer
from common.masking import from_hidden
from projects.point_cmae import model as module
from projects.point_cmae.augment import choose, rotate_y, scale_shift, scale_translate
from projects.point_cmae.class_contrast import ClassContrast
from projects.point_cmae.classifier import PointClassifier, apply_protocol, pre_sampled, vote
from projects.point_cmae.cpu_linear import linear
from projects.point_cmae.model import GroupEmbed, PointCMAE, contrast_term, group, max_of_linear, sample_points
from projects.point_cmae.optim import adamw, rate_at
from projects.point_cmae.segmenter import PartSegmenter, own_parts, part_scores
from projects.point_cmae.weights import load_complete, load_pretraining, official_names, ours_as_official, read_checkpoint, transfer

SMALL: dict[str, Any] = {"dim": 24, "depth": 2, "num_heads": 2, "num_group": 10, "group_size": 6, "widths": (8, 12, 16)}
DECODER = {"decoder_depth": 1, "decoder_heads": 2}


def clouds(batch: int = 3, count: int = 64, seed: int = 0) -> Tensor:
    return 2 * torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(seed)) - 1


def cmae(**changes: Any) -> PointCMAE:
    torch.manual_seed(0)
    return PointCMAE(**SMALL, **DECODER, **changes)


# -- the contrastive term ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "paired", "mse", "l2"])
def test_contrast_is_what_two_loops_give(kind: Any) -> None:
    out = cmae(contrast=kind).eval()(clouds(), generator=torch.Generator().manual_seed(1))
    one, two = out.branches
    both = one.mask.hidden & two.mask.hidden
    first, second = (torch.empty_like(b.features).scatter(1, b.mask.order[..., None].expand_as(b.features), b.features) for b in (one, two))
    terms = []
    for b, i in both.nonzero().tolist():
        cosines = F.cosine_similarity(first[b, i][None], second[b])
        difference = (first[b, i] - second[b, i]).square()
        terms.append({"dense": 1 - cosines.mean(), "paired": 1 - cosines[i], "mse": difference.mean(), "l2": difference.sum()}[kind])
    torch.testing.assert_close(out.contrast, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
    total, count = contrast_term(kind, one, two)
    assert count == both.sum()
    torch.testing.assert_close(out.loss, 1000 * out.reconstruction + total / count)


def test_dense_is_not_symmetric_and_paired_is() -> None:
    one, two = cmae().eval()(clouds(), generator=torch.Generator().manual_seed(1)).branches
    values = {kind: [contrast_term(kind, *pair)[0].item() for pair in ((one, two), (two, one))] for kind in ("dense", "paired")}
    assert abs(values["dense"][0] - values["dense"][1]) > 1e-4
    assert values["paired"][0] == pytest.approx(values["paired"][1], rel=1e-5)


def test_no_token_hidden_twice_counts_as_zero_and_is_said() -> None:
    model = cmae(mask_ratio=0.3)
    first = torch.zeros(2, 10, dtype=torch.bool)
    first[:, :3] = True
    with pytest.warns(UserWarning, match="no token is hidden by both masks"):
        out = model(clouds(2), [from_hidden(first), from_hidden(first.flip(1))])
    assert out.contrast == 0
    assert torch.isfinite(out.loss)


def test_dense_is_summed_in_float32_under_autocast() -> None:
    one, two = cmae().eval()(clouds(), generator=torch.Generator().manual_seed(1)).branches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = contrast_term("dense", one, two)[0]
    torch.testing.assert_close(rounded, contrast_term("dense", one, two)[0])


def test_the_plain_form_of_the_benchmark_has_the_same_loss() -> None:
    model = cmae().eval()
    masks = model.draw_masks(clouds()[:, :10], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(plain_loss(model, clouds(), masks), model(clouds(), masks).loss, rtol=1e-5, atol=1e-4)


def test_collapse_shows_in_cosine_and_spread() -> None:
    model = cmae()
    for decoder in model.decoders:
        with torch.no_grad():
            decoder.stack.blocks[-1].mlp.fc2.bias.fill_(1e4)
    out = model.eval()(clouds())
    assert out.cosine > 0.999
    assert out.spread < 1e-3


# -- masks and branches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["random", "block"])
def test_two_masks_are_exact_and_independent(mask: Any) -> None:
    model = PointCMAE(**{**SMALL, "num_group": 40}, **DECODER, mask=mask)
    centres = group(clouds(64, 128), 40, 6)[0]
    one, two = model.draw_masks(centres, generator=torch.Generator().manual_seed(0))
    assert (one.hidden.sum(1) == 24).all()
    assert (two.hidden.sum(1) == 24).all()
    shared = (one.hidden & two.hidden).float().sum(1).mean()
    assert shared == pytest.approx(24 * 24 / 40, abs=2.5 if mask == "block" else 1.0)
    assert not torch.equal(one.hidden, two.hidden)


def test_branches_have_their_own_decoder_and_class_token_and_share_the_encoder() -> None:
    model = cmae(drop_path=0.0).train()
    out = model(clouds(), generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(out.branches[1].reconstruction, list(model.parameters()), allow_unused=True)
    reached = {name for (name, _), grad in zip(model.named_parameters(), wanted, strict=True) if grad is not None and grad.abs().sum() > 0}
    assert {"class_tokens.1", "class_positions.1", "decoders.1.mask_token", "encoder.embed.first.weight"} <= reached
    assert not {name for name in reached if name.startswith(("decoders.0", "class_tokens.0", "class_positions.0"))}


def test_positions_are_added_at_every_block() -> None:
    model = cmae().eval()
    centres, groups = group(clouds(), 10, 6)
    tokens = model.encoder.embed(groups)
    x, at = tokens, model.encoder.positions(centres)
    for block in model.encoder.stack.blocks:
        x = block(x + at)
    torch.testing.assert_close(model.encoder.all_tokens(groups, centres, None, None)[0], model.encoder.stack.norm(x))


def test_hidden_groups_take_part_in_the_batch_statistics() -> None:
    model = cmae().train()
    points = clouds()
    model(points, generator=torch.Generator().manual_seed(0))
    rows = model.encoder.embed.first(group(points, 10, 6)[1].reshape(-1, 3))
    torch.testing.assert_close(model.encoder.embed.first_norm.running_mean, 0.1 * rows.mean(0))


def test_one_branch_is_plain_reconstruction() -> None:
    model = cmae(branches=1, contrast="none", class_token=False, reconstruction_weight=1.0).eval()
    out = model(clouds())
    assert out.loss == out.reconstruction == out.branches[0].reconstruction
    assert (out.contrast, out.cosine) == (0, 0)
    with pytest.raises(ValueError, match="no class token"):
        model.features(clouds())
    assert model.features(clouds(), "mean_max").shape == (3, 48)


def test_distances_may_replace_squared_ones() -> None:
    branch = cmae(chamfer="l1").eval()(clouds()).branches[0]
    distance = torch.cdist(branch.prediction.flatten(0, 1), branch.target.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(branch.reconstruction, (distance.amin(2).mean() + distance.amin(1).mean()) / 2)


def test_the_target_is_relative_to_its_centre_and_squared_distances_are_summed() -> None:
    out = cmae().eval()(clouds())
    branch = out.branches[0]
    assert (branch.target[:, :, 0] == 0).all()  # the nearest point of a centre is the centre
    distance = (branch.prediction.flatten(0, 1)[:, :, None] - branch.target.flatten(0, 1)[:, None]).square().sum(-1)
    torch.testing.assert_close(branch.reconstruction, distance.amin(2).mean() + distance.amin(1).mean())


# -- parts -------------------------------------------------------------------------------------------------------------------------


def test_fast_paths_give_the_gradients_of_the_plain_ones() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(12, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    plain = F.linear(x, weight, bias)
    for fast, slow in (
        (linear(x, weight, bias), plain),
        (linear(x, weight.T.contiguous().T[:, :5], bias), plain),
        (max_of_linear(x, weight, bias, 4), plain.view(3, 4, 7).amax(1)),
    ):
        torch.testing.assert_close(fast, slow)
        out = torch.linspace(-1, 1, slow.numel()).view_as(slow)
        for a, b in zip(*(torch.autograd.grad((y * out).sum(), (x, weight, bias), retain_graph=True) for y in (fast, slow)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_embedding_equals_the_concatenated_form() -> None:
    torch.manual_seed(0)
    embed, groups = GroupEmbed(24, (8, 12, 16)).train(), torch.randn(2, 5, 6, 3)
    got = embed(groups)
    x = F.relu(F.batch_norm(embed.first(groups.reshape(-1, 3)), None, None, embed.first_norm.weight, embed.first_norm.bias, True))
    x = embed.second(x).view(2, 5, 6, -1)
    x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], 3).reshape(60, -1)
    x = F.relu(
        F.batch_norm(F.linear(x, embed.third.weight, embed.third.bias), None, None, embed.third_norm.weight, embed.third_norm.bias, True)
    )
    torch.testing.assert_close(got, embed.last(x).view(2, 5, 6, -1).amax(2), rtol=1e-4, atol=1e-5)


def test_voting_averages_ten_views_of_presampled_points(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    classifier = PointClassifier(4, **SMALL).eval()
    monkeypatch.setattr(
        PointClassifier, "forward", lambda self, points: seen.append(points) or points.mean((1, 2))[:, None] * torch.ones(4)
    )
    logits = vote(classifier, clouds(2, 200), 100, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 10
    assert all(view.shape == (2, 100, 3) for view in seen)
    torch.testing.assert_close(logits, torch.stack([view.mean((1, 2))[:, None] * torch.ones(4) for view in seen]).mean(0))
    assert [pre_sampled(n, 10000) for n in (1024, 2048, 4096, 8192)] == [1200, 2400, 4800, 8192]
    assert pre_sampled(2048, 2048) == 2048
    with pytest.raises(ValueError, match="500 a cloud, 1024 wanted"):
        pre_sampled(1024, 500)


def test_augmentations_stay_in_their_ranges_and_choose_alike_for_the_batch() -> None:
    points, generator = clouds(200, 8), torch.Generator().manual_seed(0)
    moved = scale_translate(points, generator=generator)
    scale = (moved[:, 1] - moved[:, 0]) / (points[:, 1] - points[:, 0])
    assert 2 / 3 - 1e-3 <= scale.min() < 0.72
    assert 1.45 < scale.max() <= 1.5 + 1e-3
    torch.testing.assert_close(rotate_y(points, generator=generator).norm(dim=2), points.norm(dim=2))
    assert (rotate_y(points, generator=generator)[..., 1] - points[..., 1]).abs().max() < 1e-6
    angle = torch.linspace(0, 6, 200)
    rotation = torch.stack([torch.tensor([[a.cos(), 0, a.sin()], [0, 1, 0], [-a.sin(), 0, a.cos()]]) for a in angle])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # coordinates stay exact
        turned = rotate_y(points, angle=angle)
    torch.testing.assert_close(turned, points @ rotation)
    shrunk = scale_shift(points, generator=generator)
    ratio = (shrunk[:, 1] - shrunk[:, 0]) / (points[:, 1] - points[:, 0])
    torch.testing.assert_close(ratio[:, 0], ratio[:, 2], rtol=1e-3, atol=1e-4)
    same = torch.arange(8.0)[None, :, None].expand(3, 8, 3)
    picked = choose(same, 5, generator=generator)
    assert len(picked[0, :, 0].unique()) == 5
    assert torch.equal(picked[0], picked[2])


@pytest.mark.parametrize(("protocol", "head_trains"), [("linear", 4), ("mlp3", 12), ("frozen_mlp3", 10)])
def test_protocols_train_what_they_say_and_keep_the_encoder_in_the_mode_they_say(protocol: Any, head_trains: int) -> None:
    classifier = apply_protocol(PointClassifier(4, "linear" if protocol == "linear" else "mlp", **SMALL), protocol).train()
    trained = [name for name, p in classifier.named_parameters() if p.requires_grad]
    assert len(trained) == head_trains
    before = classifier.encoder.embed.first_norm.running_mean.clone()
    classifier.loss(clouds(), torch.tensor([0, 1, 2])).loss.backward()
    moved = not torch.equal(before, classifier.encoder.embed.first_norm.running_mean)
    assert moved is not protocol.startswith("frozen")
    assert classifier.encoder.training is not protocol.startswith("frozen")


def test_features_are_class_token_then_maximum_over_groups_alone() -> None:
    classifier = PointClassifier(4, **SMALL).eval()
    centres, groups = group(clouds(), 10, 6)
    tokens, class_token = classifier.encoder.all_tokens(groups, centres, classifier.class_token, classifier.class_position)
    torch.testing.assert_close(classifier.features(clouds()), torch.cat([class_token, tokens.max(1).values], 1))


def test_rates_change_by_epoch_or_by_step() -> None:
    plan = types.SimpleNamespace(per_epoch=4, total=40)
    late = rate_at(plan, peak=1e-3, epochs=9, warmup=2, clock="epoch")  # type: ignore[arg-type]
    assert [late(s) for s in (0, 3, 4, 7)] == [1e-6] * 4
    assert late(8) == late(11) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2)
    early = rate_at(plan, peak=1e-3, epochs=9, warmup=2, clock="step")  # type: ignore[arg-type]
    assert (early(0), early(8)) == (pytest.approx(1e-6), pytest.approx(1e-3))
    decay = {group["weight_decay"] for group in adamw(cmae(), 1e-3, 0.05).param_groups}
    assert decay == {0.05, 0.0}


# -- MAE and a standard contrastive loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["moco", "byol", "simsiam"])
def test_class_contrast_compares_a_masked_with_an_unmasked_pass(style: Any) -> None:
    student = cmae(branches=1, contrast="none", drop_path=0.0, contrast_weight=3.0)
    wrapped = ClassContrast(student, style, queue=8, momentum=0.9).train()
    out = wrapped(clouds(4))
    torch.testing.assert_close(out.loss, 1000 * out.reconstruction + 3 * out.contrast)
    out.loss.backward()
    assert all(p.grad is None for p in wrapped.teacher.parameters())
    assert wrapped.student.class_tokens[0].grad.norm() > 0
    if style == "moco":
        assert int(wrapped.queue.pointer) == 4
        torch.testing.assert_close(wrapped.queue.rows[:4].norm(dim=1), torch.ones(4))
    else:
        query, key = torch.randn(4, 24), torch.randn(4, 24)
        slow = -sum((key[i] / 0.1).softmax(0) @ (wrapped.predictor(query[i]) / 0.1).log_softmax(0) for i in range(4)) / 4
        torch.testing.assert_close(wrapped.compare(query, key), slow)
    before, own = wrapped.teacher[0].positions[0].weight.clone(), wrapped.student.encoder.positions[0].weight
    with torch.no_grad():
        own += 1
    wrapped.move_teacher()
    torch.testing.assert_close(wrapped.teacher[0].positions[0].weight, before + 0.1 * (own - before))


# -- sampling backends -------------------------------------------------------------------------------------------------------------


def test_pointnet2_ops_is_asked_by_two_calls_or_its_absence_said(monkeypatch: pytest.MonkeyPatch) -> None:
    points = clouds(2, 50)
    with pytest.raises(ImportError, match=r"not on PyPI \(github.com/erikwijmans"):
        module._pointnet2_centres(points, 4)
    with pytest.raises(ValueError, match="expects CUDA tensors"):
        sample_points(points, 4, ops="pointnet2_ops")
    calls: list[str] = []

    def furthest_point_sample(xyz: Tensor, count: int) -> Tensor:
        calls.append("sample")
        return module.farthest_points(xyz, count).int()

    def gather_operation(features: Tensor, index: Tensor) -> Tensor:
        calls.append("gather")
        assert features.is_contiguous()
        return features.gather(2, index.long()[:, None].expand(-1, 3, -1))

    stand_in = types.SimpleNamespace(furthest_point_sample=furthest_point_sample, gather_operation=gather_operation)
    monkeypatch.setitem(sys.modules, "pointnet2_ops", types.ModuleType("pointnet2_ops"))
    monkeypatch.setitem(sys.modules, "pointnet2_ops.pointnet2_utils", stand_in)  # type: ignore[arg-type]
    torch.testing.assert_close(module._pointnet2_centres(points, 4), sample_points(points, 4))
    assert calls == ["sample", "gather"]


def test_sampling_starts_at_the_first_point_and_skips_the_origin() -> None:
    points = clouds(2, 50)
    points[:, 7] = 0.01
    picked = sample_points(points, 50)
    assert torch.equal(picked[:, 0], points[:, 0])
    assert not (picked.norm(dim=2) < 0.0316).any()
    torch.testing.assert_close(sample_points(points, 8, ops="torch"), sample_points(points, 8, ops="auto"))


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def spoiled(what: str) -> Tensor:
    points = clouds()
    if what == "nan":
        points[1, 3, 0] = float("nan")
    return {
        "shape": points[..., :2],
        "integer": points.int(),
        "nan": points,
        "few": points[:, :5],
        "far": points * 20,
        "equal": torch.ones(3, 64, 3),
        "origin": points * 0.01,
    }[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"floating point \(B, N, 3\), got torch.float32 \(3, 64, 2\)"),
        ("integer", r"got torch.int32"),
        ("nan", r"1 values are NaN or infinite, 1 of them in sample 1"),
        ("few", r"5 a cloud for num_group=10 of group_size=6"),
        ("far", r"sample 0 has largest norm .*radius 10"),
        ("equal", r"all its points are equal"),
        ("origin", r"within 0.0316 of the origin"),
    ],
)
def test_clouds_that_cannot_be_grouped_are_refused(what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cmae()(spoiled(what))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": "cosine"}, "expected one of dense, paired, mse, l2, none"),
        ({"mask_ratio": 0.05}, "keeps 10 of 10"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"ops": "cuda"}, "auto, torch, triton, pointnet2_ops"),
        ({"branches": 1}, "no second view"),
        ({"mask": "tube"}, "random or block"),
        ({"chamfer": "cdl2"}, "expected l2 .* or l1"),
    ],
)
def test_wrong_settings_name_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCMAE(**{**SMALL, **DECODER, **changes})


def test_masks_of_another_number_or_shape_are_refused() -> None:
    hidden = torch.zeros(3, 10, dtype=torch.bool)
    hidden[:, :6] = True
    with pytest.raises(ValueError, match="expected 2 of shape"):
        cmae()(clouds(), [from_hidden(hidden)])
    hidden[0, 9] = True
    with pytest.raises(ValueError, match="equally many in each sample, found 3 to 4"):
        from_hidden(hidden)


def test_part_scores_refuse_parts_of_two_categories() -> None:
    with pytest.raises(ValueError, match="parts of one category"):
        own_parts(torch.zeros(1, 3, 50), torch.tensor([[0, 1, 30]]))
    with pytest.raises(ValueError, match="category: expected 0 to 1, found 5 to 5"):
        PartSegmenter(4, 2, **SMALL)(clouds(1), torch.tensor([5]))


def test_absent_parts_count_one_and_others_parts_are_not_predicted() -> None:
    scores = torch.zeros(1, 4, 50)
    scores[..., 49] = 9.0  # a table's part, never a bag's
    scores[0, :, 4] = 1.0
    prediction = own_parts(scores, torch.full((1, 4), 4))
    found = part_scores(prediction, torch.full((1, 4), 4))
    assert (prediction == 4).all()
    assert found.instance_miou == found.class_miou == found.accuracy == 1.0


# -- checkpoints -------------------------------------------------------------------------------------------------------------------


def official(model: PointCMAE, kind: str) -> dict[str, Tensor]:
    """As the reference would save it: its names, point-wise convolutions with a last axis."""
    names, state = official_names(model, kind), model.state_dict()
    pointwise = ("conv.", "convs", "increase_dim")
    return {
        official: state[name][..., None] if state[name].ndim == 2 and any(word in official for word in pointwise) else state[name]
        for name, official in names.items()
    }


def test_official_pretraining_files_load_and_start_both_branches_from_one(tmp_path: Path) -> None:
    baseline = cmae(branches=1, class_token=False, contrast="none")
    torch.save(
        {"base_model": {f"module.{k}": v for k, v in official(baseline, "one_branch").items()}, "epoch": 300}, tmp_path / "pretrain.pth"
    )
    state = read_checkpoint(tmp_path / "pretrain.pth")
    torch.manual_seed(1)
    model = PointCMAE(**SMALL, **DECODER)
    load_pretraining(model, state)
    for decoder in model.decoders:
        torch.testing.assert_close(decoder.state_dict(), baseline.decoders[0].state_dict())
    torch.testing.assert_close(model.encoder.state_dict(), baseline.encoder.state_dict())
    pair = official(model, "two_branches") | {"MAE_encoder.proj_cls.0.weight": torch.zeros(2)}
    again = PointCMAE(**SMALL, **DECODER)
    load_pretraining(again, pair)
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"missing 1 .*decoders.1.norm.bias"):
        load_pretraining(again, {name: value for name, value in pair.items() if name != "MAE_decoder_.norm.bias"})


def test_official_point_mae_weights_load_into_classifier_and_segmenter(tmp_path: Path) -> None:
    state = official(cmae(branches=1, class_token=False, contrast="none"), "one_branch")
    torch.save({"base_model": state}, tmp_path / "pretrain.pth")
    for model, kind in ((PointClassifier(4, **SMALL), "classifier"), (PartSegmenter(4, 2, **SMALL), "segmenter")):
        token = dict(model.named_parameters()).get("class_token")
        fresh = None if token is None else token.clone()
        report = transfer(model, read_checkpoint(tmp_path / "pretrain.pth"), kind)
        torch.testing.assert_close(model.encoder.positions[2].weight, state["MAE_encoder.pos_embed.2.weight"])
        torch.testing.assert_close(model.encoder.embed.third.weight, state["MAE_encoder.encoder.second_conv.0.weight"][..., 0])
        assert "MAE_decoder.norm.bias" in report.unexpected
        assert ("cls_token" in report.missing) is (kind == "classifier")
        if token is not None:
            assert torch.equal(token, fresh)


def test_the_class_token_stays_fresh_unless_asked_for() -> None:
    before = cmae()
    state = ours_as_official(before.state_dict(), before)
    classifier = PointClassifier(4, **SMALL)
    fresh = classifier.class_token.clone()
    assert "cls_token" in transfer(classifier, state, "classifier").missing
    assert torch.equal(classifier.class_token, fresh)
    transfer(classifier, state, "classifier", class_token=True)
    assert torch.equal(classifier.class_token, before.class_tokens[0])
    single = cmae(branches=1, contrast="none")  # as `class_contrast` trains it
    transfer(classifier, ours_as_official(single.state_dict(), single), "classifier", class_token=True)
    assert torch.equal(classifier.class_position, single.class_positions[0])


def test_numpy_numbers_beside_the_weights_are_admitted_and_code_is_not(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"a": torch.ones(2)}, "test_acc": np.float64(0.9), "epoch": np.int64(3)}, tmp_path / "part_seg.pth")
    assert read_checkpoint(tmp_path / "part_seg.pth")["a"].tolist() == [1, 1]
    torch.save({"model_state_dict": {"a": torch.ones(2)}, "args": types.SimpleNamespace(lr=1)}, tmp_path / "part_seg.pth")
    with pytest.raises(ValueError, match="it was not loaded"):
        read_checkpoint(tmp_path / "part_seg.pth")


def test_wrong_checkpoints_are_pointed_out(tmp_path: Path) -> None:
    classifier = PointClassifier(4, **SMALL)
    names = official_names(classifier, "classifier")
    whole = {names[k]: v for k, v in classifier.state_dict().items()}
    again = PointClassifier(4, **SMALL)
    load_complete(again, whole, "classifier")
    torch.testing.assert_close(again.state_dict(), classifier.state_dict())
    with pytest.raises(ValueError, match="has cls_head_finetune, a classifier's checkpoint"):
        load_pretraining(cmae(), whole)
    with pytest.raises(ValueError, match="it has no head"):
        load_complete(classifier, official(cmae(), "two_branches"), "classifier")
    with pytest.raises(ValueError, match=r"nothing of the encoder matched.* names under \['something'\]"):
        transfer(classifier, {"something.weight": torch.zeros(2)}, "classifier")
    torch.save({"optimizer": {}, "weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"\['optimizer', 'weights'\].*base_model, model"):
        read_checkpoint(tmp_path / "other.pth")


# -- the published size --------------------------------------------------------------------------------------------------------------


def test_the_published_size_takes_a_real_step() -> None:
    torch.manual_seed(0)
    model = PointCMAE()
    assert sum(p.numel() for p in model.parameters()) == 36_354_240 - 164_864  # without the unused projector
    optimizer = adamw(model, 1e-3, 0.05)
    before = model.encoder.stack.blocks[0].mlp.fc1.weight.detach().clone()
    out = model.train()(clouds(2, 1024), generator=torch.Generator().manual_seed(0))
    out.loss.backward()
    optimizer.step()
    assert out.branches[0].prediction.shape == (2, 38, 32, 3)
    assert torch.isfinite(out.loss)
    assert not torch.equal(before, model.encoder.stack.blocks[0].mlp.fc1.weight)
    assert all(p.grad is not None for p in model.parameters())


def test_chamfer_of_the_loss_is_the_squared_one() -> None:
    a, b = torch.zeros(1, 1, 3), torch.full((1, 1, 3), 2.0)
    assert chamfer(a, b) == 24.0  # 12 both ways, no half, no root


@pytest.fixture(autouse=True)
def _no_stray_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
