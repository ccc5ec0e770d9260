"""Sound, clips, lists, augmentation and measures: by hand where parity cases do not reach, and wrong input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from projects.hicmae import audio, augment, clips, data, metrics
from projects.hicmae.data import DATASETS, EmotionClips, PretrainingClips, Sizes, read_fold, read_list, read_speech, read_video_list
from projects.hicmae.talkers import SyntheticTalkers, talker

SMALL = Sizes(image=32, frames=16, audio_frames=64, mel_bins=32)


def tone(path: Path, seconds: float = 3.0, *, rate: int = 16000, channels: int = 1) -> Path:
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 300 * t) + 0.01 * np.random.default_rng(0).normal(size=len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.tile(wave[:, None], (1, channels)), rate, subtype="PCM_16")
    return path


def faces(folder: Path, count: int, extension: str = "jpg") -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 40), (4 * i % 256, 90, 30)).save(folder / f"frame_det_00_{i:06d}.{extension}")
    return folder


@pytest.fixture
def crema(tmp_path: Path) -> Path:
    """A data root with one tiny fold of CREMA-D in the released format: other people's prefix, 12 clips for training, 6 for testing."""
    lists = tmp_path / "hicmae" / "crema-d" / "audio_visual" / "split01"
    lists.mkdir(parents=True)
    for part, count in (("train", 12), ("test", 6)):
        lines = []
        for i in range(count):
            name = f"10{i:02d}_{part}"
            faces(tmp_path / "faces" / name / f"{name}_aligned", 20 + 70 * (i % 2))
            tone(tmp_path / "sound" / f"{name}.wav", 0.8 + 2.8 * (i % 2))
            lines.append(f"/share/faces/{name}/{name}_aligned /share/sound/{name}.wav {i % 6}")
        (lists / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


# -- sound


def test_silence_padding_and_the_dead_triangle() -> None:
    silent = audio.filter_bank(torch.zeros(800))
    assert silent.shape == (3, 128)
    assert float(silent[0, 0]) == pytest.approx(-15.9424, abs=1e-3)
    made = audio.model_input(torch.zeros(800), 5)
    assert float(made[0, 0, 0]) == pytest.approx(-1.278, abs=1e-3)
    assert float(made[0, 4, 0]) == pytest.approx(0.467, abs=1e-3)
    assert audio.mel_triangles(128)[:, 3].sum() == 0  # at 512 points the third triangle (counted from 0) covers no bin
    assert audio.frame_count(41600) == 258


def test_filter_bank_peaks_at_the_tone_and_takes_batches() -> None:
    t = torch.arange(16000) / 16000
    waves = torch.stack([torch.sin(2 * torch.pi * hertz * t) for hertz in (500.0, 2000.0)])
    found = audio.filter_bank(waves)
    torch.testing.assert_close(found[1], audio.filter_bank(waves[1]))
    mel = 1127 * np.log1p(np.array([20.0, 500.0, 2000.0, 8000.0]) / 700)
    step = (mel[3] - mel[0]) / 129
    for row, hertz in ((0, mel[1]), (1, mel[2])):
        assert abs(int(found[row].mean(0).argmax()) - ((hertz - mel[0]) / step - 1)) < 1.5
    with pytest.raises(ValueError, match="expected at least 400 samples"):
        audio.filter_bank(torch.zeros(399))


def test_gain_is_half_plus_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([audio.random_gain(generator) for _ in range(4000)])
    assert draws.mean() == pytest.approx(1.0, abs=0.01)
    assert draws.std() == pytest.approx((100 / (400 * 21)) ** 0.5, rel=0.05)


# -- clips


def test_cuts_that_are_too_short_take_the_whole_or_fail() -> None:
    wave = torch.randn(16000)
    assert len(clips.cut(wave, 0.0, 0.5)) == 8000
    assert clips.cut(wave, 0.5, 0.55) is wave
    with pytest.raises(ValueError, match="has 500 of 50000 samples, expected at least 1025"):
        clips.cut(torch.randn(50000), 0.0, 0.01)


def test_random_places_stay_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = {clips.pretraining_start(67, 16, 4, generator) for _ in range(60)}
    ends = {clips.training_end(67, 16, 4, generator) for _ in range(60)}
    assert (starts, ends) == ({0, 1, 2, 3}, {64, 65, 66})
    assert clips.training_end(64, 16, 4) is None
    left, top, right, bottom = clips.draw_crop(160, 160, 160, generator)
    assert 0 <= left < right <= 160
    assert 0 <= top < bottom <= 160
    assert clips.face_box(224, 224) == (32, 0, 192, 160)
    assert clips.face_box(224, 224, 192) == (16, 0, 208, 192)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: tone(p, rate=44100), "found 44100 Hz, 1 channels; convert it: ffmpeg"),
        (lambda p: tone(p, channels=2), "found 16000 Hz, 2 channels"),
        (lambda p: tone(p, 0.05), "expected at least 1025 samples, found 800"),
        (lambda p: soundfile.write(p, np.zeros(5000), 16000), "all 5000 samples are zero"),
        (lambda p: p.write_text("not a wav"), "cannot be read"),
        (lambda p: soundfile.write(p, np.full(5000, np.nan), 16000, subtype="FLOAT"), "found NaN"),
    ],
)
def test_bad_sound_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x.wav")
    with pytest.raises(ValueError, match=message):
        clips.read_wav(tmp_path / "x.wav")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file; extract it with ffmpeg, or .* path_map"):
        clips.read_wav(tmp_path / "x.wav")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        clips.frame_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"expected \*\.jpg, found png; set frame_ext"):
        clips.frame_files(faces(tmp_path / "a", 2, "png"))
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.jpg: expected a picture"):
        clips.read_frames([tmp_path / "bad.jpg"])
    with pytest.raises(FileNotFoundError, match="no such file; map"):
        clips.video_facts(tmp_path / "x.mp4")
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(ValueError, match="cannot be read"):
        clips.video_facts(tmp_path / "x.mp4")


def test_the_audio_visual_clip_is_decoded(shared_data: Path) -> None:
    path = shared_data / "ravdess" / "01-01-01-01-01-01-01_320x180.mp4"
    facts = clips.video_facts(path)
    assert (facts.frames, facts.width, facts.height) == (98, 320, 180)
    assert facts.seconds == pytest.approx(facts.sound_seconds, abs=0.1)
    one_by_one = clips.read_video(path, range(98))
    chosen = clips.read_video(path, [40, 44, 44, 90])
    for image, number in zip(chosen, (40, 44, 44, 90), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(one_by_one[number]))
    sound = clips.read_sound(path)
    assert len(sound) / 16000 == pytest.approx(facts.sound_seconds, abs=0.1)
    torch.testing.assert_close(clips.read_sound(path, 1.0, 2.0), sound[16000:32000])
    video, spectrogram = PretrainingClips([(path, None)], Sizes())[0]
    assert video.shape == (3, 16, 160, 160)
    assert spectrogram.shape == (1, 256, 128)
    assert float(spectrogram.std()) > 0.2


def test_sound_of_another_length_is_warned_of(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "ravdess" / "01-01-01-01-01-01-01_320x180.mp4"
    with pytest.warns(UserWarning, match=r"the video lasts 3\.27 s, its sound 3\.80 s"):
        PretrainingClips([(path, tone(tmp_path / "x.wav", 3.8))], SMALL)[0]


@pytest.mark.parametrize(
    ("name", "frames", "sound"),
    [
        ("v_Basketball_g01_c01.avi", 141, False),
        ("abseiling_k400.mp4", 250, True),
        ("mmaction2_demo.mp4", 280, False),
        ("mmaction2_test.avi", 164, True),
        ("nasa_13013.mp4", 325, True),
        ("h265_video.mp4", 10, False),
        ("av1_video.mkv", 125, False),
    ],
)
def test_other_containers_are_decoded(shared_data: Path, name: str, frames: int, sound: bool) -> None:
    path = shared_data / "decoderclips" / name
    facts = clips.video_facts(path)
    assert (facts.frames, facts.sound_seconds is not None) == (frames, sound)
    last = clips.read_video(path, [0, frames // 2, frames - 1])
    assert [image.size for image in last] == [(facts.width, facts.height)] * 3
    if not sound:
        with pytest.raises(ValueError, match="expected a sound track, found none"):
            clips.read_sound(path)


# -- lists

RELEASED = {
    "werewolf-xl": "/a/openface/02_03_72/02_03_72_aligned /a/audio_16k/02_03_72.wav 0.5 0.75 -0.5",
    "crema-d": "/a/openface/1001_DFA_ANG_XX/1001_DFA_ANG_XX_aligned /a/audio_16k/1001_DFA_ANG_XX.wav 0",
    "mafw": "/a/data/faces/00001 /a/data/audio_16k/00001.wav 10",
    "ravdess": "/a/openface/Actor_01/02-01-08-02-02-02-01/02-01-08-02-02-02-01_aligned /a/audio_16k/Actor_01/03-01-08-02-02-02-01.wav 7",
    "msp-improv": "/a/openface/MSP-IMPROV-S01A-F01-P-FM01/x_aligned /a/audio_16k/MSP-IMPROV-S01A-F01-P-FM01.wav 3",
    "avcaffe-arousal": "/a/faces/aiim001_task_1_12 /a/audio/aiim001_task_1_12.wav 4",
}


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_data_set_reads_its_lists(tmp_path: Path, name: str) -> None:
    about = DATASETS[name]
    labels = " ".join(["0.5"] * len(about.dimensions)) if about.dimensions else str(len(about.classes) - 1)
    line = RELEASED.get(name, f"/a/faces/x /a/audio/x.wav {labels}")
    frames, sound, *_ = line.replace("/a/", "media/").split()
    faces(tmp_path / frames, 1, about.frame_ext)
    tone(tmp_path / sound)
    folder = tmp_path / "hicmae" / about.lists / f"split{about.folds:02d}"
    folder.mkdir(parents=True)
    other = line.replace(".wav", "b.wav")
    (folder / "train.csv").write_text(other + "\n")
    (folder / ("val.csv" if about.validation == "val" else "test.csv")).write_text(line + "\n")
    tone(tmp_path / sound.replace(".wav", "b.wav"))
    fold = read_fold(name, about.folds, data_root=tmp_path, path_map={"/a": "media"})
    row = fold.test[0]
    assert row.frames == tmp_path / frames
    assert row.label == (tuple(map(float, line.split()[2:])) if about.dimensions else int(line.split()[2]))
    assert fold.validation == fold.test
    if about.recording_parts:
        assert row.recording == "aiim001_task_1" if name == "avcaffe-arousal" else "x"
    assert len(about.classes or about.dimensions) == about.outputs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "frames,wav,label\na,b,0",
            r"line 1: expected `frames wav label` separated by spaces, found 1 columns; the list is separated by commas",
        ),
        ("a, b, 0", "line 1: expected `frames wav label` separated by spaces, found 3 columns; the list is separated by commas"),
        ("frames wav label\na b 0", "line 1: expected numbers as labels, found 'label'; lists have no header"),
        ("a b 0\na b", "line 2: expected `frames wav label` separated by spaces, found 2 columns"),
        ("a b 6", "line 1: expected a class number 0 to 5, found 6"),
        ("a b 1.5", "line 1: expected a class number"),
        ("a b nan", "line 1: expected finite labels"),
        ("a b 1\na b 1", "line 2: the same row as line 1"),
        ("\n", "found an empty file"),
    ],
)
def test_bad_lists_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "train.csv", DATASETS["crema-d"])


def test_foreign_prefixes_name_what_is_missing(crema: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"line 1: /share/faces/.* does not exist, from /share on; .* path_map"):
        read_fold("crema-d", 1, data_root=crema)
    fold = read_fold("crema-d", 1, data_root=crema, path_map={"/share": str(crema)})
    assert (len(fold.train), len(fold.test), fold.train[7].label) == (12, 6, 1)
    (crema / "sound").rename(crema / "elsewhere")
    read_fold("crema-d", 1, data_root=crema, path_map={"/share": str(crema)}, modality="v")  # sound is not looked for
    with pytest.raises(ValueError, match="crema-d has folds 1 to 5"):
        read_fold("crema-d", 6, data_root=crema)
    with pytest.raises(ValueError, match=r"data set 'fer2013': expected one of mafw, mafw-43, dfew"):
        read_fold("fer2013", 1, data_root=crema)
    with pytest.raises(FileNotFoundError, match=r"copy that folder to <data root>/hicmae"):
        read_fold("crema-d", 2, data_root=crema)
    with pytest.raises(ValueError, match=r"is in the training list too"):
        data.check_disjoint(fold.train, fold.train[3:4])


def test_video_lists_take_either_column(tmp_path: Path) -> None:
    video = tmp_path / "video/file~/dev/mp4/id1/x/1.mp4"
    sound = tmp_path / "audio/file~/dev/aac/id1/x/1.wav"
    for path in (video, sound):
        path.parent.mkdir(parents=True)
        path.touch()
    listed = tmp_path / "list.csv"
    listed.write_text("/old/video/file~/dev/mp4/id1/x/1.mp4 0\n")
    assert read_video_list(listed, path_map={"/old": str(tmp_path)}) == [(video, sound)]
    listed.write_text(f"{video} other.wav\n")
    assert read_video_list(listed, root=tmp_path) == [(video, tmp_path / "other.wav")]
    sound.unlink()
    listed.write_text(f"{video} 0\n")
    assert read_video_list(listed) == [(video, None)]
    for text, message in ((f"{video}\n", "found 1 columns"), (f"{video} 0\n{video} 0\n", "listed twice"), ("", "empty file")):
        listed.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_video_list(listed)


def test_clips_of_every_stage(crema: Path) -> None:
    rows = read_fold("crema-d", 1, data_root=crema, path_map={"/share": str(crema)}).test
    train = EmotionClips(rows, "train", SMALL)
    test = EmotionClips(rows, "test", SMALL)
    assert (len(train), len(test), len(EmotionClips(rows, "test", SMALL, test_gain=True))) == (6, 12, 24)
    video, sound, label, number = train[1]
    assert video.shape == (3, 16, 32, 32)
    assert sound.shape == (1, 64, 32)
    assert (label, number) == (1, 1)
    assert [test[i][3] for i in range(4)] == [0, 0, 1, 1]
    assert torch.equal(test[2][0], test[2][0])  # nothing is drawn in testing
    assert not torch.equal(test[2][1], test[3][1])  # two stretches of the longer clip
    only = EmotionClips(rows, "validate", SMALL, modality="a")[0]
    assert only[0].numel() == 0
    assert only[1].shape == (1, 64, 32)


def test_bad_clips_stop_or_are_counted(crema: Path) -> None:
    rows = read_fold("crema-d", 1, data_root=crema, path_map={"/share": str(crema)}).test
    rows[0].sound.unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.csv, line 1: sound .*no such file"):
        EmotionClips(rows, "test", SMALL)[0]
    kept = EmotionClips(rows, "test", SMALL, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped clip 1"):
        assert kept[0][3] == 1
    assert int(kept.bad.count) == 1
    last = EmotionClips([*rows[1:], rows[0]], "test", SMALL, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped clip 1"):
        assert last[len(last) - 1][3] == 0  # the next row after the last is the first
    pairs = [(None, rows[1].sound), (None, rows[0].sound)]
    with pytest.raises(FileNotFoundError, match=r"row 2 of the list: sound .*no such file"):
        PretrainingClips(pairs, SMALL)[1]
    with pytest.warns(UserWarning, match="skipped clip 1"):
        assert PretrainingClips(pairs, SMALL, skip_bad=True)[1][1].shape == (1, 64, 32)


def test_speech_is_split_by_actor(shared_data: Path) -> None:
    fold = read_speech(shared_data)
    actors = [{int(row.name.split("-")[-1]) for row in rows} for rows in (fold.train, fold.test)]
    assert (len(fold.train), len(fold.test)) == (72, 24)
    assert actors == [set(range(1, 10)), {10, 11, 12}]
    assert all(int(row.name.split("-")[2]) - 1 == row.label for row in fold.train)
    video, sound, _, _ = EmotionClips(fold.test, "test", Sizes(), modality="a")[0]
    assert video.numel() == 0
    assert sound.shape == (1, 256, 128)
    with pytest.raises(ValueError, match="no frames; use modality a"):
        EmotionClips(fold.test, "test", Sizes())[0]


# -- augmentation


def test_augmentation_is_one_draw_for_all_frames() -> None:
    random.seed(3)
    torch.manual_seed(0)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for _ in range(8):
        out = augment.rand_augment([pixels, pixels])
        assert np.array_equal(np.asarray(out[0]), np.asarray(out[1]))
    changed = [not np.array_equal(np.asarray(augment.rand_augment([pixels])[0]), np.asarray(pixels)) for _ in range(30)]
    assert 20 < sum(changed) <= 30  # four operations, each with an even chance
    for _ in range(200):
        top, left, height, width = augment.draw_crop(40, 50)
        assert 0 <= top <= 40 - height
        assert 0 <= left <= 50 - width
        box = augment.draw_erased(40, 50)
        assert box is None or (box[2] < 40 and box[3] < 50)
    clip = torch.zeros(3, 4, 8, 8)
    erased = augment.erase(clip, (1, 2, 3, 4))
    assert int((erased != 0).sum()) == 3 * 4 * 12
    assert not torch.equal(erased[:, 0], erased[:, 1])
    assert augment.training_view([pixels] * 4, 16, data.to_tensor).shape == (3, 4, 16, 16)


def test_mixing_leaves_the_sound_alone_and_needs_even_batches() -> None:
    random.seed(0)
    items = [(torch.full((3, 2, 8, 8), float(i)), torch.full((1, 4, 4), float(i)), i % 3, i) for i in range(4)]
    for _ in range(10):
        video, sound, soft, _ = augment.mixing(3)(items)
        assert torch.equal(sound[:, 0, 0, 0], torch.arange(4.0))
        assert soft.sum(1) == pytest.approx([1.0] * 4, abs=1e-6)
        share = 1 - float(video[0].mean()) / 3  # clip 0 is 0, its partner 3
        own, other = 1 - 0.1 + 0.1 / 3, 0.1 / 3
        assert float(soft[0, 0]) == pytest.approx(own if items[3][2] == 0 else own * share + other * (1 - share), abs=1e-5)
    with pytest.raises(ValueError, match="batch of 3 clips: mixup needs an even one"):
        augment.mixing(3)(items[:3])
    assert torch.equal(augment.mixing(3, 0.0, 0.0, 0.0)(items[:3])[2], torch.eye(3))


# -- measures


def test_absent_classes_and_constants_warn() -> None:
    scores = torch.eye(3)[torch.tensor([0, 1, 1, 0])]
    with pytest.warns(UserWarning, match=r"classes \[2\] are absent"):
        found = metrics.categorical(torch.tensor([0, 1, 0, 0]), scores)
    assert (found.war, found.uar) == pytest.approx((0.75, (2 / 3 + 1) / 2))
    with pytest.warns(UserWarning, match=r"dimensions \[1\] are constant"):
        found = metrics.dimensional(torch.tensor([[0.0, 1], [1, 2], [3, 0]]), torch.tensor([[0.0, 1], [1, 1], [3, 1]]))
    assert np.isnan(found.pcc[1])
    assert found.ccc.tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="of one shape"):
        metrics.dimensional(torch.zeros(3, 2), torch.zeros(3, 3))


def test_views_are_averaged_by_group() -> None:
    scores = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])
    assert torch.equal(metrics.average_views(scores, torch.tensor([4, 2, 4])), torch.tensor([[0.0, 1], [0.75, 0.25]]))


# -- talkers


def test_talkers_hide_valence_from_the_ear_and_arousal_from_the_eye() -> None:
    one = SyntheticTalkers(3, 8)
    again = SyntheticTalkers(3, 4, first=4)
    assert one.labels == [0, 1, 2, 3] * 2
    assert torch.equal(one.videos[4:], again.videos)
    assert torch.equal(one.sounds[4:], again.sounds)
    assert not torch.equal(SyntheticTalkers(4, 4).videos, again.videos)
    loud = one.sounds.square().mean(1).sqrt()
    assert 0.04 < loud.min() < loud.max() < 0.16
    video, sound, _, _ = one[0]
    assert video.shape == (3, 16, 32, 32)
    assert sound.shape == (1, 64, 32)
    drawn = talker(3, 0)
    energy = np.array([np.square(part).mean() for part in np.split(drawn.sound, 16)])
    assert np.corrcoef(energy, drawn.syllables)[0, 1] > 0.7  # the voice follows the mouth
    assert not torch.equal(SyntheticTalkers(3, 1, gain=True)[0][1], sound)
