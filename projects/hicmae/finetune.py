"""Fine-tune one fold: `python -m projects.hicmae.finetune --config projects/hicmae/recipes/crema-d.yaml --data-root D`; all folds: `evaluate`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from common.checkpoint import save_model, write_text, written_aside
from common.data import checksum, root
from common.engine import Training, budget, check_recipe, fit, seed_everything
from common.recipe import parse, read, to_yaml
from common.schedule import scaled_lr
from common.weights import read_state_dict
from projects.hicmae import pretrain
from projects.hicmae.augment import mixing
from projects.hicmae.data import DATASETS, EmotionClips, EmotionSet, Fold, emotion_set, read_fold, read_speech
from projects.hicmae.emotion import EmotionModel, ccc_loss, pcc_loss, soft_cross_entropy
from projects.hicmae.metrics import average_views, categorical, dimensional
from projects.hicmae.model import Modality
from projects.hicmae.optim import adamw, lr_at
from projects.hicmae.pretrain import Architecture, is_main, sizes
from projects.hicmae.talkers import CLASSES, SyntheticTalkers
from projects.hicmae.weights import load_reference, place_state

RECIPES = Path(__file__).parent / "recipes"
TALKERS = EmotionSet("", 1, CLASSES)
SHARED = (
    "image_size",
    "frames",
    "patch_size",
    "tubelet",
    "audio_size",
    "audio_patch_size",
    "embed_dim",
    "num_heads",
    "depth",
    "fusion_depth",
)
TRAIN_SEED, TEST_SEED = 10_000, 20_000
"""Added to a run's seed for labelled and for test talkers, so that no clip is in two sets."""


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning and its test; defaults are those of CREMA-D, five folds."""

    name: str = "crema-d"
    """Of the recipe's file and of the run folder."""
    data: str = "crema-d"
    """One of the nine data sets (`data.DATASETS`), `speech` (96 clips of RAVDESS, sound alone), or `talkers` (drawn)."""
    path_map: dict[str, str] = field(default_factory=dict)
    """Prefixes of the lists' paths to replace: {old: new}."""
    frame_ext: str | None = None
    """Extension of the face images; not given: the data set's."""
    folds: list[PositiveInt] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Folds of a row; their test samples are pooled."""
    fold: PositiveInt = 1
    """Fold of one run."""
    pretrain: str = "pretrain-base"
    """Recipe whose encoders this starts from, trained first if need be; `none`: from scratch."""
    ablate: dict[str, Any] = field(default_factory=dict)
    """Fields of the pre-training's architecture that differ from its recipe, for ablations; its run folder names them."""
    weights: str | None = None
    """Checkpoint to start from in its place: a released file, or a run folder; `{fold}` in it stands for the fold's number."""
    model: Architecture = field(default_factory=Architecture)
    """Sizes where there is no `pretrain` recipe; else that recipe's are used."""
    modality: Modality = "av"
    """One modality: its encoder alone."""
    feature_fusion: Literal["weighted", "last"] = "weighted"
    """Of an encoder's levels."""
    drop_path: ClosedUnitInterval = 0.1
    """Stochastic depth of each stack's last block."""
    loss: Literal["mse", "ccc", "pcc"] = "mse"
    """Of a dimensional task; classes have soft-target cross entropy."""
    stride: PositiveInt = 4
    """Frames between two frames of a clip."""
    segments: PositiveInt = 2
    """Stretches of a test sample."""
    augmented: bool = True
    """RandAugment, crops, flips, erasing and gain."""
    test_gain: bool = False
    """Draw the sound's gain in validation and test too, as the reference does."""
    mixup: NonNegativeFloat = 0.8
    """Alpha; 0 = none."""
    cutmix: NonNegativeFloat = 1.0
    """Alpha; 0 = none."""
    smoothing: ClosedUnitInterval = 0.1
    """Of the labels."""
    labels_per_class: PositiveInt = 8
    """Labelled talkers a class."""
    test_clips: PositiveInt = 400
    """Talkers in the test."""
    training: Training = field(default_factory=lambda: Training(epochs=50, precision="fp16"))
    """Length and arithmetic."""
    batch_size: PositiveInt = 14
    """Clips a process."""
    base_lr: PositiveFloat = 1e-3
    """Peak rate at 256 clips."""
    min_lr: NonNegativeFloat = 1e-6
    """Last rate at 256 clips."""
    warmup_epochs: NonNegativeFloat = 5.0
    """Epochs of the rise from 0."""
    weight_decay: NonNegativeFloat = 0.05
    """Of matrices."""
    layer_decay: ClosedUnitInterval = 0.75
    """Factor of the rate from a layer to the one below."""
    select: Literal["best", "last", "given"] = "best"
    """What is tested: the best epoch on the validation list (the reference; its list is the test list in most sets), the last epoch, or `weights`, a
    fine-tuned model, as given, without training."""
    validate_every: PositiveInt = 1
    """Epochs between validations."""
    compare: list[Literal["audio", "video", "scratch", "no-contrast", "no-skip", "top-contrast", "last-feature"]] = field(
        default_factory=list
    )
    """Measured beside the row by `evaluate`: one modality, no pre-training, and ablations of either stage."""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Seeds of a row."""
    seed: NonNegativeInt = 0
    """Of one run."""
    workers: NonNegativeInt = 0
    """Processes that read clips."""
    skip_bad: bool = False
    """Put the next row in place of one that cannot be read, and count; else stop."""
    data_root: str | None = None
    """Folder of the data sets; default: the environment variable CONTRAMASK_DATA."""
    out: str = "runs/hicmae"
    """Where run folders go."""

    def __post_init__(self) -> None:
        if self.data not in ("speech", "talkers"):
            emotion_set(self.data)
        if self.data == "speech" and self.modality != "a":
            raise ValueError(f"data speech holds sound alone: expected modality a, found {self.modality}")
        if (most := max([self.fold, *self.folds])) > about(self).folds:
            raise ValueError(f"fold {most}: {self.data} has folds 1 to {about(self).folds}")

    @property
    def folder(self) -> Path:
        place = Path(self.out) / self.name / f"seed-{self.seed}"
        return place / f"fold-{self.fold}" if about(self).folds > 1 else place


def about(recipe: Recipe) -> EmotionSet:
    """Classes or dimensions of the recipe's data set."""
    if recipe.data == "talkers":
        return TALKERS
    return replace(DATASETS["ravdess"], folds=1) if recipe.data == "speech" else DATASETS[recipe.data]


class Sets(NamedTuple):
    """Clips of one fold; `labels` and `recordings` of the test's rows (of the validation's with `validation_`)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    labels: Tensor
    recordings: Tensor  # group number of each test row
    validation_labels: Tensor
    files: list[Path]


def load(recipe: Recipe, model: Architecture) -> Sets:
    """Clips of the recipe's fold."""
    if recipe.data == "talkers":
        options: dict[str, Any] = dict(zip(("frames", "bins"), model.audio_size, strict=True)) | {"size": model.image_size}
        train = SyntheticTalkers(TRAIN_SEED + recipe.seed, 4 * recipe.labels_per_class, **options)
        test = SyntheticTalkers(TEST_SEED + recipe.seed, recipe.test_clips, **options)
        labels = torch.tensor(test.labels)
        return Sets(train, test, test, labels, torch.arange(len(test)), labels, [])
    folder = root(recipe.data_root)
    fold: Fold
    if recipe.data == "speech":
        fold = read_speech(folder)
    else:
        fold = read_fold(recipe.data, recipe.fold, data_root=folder, path_map=recipe.path_map, modality=recipe.modality)
    options = {
        "modality": recipe.modality,
        "stride": recipe.stride,
        "segments": recipe.segments,
        "frame_ext": recipe.frame_ext or about(recipe).frame_ext,
        "augmented": recipe.augmented,
        "test_gain": recipe.test_gain,
        "skip_bad": recipe.skip_bad,
    }
    names = sorted({row.recording for row in fold.test})
    return Sets(
        EmotionClips(fold.train, "train", sizes(model), **options),
        EmotionClips(fold.validation, "validate", sizes(model), **options),
        EmotionClips(fold.test, "test", sizes(model), **options),
        torch.tensor([row.label for row in fold.test]),
        torch.tensor([names.index(row.recording) for row in fold.test]),
        torch.tensor([row.label for row in fold.validation]),
        fold.files,
    )


def pretraining(recipe: Recipe) -> pretrain.Recipe | None:
    """The recipe of the pre-training that this one starts from, with its seed, data and folders."""
    if recipe.pretrain == "none":
        return None
    found = read(pretrain.Recipe, RECIPES / f"{recipe.pretrain}.yaml", seed=recipe.seed, data_root=recipe.data_root, out=recipe.out)
    changes = "".join(f"-{name}={value}" for name, value in recipe.ablate.items()).replace(" ", "")
    return replace(found, name=found.name + changes, model=replace(found.model, **recipe.ablate))


def build(recipe: Recipe, before: pretrain.Recipe | None) -> EmotionModel:
    """The model with the weights that it starts from.

    Raises:
        ValueError: `select: given` without weights, or weights that do not fit.
    """
    if recipe.weights is None and recipe.select == "given":
        raise ValueError(
            "select: given tests a fine-tuned model, found no weights; give its file or run folder: --weights 'DIR/fold{fold}.pth'"
        )
    sized = before.model if before is not None else recipe.model
    shared = {name: getattr(sized, name) for name in SHARED}
    model = EmotionModel(
        about(recipe).outputs,
        **shared,
        fusion_order=sized.fusion_order,
        drop_path=recipe.drop_path,
        modality=recipe.modality,
        feature_fusion=recipe.feature_fusion,
    )
    if recipe.weights is not None:
        place = Path(recipe.weights.replace("{fold}", str(recipe.fold)))
        if place.is_dir():
            place_state(model, read_state_dict(place / "model.safetensors"), str(place), whole=recipe.select == "given")
        else:
            load_reference(model, place, whole=recipe.select == "given")
        _warn_of_other_inputs(sized, place)
    elif before is not None:
        place_state(model, pretrain.main(before).state_dict(), before.name)
    return model


def _warn_of_other_inputs(sized: Architecture, place: Path) -> None:
    """Positions are a fixed table over the flat token number and in no checkpoint: with other input sizes they mean other places."""
    there = json.loads((place / "config.json").read_text()) if place.is_dir() else asdict(Architecture())
    pairs = [(name, there[name], getattr(sized, name)) for name in ("image_size", "frames", "audio_size")]
    if differing := ", ".join(f"{name} {old} there, {new} here" for name, old, new in pairs if old != new):
        warnings.warn(f"{place}: trained on inputs of another size ({differing}); its positions shift their meaning", stacklevel=3)


@torch.no_grad()
def scores(model: EmotionModel, data: Dataset[Any], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Outputs (N, K) in double precision, softmaxed for classes, of every item of `data`, and the row (N,) of each; processes share the items."""
    model.eval()
    device = next(model.parameters()).device
    state = PartialState()
    own = Subset(data, range(state.process_index, len(data), state.num_processes))  # type: ignore[arg-type]
    found, rows = [torch.empty(0, about(recipe).outputs, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    for video, audio, _, number in DataLoader(own, batch_size=2 * recipe.batch_size, num_workers=recipe.workers):
        output = model(video.to(device), audio.to(device)).output.double()
        found.append((output.softmax(-1) if about(recipe).classes else output).cpu())
        rows.append(number)
    mine = (torch.cat(found), torch.cat(rows))
    if state.num_processes > 1:
        everyone: list[Any] = [None] * state.num_processes
        dist.all_gather_object(everyone, mine)
        mine = tuple(torch.cat(part) for part in zip(*everyone, strict=True))  # type: ignore[assignment]
    order = mine[1].argsort(stable=True)
    return mine[0][order], mine[1][order]


def measure(labels: Tensor, found: Tensor, kind: EmotionSet) -> dict[str, float]:
    """The tables' figures in per cent."""
    if kind.classes:
        m = categorical(labels, found)
        shares = {"WAR (%)": m.war, "UAR (%)": m.uar, "WA-F1 (%)": m.weighted_f1}
    else:
        d = dimensional(labels, found)
        shares = {"mean CCC (%)": float(d.ccc.mean()), "mean PCC (%)": float(d.pcc.mean()), "mean ACC (%)": float(d.acc.mean())}
        shares |= {
            f"{name} {dim} (%)": float(getattr(d, name.lower())[i]) for i, dim in enumerate(kind.dimensions) for name in ("PCC", "CCC")
        }
    return {name: 100 * value for name, value in shares.items()}


def _loss(recipe: Recipe) -> Any:
    def loss(net: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        output = net(batch[0], batch[1]).output
        if about(recipe).classes:
            return {"loss": soft_cross_entropy(output, batch[2])}
        return {"loss": {"mse": F.mse_loss, "ccc": ccc_loss, "pcc": pcc_loss}[recipe.loss](output.float(), batch[2])}

    return loss


class Tested(NamedTuple):
    """Test of one fold: averaged scores (N, K) and labels (N,) or (N, D), figures of the tested epoch, and of the last."""

    scores: Tensor
    labels: Tensor
    figures: dict[str, float]
    last: dict[str, float]
    seconds: float


def main(recipe: Recipe) -> Tested:
    """Train one fold and test it, or go on, or read what an earlier call found; weights, figures and test scores stay in the run folder."""
    recipe = replace(
        recipe, seeds=[recipe.seed], folds=[recipe.fold], compare=[]
    )  # a run is one fold and seed, whichever row it belongs to
    folder, kind = recipe.folder, about(recipe)
    check_recipe(folder, to_yaml(recipe))
    kept = folder / "test.safetensors"
    if kept.is_file():
        told = json.loads((folder / "score.json").read_text())
        return Tested(**load_file(kept), **told)
    if recipe.select != "given" and _mixes(recipe) and recipe.batch_size % 2:
        raise ValueError(f"batch_size={recipe.batch_size}: mixup and CutMix pair the clips of a batch, expected an even number")
    before = pretraining(recipe)
    data = load(recipe, before.model if before is not None else recipe.model)
    seed_everything(recipe.seed)
    model, seconds = build(recipe, before), 0.0
    if recipe.select != "given":
        seconds = _train(model, recipe, data)
    model.to(PartialState().device)
    averaged, labels = _by_recording(*scores(model, data.test, recipe), data)
    last = figures = measure(labels, averaged, kind)
    if (folder / "best.safetensors").is_file():
        PartialState().wait_for_everyone()
        model.load_state_dict(load_file(folder / "best.safetensors"))
        averaged, labels = _by_recording(*scores(model, data.test, recipe), data)
        figures = measure(labels, averaged, kind)
    result = Tested(averaged, labels, figures, last, seconds)
    if is_main():
        save_model(model, folder, recipe=to_yaml(recipe))
        write_text(folder / "score.json", json.dumps({"figures": figures, "last": last, "seconds": result.seconds}))
        with written_aside(kept) as aside:
            save_file({"scores": averaged, "labels": labels}, aside)
    return result


def _mixes(recipe: Recipe) -> bool:
    """Whether mixup or CutMix is on: they mix the video of classes alone."""
    return bool(about(recipe).classes) and recipe.modality != "a" and bool(recipe.mixup or recipe.cutmix)


def _train(model: EmotionModel, recipe: Recipe, data: Sets) -> float:
    """Train the model in place; the weights of the best epoch, where they are wanted, stay in the run folder. Gives the seconds."""
    folder, kind = recipe.folder, about(recipe)
    alphas = (float(recipe.mixup), float(recipe.cutmix)) if _mixes(recipe) else (0.0, 0.0)
    loader: DataLoader[Any] = DataLoader(
        data.train,
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=recipe.workers,
        collate_fn=mixing(kind.outputs, recipe.smoothing, *alphas) if kind.classes else default_collate,
    )
    plan = budget(loader, recipe.training)
    clips = recipe.batch_size * recipe.training.accumulation * PartialState().num_processes
    peak, final = (scaled_lr(float(rate), clips) for rate in (recipe.base_lr, recipe.min_lr))
    warmup = min(round(recipe.warmup_epochs * plan.per_epoch), plan.total - 1)
    main_figure = "WAR (%)" if kind.classes else "mean CCC (%)"

    def validate(net: nn.Module, epoch: int) -> Mapping[str, float]:
        """Figures of one randomly placed clip a sample; the weights of the best epoch so far stay in the run folder."""
        found, rows = scores(net, data.validation, recipe)  # type: ignore[arg-type]
        figures = measure(data.validation_labels[rows], found, kind)
        best = folder / "best.json"
        if is_main() and (not best.is_file() or figures[main_figure] > json.loads(best.read_text())["value"]):
            with written_aside(folder / "best.safetensors") as aside:
                save_file({name: value.contiguous() for name, value in net.state_dict().items()}, aside)
            write_text(best, json.dumps({"epoch": epoch, "value": figures[main_figure]}))
        return {name: value for name, value in figures.items() if value == value}

    best_wanted = recipe.select == "best"
    fitted = fit(
        model,
        _loss(recipe),
        loader,
        adamw(model, peak, recipe.weight_decay, layer_decay=float(recipe.layer_decay)),
        recipe.training,
        folder,
        recipe=recipe,
        seed=recipe.seed,
        lr_at=lambda step: lr_at(step, total=plan.total, warmup=warmup, peak=peak, final=final),
        evaluate=validate if best_wanted else None,
        evaluate_every=recipe.validate_every if best_wanted else None,
    )
    return float(fitted.history[-1]["seconds"])


def _by_recording(found: Tensor, rows: Tensor, data: Sets) -> tuple[Tensor, Tensor]:
    """Scores and labels averaged over the views of a row and the rows of a recording."""
    groups = data.recordings[rows]
    first = torch.tensor([int((data.recordings == group).nonzero()[0]) for group in groups.unique()])
    return average_views(found, groups), data.labels[first]


def data_facts(recipe: Recipe) -> dict[str, str]:
    """For the record: name, split and checksum of the lists (or of the files, where they are few)."""
    if recipe.data == "talkers":
        return {"name": "synthetic talkers", "split": f"{recipe.test_clips} clips of other seeds", "sha256": "drawn on the fly"}
    if recipe.data == "speech":
        files = read_speech(root(recipe.data_root)).files
        return {"name": "RAVDESS speech, 96 clips", "split": "actors 10 to 12 (24 clips)", "sha256": checksum(files)}
    files = [
        path
        for fold in recipe.folds
        for path in read_fold(recipe.data, fold, data_root=root(recipe.data_root), path_map=recipe.path_map, modality=recipe.modality).files
    ]
    return {"name": recipe.data, "split": f"test lists of folds {recipe.folds}, pooled", "sha256": checksum(dict.fromkeys(files))}


if __name__ == "__main__":
    print(json.dumps(main(parse(Recipe)).figures))
