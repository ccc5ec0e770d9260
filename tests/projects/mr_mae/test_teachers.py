"""Teachers through timm, open_clip and a file; their features on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from projects.mr_mae import cache, teachers
from projects.mr_mae.cache import FeatureStore, stored
from projects.mr_mae.teachers import CLIP, IMAGENET, Features, load, renormalise

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def vit(folder: Path, **settings: Any) -> tuple[nn.Module, str]:
    """A small ViT of input 64 and the file of its weights."""
    torch.manual_seed(0)
    net = timm.create_model(NAME, num_classes=0, img_size=64, **VIT, **settings).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    path = folder / "teacher.safetensors"
    save_file(net.state_dict(), path)
    return net, str(path)


def test_a_local_vit_gives_patch_tokens_after_the_final_norm_and_its_class_attention(tmp_path: Path) -> None:
    net, path = vit(tmp_path)
    teacher = load(f"timm:{NAME}", grid=4, weights=path, settings=VIT)
    found = teacher(images(), 4)
    given = renormalise(images(), IMAGENET, (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]))
    tokens = net.forward_features(given)
    torch.testing.assert_close(found.tokens, tokens[:, 1:])  # class token dropped, raster order
    assert (teacher.dim, teacher.patch) == (16, 16)
    net.blocks[-1].attn.fused_attn = False
    weights: list[Tensor] = []
    net.blocks[-1].attn.attn_drop.register_forward_pre_hook(lambda _, given: weights.append(given[0]))
    net.forward_features(given)
    row = weights[0][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(found.score, row / row.sum(1, keepdim=True))


def test_a_teacher_is_frozen_whatever_its_owner_does(tmp_path: Path) -> None:
    teacher = load(f"timm:{NAME}", grid=4, weights=vit(tmp_path)[1], settings=VIT | {"proj_drop_rate": 0.5})
    nn.Module.train(nn.ModuleList([teacher]), True)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    found = teacher(images().requires_grad_(), 4)
    assert not found.tokens.requires_grad
    assert torch.equal(found.tokens, teacher(images(), 4).tokens)


def test_positions_of_a_file_are_resized_to_the_grid_and_images_to_the_patch(tmp_path: Path) -> None:
    _, path = vit(tmp_path)
    assert load(f"timm:{NAME}", grid=6, weights=path, settings=VIT)(images(96), 6).tokens.shape == (2, 36, 16)
    fourteen = load("timm:vit_tiny_patch16_224", grid=4, weights=vit(tmp_path, patch_size=14)[1], settings=VIT | {"patch_size": 14})
    assert fourteen(images(64), 4).tokens.shape == (2, 16, 16)  # 56 x 56 inside


def test_normalisation_is_the_teachers_own() -> None:
    pixels = torch.rand(1, 3, 2, 2)
    student, teacher = ((pixels - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None] for m, s in (IMAGENET, CLIP))
    torch.testing.assert_close(renormalise(student, IMAGENET, CLIP), teacher)
    assert renormalise(student, CLIP, CLIP) is student


def test_a_convolutional_network_gives_its_last_map(tmp_path: Path) -> None:
    settings = {"channels": [8, 8, 8, 16], "output_stride": 8, "stem_width": 8}
    net = timm.create_model("resnet10t", num_classes=0, **settings).eval()
    save_file({f"net.{k}": v for k, v in net.state_dict().items()} | {"head.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    found = load("timm:resnet10t", grid=4, weights=str(tmp_path), settings=settings)(images(32), 4)
    assert found.score is None
    torch.testing.assert_close(found.tokens, net.forward_features(images(32)).flatten(2).mT)


class FakeVisual(nn.Module):
    """What open_clip's image tower looks like from outside: class token first, tokens after ln_post, a projection."""

    def __init__(self, side: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 12, 16, stride=16)
        self.cls = nn.Parameter(torch.randn(12))
        block = nn.Module()
        block.ln_1, block.attn = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
        block.forward = lambda x: x + block.attn(block.ln_1(x), block.ln_1(x), block.ln_1(x), need_weights=False)[0]  # type: ignore[method-assign]
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([block])
        self.transformer.batch_first = True
        self.ln_post, self.proj, self.side = nn.LayerNorm(12), nn.Parameter(torch.randn(12, 5)), side
        self.output_tokens = False

    def embedded(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(len(x), 1, -1), self.conv(x).flatten(2).mT], 1)

    def forward(self, x: Tensor) -> Any:
        x = self.ln_post(self.transformer.resblocks[0](self.embedded(x)))
        return (x[:, 0] @ self.proj, x[:, 1:]) if self.output_tokens else x[:, 0] @ self.proj


def test_clip_through_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, pretrained: str, force_image_size: int) -> Any:
        asked.update(name=name, pretrained=pretrained, size=force_image_size)
        return SimpleNamespace(visual=FakeVisual(force_image_size))

    fake = SimpleNamespace(create_model=create, get_model_config=lambda _: {"vision_cfg": {"patch_size": 16}})
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    teacher = load("open_clip:ViT-B-16", grid=4, weights="clip.bin")
    assert asked == {"name": "ViT-B-16", "pretrained": "clip.bin", "size": 64}
    assert (teacher.dim, teacher.statistics) == (12, CLIP)
    found, net = teacher(images(), 4), teacher.net
    given = renormalise(images(), IMAGENET, CLIP)
    torch.testing.assert_close(found.tokens, net(given)[1])
    block = net.transformer.resblocks[0]
    x = block.ln_1(net.embedded(given))
    row = block.attn(x, x, x)[1][:, 0, 1:]  # averaged over heads
    torch.testing.assert_close(found.score, row / row.sum(1, keepdim=True))
    projected = load("open_clip:ViT-B-16", grid=4, projected=True)
    assert projected(images(), 4).tokens.shape == (2, 16, 5)
    assert projected.fingerprint() != teacher.fingerprint()


def test_an_image_tower_without_patches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no network")

    configs = {"RN50": {"vision_cfg": {"layers": [3, 4, 6, 3]}}, "ViT-B-16": {"vision_cfg": {"patch_size": 16}}}
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(create_model=create, get_model_config=configs.get))
    for name in ("RN50", "unheard-of"):
        with pytest.raises(ValueError, match=rf"teacher open_clip:{name}: expected a model .* whose image tower is a vision transformer"):
            load(f"open_clip:{name}", grid=14)
    with pytest.raises(FileNotFoundError, match=r"expected its weights in nowhere.pt, could not read or fetch them \(RuntimeError\)"):
        load("open_clip:ViT-B-16", grid=14, weights="nowhere.pt")


def test_teachers_of_other_settings_have_other_features(tmp_path: Path) -> None:
    _, path = vit(tmp_path)
    plain, other = (load(f"timm:{NAME}", grid=4, weights=path, settings=VIT | more) for more in ({}, {"act_layer": "quick_gelu"}))
    assert plain.fingerprint() != other.fingerprint()  # though the weights are the same
    assert plain.fingerprint() == load(f"timm:{NAME}", grid=4, weights=path, settings=dict(reversed(VIT.items()))).fingerprint()


def test_without_open_clip_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        load("open_clip:ViT-B-16", grid=14)


class Blocky(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 16).flatten(2).transpose(1, 2)


@pytest.mark.filterwarnings("ignore")
def test_any_module_from_a_file(tmp_path: Path) -> None:
    torch.jit.script(Blocky()).save(str(tmp_path / "t.pt"))
    teacher = load(f"file:{tmp_path / 't.pt'}", grid=4)
    assert teacher.dim == 3
    torch.testing.assert_close(teacher(images(), 4).tokens, Blocky()(images()))
    teacher.body = lambda net, x: Features(net(x)[:, :4], None)
    with pytest.raises(ValueError, match=r"expected a 3x3 grid as the student's, found 2x2; build it for input size 48"):
        teacher(images(), 3)


@pytest.mark.parametrize(
    ("spec", "weights", "error", "message"),
    [
        ("dino", None, ValueError, r"teacher 'dino': expected timm:<model>"),
        ("file:nowhere.pt", None, FileNotFoundError, r"nowhere.pt: no such file"),
        (f"timm:{NAME}", "nowhere.safetensors", FileNotFoundError, r"nowhere.safetensors: no such file"),
        (f"timm:{NAME}", ".", FileNotFoundError, r"train the teacher first"),
        ("timm:mixer_s16_224", None, ValueError, r"expected a VisionTransformer, a ResNet or a ConvNeXt, found MlpMixer"),
    ],
)
def test_teachers_that_are_not_there(
    spec: str, weights: str | None, error: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load(spec, grid=4, weights=weights)


def test_weights_that_nobody_has_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"found none and could not fetch them \(OSError\); name a file in weights"):
        load(f"timm:{NAME}", grid=4, settings=VIT)


# -- features on disk


def compute(numbers: range) -> Features:
    rows = torch.tensor(list(numbers)).float()
    return Features(rows[:, None, None].expand(-1, 4, 2), rows[:, None].expand(-1, 4))


def test_a_store_is_made_once_goes_on_after_a_kill_and_is_found_by_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD", 3)
    made: list[range] = []

    def counted(numbers: range) -> Features:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(numbers)
        return compute(numbers)

    about = {"teacher": "a", "data": {"sha256": "b"}}
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path, about, 8, counted, say=lambda _: None)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="expected 3 shards, found 2"):
        FeatureStore(folder)
    store = stored(tmp_path, about, 8, compute, say=lambda _: None)
    assert made == [range(3), range(3, 6)]
    assert [store[i].tokens[0, 0].item() for i in range(8)] == list(range(8))
    assert (len(store), store[7].score.tolist(), store[7].tokens.dtype) == (8, [7.0] * 4, torch.float32)
    monkeypatch.setattr(teachers, "load", None)
    stored(tmp_path, about, 8, None, say=lambda _: None)  # type: ignore[arg-type]  # nothing is computed again
    stored(tmp_path, about | {"teacher": "c"}, 8, compute, say=lambda _: None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path, {"teacher": "a"}, 8, compute, say=lambda _: None)
    file = next(store.folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"features-00000.safetensors: expected the bytes that were written"):
        stored(tmp_path, {"teacher": "a"}, 8, compute)
    with pytest.raises(FileNotFoundError, match=r"expected manifest.json"):
        FeatureStore(tmp_path / "nothing")
