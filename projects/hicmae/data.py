"""The data sets of the paper's tables, read by the authors' released split files, and the clips that training and testing see.

Fine-tuning lists: `frame_folder wav_file label` a line, three numbers in place of the label for Werewolf-XL, separated by spaces, no header. Pre-training
list: `video.mp4 0` or, ours, `video.mp4 sound.wav`. Under the data root: `hicmae/` = a copy of the reference's `saved/data`.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor
from torch.utils.data import Dataset

from common.data import require
from projects.hicmae import augment, clips
from projects.hicmae.audio import RATE, model_input, random_gain
from projects.hicmae.model import Modality
from projects.hicmae.talkers import normalised

HOW = "the lists are in the reference's repository under saved/data: copy that folder to <data root>/hicmae; the README says where the media come from"


@dataclass(frozen=True)
class EmotionSet:
    """What the readers need to know of a data set (Sec. 6.1)."""

    lists: str
    """Folder of its lists under <data root>/hicmae."""
    folds: int
    classes: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = ()
    """Of a dimensional task, in the order of the list's columns."""
    metric: str = "WAR (%)"
    """The figure of the paper's table."""
    frame_ext: str = "jpg"
    validation: Literal["test", "val"] = "test"
    """List that the reference watches while training."""
    recording_parts: int = 0
    """Clips whose file names agree in the first so many parts between `_` are one recording, averaged in testing; 0 = every clip its own."""

    @property
    def outputs(self) -> int:
        return len(self.classes) or len(self.dimensions)


_MAFW = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety", "helplessness", "disappointment")
_LEVELS = ("level 0", "level 1", "level 2", "level 3", "level 4")
DATASETS: dict[str, EmotionSet] = {
    "mafw": EmotionSet("mafw/audio_visual/single", 5, _MAFW, frame_ext="png"),
    "mafw-43": EmotionSet("mafw/audio_visual/compound", 5, tuple(f"compound {i}" for i in range(43)), frame_ext="png"),
    "dfew": EmotionSet("dfew/audio_visual", 5, ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear"), validation="val"),
    "mer-multi": EmotionSet(
        "mer2023/audio_visual", 1, ("neutral", "angry", "happy", "sad", "worried", "surprise"), metric="WA-F1 (%)", validation="val"
    ),
    "crema-d": EmotionSet("crema-d/audio_visual", 5, ("anger", "disgust", "fear", "happy", "neutral", "sad")),
    "crema-d-4": EmotionSet("crema-d-4/audio_visual", 5, ("anger", "happy", "neutral", "sad")),
    "msp-improv": EmotionSet("msp-improv/audio_visual", 6, ("angry", "happy", "neutral", "sad"), validation="val"),
    "ravdess": EmotionSet("ravdess/audio_visual", 6, ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")),
    "iemocap": EmotionSet("iemocap/audio_visual", 5, ("angry", "happy", "neutral", "sad"), validation="val"),
    "werewolf-xl": EmotionSet("werewolf-xl/audio_visual", 5, dimensions=("arousal", "valence", "dominance"), metric="mean CCC (%)"),
    "avcaffe-arousal": EmotionSet("avcaffe/audio_visual/arousal", 1, _LEVELS, metric="WA-F1 (%)", recording_parts=3),
    "avcaffe-valence": EmotionSet("avcaffe/audio_visual/valence", 1, _LEVELS, metric="WA-F1 (%)", recording_parts=3),
}
"""Nine data sets; MAFW, CREMA-D and AVCAffe serve two tasks each. Class orders of DFEW, MER, IEMOCAP and AVCAffe are assumptions: no list was released."""


def emotion_set(name: str) -> EmotionSet:
    """The data set of that name (ValueError with the known names)."""
    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


@dataclass(frozen=True)
class Row:
    """One line of a fine-tuning list."""

    frames: Path | None  # folder of face images; None = sound alone
    sound: Path
    label: int | tuple[float, ...]
    origin: str  # "<list>, line <n>"
    recording: str = ""

    @property
    def name(self) -> str:
        return self.sound.stem


def _located(path: str, path_map: dict[str, str], root: Path) -> Path:
    mapped = Path(clips.map_path(path, path_map)).expanduser()
    return mapped if mapped.is_absolute() else root / mapped


def _check_prefix(path: Path, origin: str) -> None:
    """The first path of a list exists, or the part of it that does not is named."""
    if path.exists():
        return
    missing = next(part for part in [*reversed(path.parents), path] if not part.exists())
    raise FileNotFoundError(
        f"{origin}: {path} does not exist, from {missing} on; map the list's prefix to yours with path_map {{old prefix: new prefix}}"
    )


def read_list(
    path: str | Path, about: EmotionSet, *, path_map: dict[str, str] | None = None, root: str | Path = ".", modality: Modality = "av"
) -> list[Row]:
    """Rows of a fine-tuning list.

    Args:
        path_map: prefixes to replace in the list's paths. root: what relative paths are relative to.
        modality: whose files are looked for (the first row's only; each file is checked when it is read).
    Raises:
        FileNotFoundError: no such list, or its first row's files do not exist.
        ValueError: a header, another number of columns, a label that is not one of the classes or not finite, a row twice, no row.
    """
    path, rows = Path(path), []
    require(path, "fine-tuning list", HOW)
    width = 3 if about.classes else 2 + len(about.dimensions)
    form = "frames wav label" if about.classes else "frames wav " + " ".join(about.dimensions)
    known: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        origin, parts = f"{path}, line {number}", line.split()
        if not parts:
            continue
        commas = len(line.split(",")) == width
        if len(parts) != width or (commas and parts[0].endswith(",")):
            extra = "; the list is separated by commas" if commas else ""
            raise ValueError(f"{origin}: expected `{form}` separated by spaces, found {len(parts)} columns{extra}: {line[:80]!r}")
        label = _label(parts[2:], about, origin)
        if line in known:
            raise ValueError(f"{origin}: the same row as line {known[line]}; remove one")
        known[line] = number
        frames, sound = (_located(part, path_map or {}, Path(root)) for part in parts[:2])
        recording = "_".join(sound.stem.split("_")[: about.recording_parts]) if about.recording_parts else sound.stem
        rows.append(Row(frames, sound, label, origin, recording))
    if not rows:
        raise ValueError(f"{path}: expected rows `{form}`, found an empty file")
    if "v" in modality:
        _check_prefix(rows[0].frames, rows[0].origin)
    if "a" in modality:
        _check_prefix(rows[0].sound, rows[0].origin)
    return rows


def _label(parts: Sequence[str], about: EmotionSet, origin: str) -> int | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in parts)
    except ValueError as err:
        raise ValueError(f"{origin}: expected numbers as labels, found {' '.join(parts)!r}; lists have no header") from err
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{origin}: expected finite labels, found {' '.join(parts)}")
    if not about.classes:
        return values
    if values[0] != int(values[0]) or not 0 <= values[0] < len(about.classes):
        raise ValueError(f"{origin}: expected a class number 0 to {len(about.classes) - 1}, found {parts[0]}")
    return int(values[0])


def check_disjoint(train: Sequence[Row], test: Sequence[Row]) -> None:
    """No test row is a training row too (ValueError naming the first)."""
    trained = {row.sound: row.origin for row in train}
    for row in test:
        if row.sound in trained:
            raise ValueError(
                f"{row.origin}: {row.sound.name} is in the training list too ({trained[row.sound]}); remove it from one of them"
            )


@dataclass(frozen=True)
class Fold:
    """Rows of one fold, and the files that they come from."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    files: list[Path]


def read_fold(name: str, fold: int, *, data_root: str | Path, path_map: dict[str, str] | None = None, modality: Modality = "av") -> Fold:
    """Lists of one fold (from 1): train.csv, test.csv and, where the reference has one, val.csv.

    Where it released only val.csv or only test.csv of a fold (MSP-IMPROV: the same file), the one stands for both.
    """
    about = emotion_set(name)
    if not 1 <= fold <= about.folds:
        raise ValueError(f"fold={fold}: {name} has folds 1 to {about.folds}")
    folder = Path(data_root) / "hicmae" / about.lists / f"split{fold:02d}"
    options: dict[str, Any] = {"path_map": path_map, "root": data_root, "modality": modality}
    train = folder / "train.csv"
    val, test = folder / "val.csv", folder / "test.csv"
    test = test if test.is_file() or not val.is_file() else val
    val = val if about.validation == "val" and val.is_file() else test
    lists = {path: read_list(path, about, **options) for path in dict.fromkeys((train, val, test))}
    check_disjoint(lists[train], lists[test])
    return Fold(lists[train], lists[val], lists[test], list(lists))


def read_speech(data_root: str | Path) -> Fold:
    """96 clips of RAVDESS's speech without video (`ravdess/labels.csv`): sound alone, actors 10 to 12 held out."""
    folder = Path(data_root) / "ravdess"
    table = require(
        folder / "labels.csv", "RAVDESS speech, 96 clips", "columns file, emotion, actor, sex, split, seconds; wav files beside it"
    )
    classes = DATASETS["ravdess"].classes
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    with table.open() as stream:
        for number, line in enumerate(csv.DictReader(stream), start=2):
            if line["emotion"] not in classes or line["split"] not in parts:
                raise ValueError(f"{table}, line {number}: expected emotions {', '.join(classes)} and splits train, test, found {line}")
            sound = folder / line["file"]
            row = Row(None, sound, classes.index(line["emotion"]), f"{table}, line {number}", sound.stem)
            parts[line["split"]].append(row)
    check_disjoint(parts["train"], parts["test"])
    return Fold(parts["train"], parts["test"], parts["test"], [table, *(row.sound for rows in parts.values() for row in rows)])


# -- clips


@dataclass(frozen=True)
class Sizes:
    """Of the model's inputs."""

    image: int = 160
    frames: int = 16
    audio_frames: int = 256
    mel_bins: int = 128


def to_tensor(images: Sequence[Any]) -> Tensor:
    """(3, T, H, W), ImageNet-normalised, of RGB images of one size."""
    return normalised(torch.from_numpy(np.stack([np.asarray(image) for image in images])))


@dataclass
class _Skipping:
    """Which clips could not be read: raised, or skipped with a count that worker processes share."""

    skip: bool
    count: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_())

    def say(self, error: Exception) -> None:
        if not self.skip:
            raise error
        self.count += 1
        warnings.warn(f"skipped clip {int(self.count)}: {error}", stacklevel=3)


Stage = Literal["train", "validate", "test"]
FRAME_RATE = 25
"""Frames a second that a sound without video is cut by."""


class EmotionClips(Dataset[tuple[Tensor, Tensor, int | Tensor, int]]):
    """Fine-tuning clips (video, audio, label, number of the row); a missing modality is an empty tensor.

    Args:
        stage: "train" = a random stretch, augmented; "validate" = a random stretch; "test" = `segments` stretches of each row, in turn.
        stride: frames between two frames of a clip.
        test_gain: draw the sound's gain in validation and test too, as the reference does; testing then takes each stretch twice (its two
            spatial views are the same square frame).
        skip_bad: put the next row in place of one that cannot be read, and count; else raise.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        stage: Stage,
        sizes: Sizes,
        *,
        modality: Modality = "av",
        stride: int = 4,
        segments: int = 2,
        frame_ext: str = "jpg",
        augmented: bool = True,
        test_gain: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self.rows, self.stage, self.sizes, self.modality, self.stride = list(rows), stage, sizes, modality, stride
        self.segments, self.frame_ext, self.augmented, self.test_gain = segments, frame_ext, augmented, test_gain
        self.views = segments * (2 if test_gain else 1) if stage == "test" else 1
        self.bad = _Skipping(skip_bad)

    def __len__(self) -> int:
        return len(self.rows) * self.views

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, int | Tensor, int]:
        number, view = divmod(item, self.views)
        for step in range(len(self.rows)):
            chosen = (number + step) % len(self.rows)
            row = self.rows[chosen]
            try:
                return *self._read(row, view % self.segments), self._target(row), chosen
            except (ValueError, FileNotFoundError) as err:
                self.bad.say(type(err)(f"{row.origin}: {err}"))
        raise ValueError(f"none of the {len(self.rows)} clips could be read")

    @staticmethod
    def _target(row: Row) -> int | Tensor:
        return row.label if isinstance(row.label, int) else torch.tensor(row.label)

    def _read(self, row: Row, segment: int) -> tuple[Tensor, Tensor]:
        files = clips.frame_files(row.frames, self.frame_ext) if row.frames is not None else []
        sound = clips.read_wav(row.sound) if "a" in self.modality else None
        if not files and "v" in self.modality:
            raise ValueError("the row has no frames; use modality a")
        count = len(files) or max(1, round(len(sound) * FRAME_RATE / RATE))
        sizes = self.sizes
        if self.stage == "test":
            clip = clips.test_clips(count, sizes.frames, self.stride, self.segments)[segment]
        else:
            clip = clips.training_clip(count, sizes.frames, self.stride, clips.training_end(count, sizes.frames, self.stride))
        video = audio = torch.empty(0)
        if "v" in self.modality:
            images = clips.read_frames([files[i] for i in clip.frames])
            if self.stage == "train" and self.augmented:
                video = augment.training_view(images, sizes.image, to_tensor)
            else:
                video = to_tensor([image.resize((sizes.image, sizes.image), Resampling.BILINEAR) for image in images])
        if sound is not None:
            part = clips.cut(sound, *clip.share(count), origin=str(row.sound))
            gain = random_gain() if (self.stage == "train" and self.augmented) or self.test_gain else 1.0
            audio = model_input(part, sizes.audio_frames, sizes.mel_bins, gain=gain)
        return video, audio


class PretrainingClips(Dataset[tuple[Tensor, Tensor]]):
    """Unlabelled clips (video, audio) of a list of videos with sound, or (empty, audio) of rows without video.

    Args:
        pairs: video file and its sound file; None = the sound track of the video. A row without video is (None, wav).
        skip_bad: put the next pair in place of one that cannot be read, and count; else raise, naming the row.
    """

    def __init__(self, pairs: Sequence[tuple[Path | None, Path | None]], sizes: Sizes, *, stride: int = 4, skip_bad: bool = False) -> None:
        self.pairs, self.sizes, self.stride, self.bad = list(pairs), sizes, stride, _Skipping(skip_bad)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        for step in range(len(self.pairs)):
            chosen = (number + step) % len(self.pairs)
            try:
                return self._read(*self.pairs[chosen])
            except (ValueError, FileNotFoundError) as err:
                self.bad.say(type(err)(f"row {chosen + 1} of the list: {err}"))
        raise ValueError(f"none of the {len(self.pairs)} clips could be read")

    def _read(self, video: Path | None, sound: Path | None) -> tuple[Tensor, Tensor]:
        sizes, gain = self.sizes, random_gain()
        if video is None:
            waveform = clips.read_wav(sound)
            span = sizes.audio_frames * 160 + 400
            start = int(torch.randint(max(1, len(waveform) - span + 1), ()))
            return torch.empty(0), model_input(waveform[start : start + span], sizes.audio_frames, sizes.mel_bins, gain=gain)
        facts = clips.video_facts(video)
        start = clips.pretraining_start(facts.frames, sizes.frames, self.stride)
        clip = clips.pretraining_clip(facts.frames, sizes.frames, self.stride, start)
        waveform = clips.check_sound(clips.read_sound(video), str(video)) if sound is None else clips.read_wav(sound)
        seconds = len(waveform) / RATE
        if abs(seconds - facts.seconds) >= 0.1:
            warnings.warn(
                f"{video}: the video lasts {facts.seconds:.2f} s, its sound {seconds:.2f} s; they may not belong together", stacklevel=2
            )
        begin, end = (round(n / facts.rate * RATE) for n in (clip.first, clip.last + 1))
        part = waveform[begin:end]
        if len(part) < clips.SHORTEST:
            raise ValueError(
                f"{video}: the clip's sound has {len(part)} samples, expected at least {clips.SHORTEST}; its sound is too short"
            )
        images = clips.read_video(video, clip.frames)
        side = sizes.image if 160 <= sizes.image <= 224 else 160
        left, top, right, bottom = clips.face_box(facts.width, facts.height, side)
        faces = [image.crop((left, top, right, bottom)) for image in images]
        box = clips.draw_crop(*faces[0].size, sizes.image)
        faces = [face.crop(box).resize((sizes.image, sizes.image), Resampling.BILINEAR) for face in faces]
        return to_tensor(faces), model_input(part, sizes.audio_frames, sizes.mel_bins, gain=gain)


def read_video_list(path: str | Path, *, path_map: dict[str, str] | None = None, root: str | Path = ".") -> list[tuple[Path, Path | None]]:
    """(video, sound) of a pre-training list: `video.mp4 0` (sound by the reference's rule, or the video's own track where that file does
    not exist) or `video.mp4 sound.wav`.

    Raises:
        FileNotFoundError: no such list, or its first video does not exist. ValueError: another number of columns, a row twice.
    """
    path, pairs = Path(path), []
    require(path, "pre-training list", "one line a video: `video.mp4 0`, or `video.mp4 sound.wav`")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: expected `video 0` or `video sound.wav`, found {len(parts)} columns: {line[:80]!r}")
        video = _located(parts[0], path_map or {}, Path(root))
        sound = _located(parts[1] if parts[1] != "0" else clips.sound_of(parts[0]), path_map or {}, Path(root))
        pairs.append((video, sound if parts[1] != "0" or (sound.suffix == ".wav" and sound.exists()) else None))
    if not pairs:
        raise ValueError(f"{path}: expected lines `video 0`, found an empty file")
    if twice := [str(video) for video, times in Counter(video for video, _ in pairs).items() if times > 1]:
        raise ValueError(f"{path}: {len(twice)} videos are listed twice, {twice[0]} first; remove the repeats")
    _check_prefix(pairs[0][0], f"{path}, line 1")
    return pairs
