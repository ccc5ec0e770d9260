"""The model's shapes, masks and errors, and the whole way from recipe to record."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import results
from common.checkpoint import load_model
from common.engine import Training
from common.masking import from_keep
from common.recipe import read
from common.results import read_records
from projects._skeleton import MaskedAutoencoder, evaluate
from projects._skeleton.data import digits
from tests.conftest import ROOT


def test_the_loss_is_over_the_hidden_patches_alone() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(depth=1)
    images = torch.rand(2, 1, 8, 8)
    mask = from_keep(torch.tensor([[0, 5, 6, 15], [1, 2, 3, 4]]), 16)
    output = model(images, mask)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(2, 16, 4)
    hidden = torch.stack([patches[i, mask.masked[i]] for i in range(2)])
    torch.testing.assert_close(output.loss, (output.prediction - hidden).square().mean())
    assert output.prediction.shape == (2, 12, 4)


def test_the_encoder_does_not_see_hidden_patches() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(depth=1).eval()
    images = torch.rand(1, 1, 8, 8)
    mask = from_keep(torch.tensor([[0]]), 16)
    other = images.clone()
    other[:, :, 4:] = 0
    torch.testing.assert_close(model(images, mask).prediction, model(other, mask).prediction)


def test_masks_come_from_the_generator() -> None:
    model = MaskedAutoencoder(depth=1)
    images = torch.rand(3, 1, 8, 8)
    drawn = [model(images, generator=torch.Generator().manual_seed(s)).mask.hidden for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1, 8, 8\), found \(2, 3, 8, 8\)"):
        MaskedAutoencoder()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="expected a multiple of patch_size=3"):
        MaskedAutoencoder(patch_size=3)


def test_the_demo_line_of_the_readme_learns_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in (ROOT / "projects/_skeleton/README.md").read_text().splitlines() if line.startswith("python"))
    assert shlex.split(line.partition("#")[0])[1:3] == ["-m", "projects._skeleton.evaluate"]
    monkeypatch.setattr(results, "demo_folder", lambda paper: tmp_path / "report")
    recipe = read(evaluate.Recipe, ROOT / shlex.split(line.partition("#")[0])[4])
    short = replace(recipe.pretrain, out=str(tmp_path), training=Training(epochs=10, checkpoint_every=0, log_every=5))
    found = evaluate.main(replace(recipe, pretrain=short, seeds=[0]))
    assert set(found) == {"k-NN accuracy (%)", "k-NN accuracy, untrained (%)"}
    assert len(read_records(tmp_path / "report")) == 2
    model = load_model(MaskedAutoencoder, short.folder)
    before = MaskedAutoencoder()
    images = digits().test[0]
    mask = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    assert model(images, generator=mask()).loss < 0.7 * before(images, generator=mask()).loss
