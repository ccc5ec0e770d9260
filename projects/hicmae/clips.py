"""Which frames and which stretch of sound make a clip (Sec. 6.3 of the data description), and reading them from files.

Frames are counted from 0. Pillow reads images, soundfile wav, PyAV video and whatever sound it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from projects.hicmae.audio import RATE

if TYPE_CHECKING:
    from PIL.Image import Image

SHORTEST = 1025
"""Samples that a cut must hold at least; a shorter one is replaced by the whole waveform."""
SHORT_CLIP = int(2.56 * RATE)
"""A waveform below this length may stand in for a cut that is too short."""


@dataclass(frozen=True)
class Clip:
    """Frames of one clip, and the first and last frame that its sound spans."""

    frames: list[int]
    first: int
    last: int

    def share(self, count: int) -> tuple[float, float]:
        """Where its sound begins and ends, as shares of the waveform of a video of `count` frames."""
        return (self.first / (count - 1), self.last / (count - 1)) if count > 1 else (0.0, 0.0)


# -- which frames


def pretraining_start(count: int, frames: int, stride: int, generator: torch.Generator | None = None) -> int:
    """A start drawn so that frames * stride frames follow; 0 for a shorter video."""
    last = count - frames * stride
    return int(torch.randint(last + 1, (), generator=generator)) if last > 0 else 0


def pretraining_clip(count: int, frames: int, stride: int, start: int) -> Clip:
    """start, start + stride, ...; the last index repeats once the next step would pass the end. Sound: to one step after the last frame."""
    found, offset = [], start
    for _ in range(frames):
        found.append(offset)
        if offset + 1 + stride < count:
            offset += stride
    return Clip(found, start, min(found[-1] + stride, count - 1))


def training_end(count: int, frames: int, stride: int, generator: torch.Generator | None = None) -> int | None:
    """An end drawn from frames * stride .. count - 1; None where the video is too short for a choice."""
    span = frames * stride
    return int(torch.randint(span, count, (), generator=generator)) if count > span else None


def training_clip(count: int, frames: int, stride: int, end: int | None) -> Clip:
    """Fine-tuning: `frames` places spread over the frames * stride frames before `end` (a step of 64/15, say, not of 4), or over the whole video."""
    span = frames * stride
    if end is None:
        spread = np.linspace(0, count, count // stride)
        places = np.clip(np.concatenate([spread, np.full(frames - len(spread), float(count))]), 0, count - 1)
    else:
        places = np.clip(np.linspace(end - span, end, frames), end - span, end - 1)
    chosen = places.astype(np.int64).tolist()
    return Clip(chosen, chosen[0], min(chosen[0] + span, count - 1))


def test_clips(count: int, frames: int, stride: int, segments: int) -> list[Clip]:
    """Every stride-th frame, the last one repeated up to `frames`; `segments` windows of them from the first to the last."""
    all_frames = list(range(0, count, stride))
    all_frames += [all_frames[-1]] * (frames - len(all_frames))
    step = (len(all_frames) - frames) / max(segments - 1, 1)
    chosen = [all_frames[int(k * step) : int(k * step) + frames] for k in range(segments)]
    return [Clip(part, part[0], min(part[-1] + stride, count - 1)) for part in chosen]


def cut(waveform: Tensor, begin: float, end: float, origin: str = "waveform") -> Tensor:
    """Samples from share `begin` to share `end` of waveform (samples,).

    Raises:
        ValueError: the cut is too short (1,024 samples or fewer) and the whole is too long to stand in for it.
    """
    count = len(waveform)
    part = waveform[int(begin * count) : int(end * count)]
    if len(part) >= SHORTEST:
        return part
    if SHORTEST <= count < SHORT_CLIP:
        return waveform
    raise ValueError(
        f"{origin}: the clip's sound has {len(part)} of {count} samples, expected at least {SHORTEST}; the video has too few frames for its sound"
    )


# -- which part of the picture (pre-training)

SCALES = (1.0, 0.875, 0.75, 0.66)


def crop_sizes(width: int, height: int, output: int) -> list[tuple[int, int]]:
    """(width, height) of every crop that pre-training draws from: sides of four scales, at most one scale apart."""
    sides = [int(min(width, height) * scale) for scale in SCALES]
    sides = [output if abs(side - output) < 3 else side for side in sides]
    return [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]


def crop_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """The 13 places (x, y) of a crop: corners, middle, middles of the sides, and four quarter points."""
    x, y = (width - crop_width) // 4, (height - crop_height) // 4
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(x * i, y * j) for i, j in places]


def draw_crop(width: int, height: int, output: int, generator: torch.Generator | None = None) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of one multi-scale crop."""

    def one_of(items: Sequence[Any]) -> Any:
        return items[int(torch.randint(len(items), (), generator=generator))]

    w, h = one_of(crop_sizes(width, height, output))
    x, y = one_of(crop_offsets(width, height, w, h))
    return x, y, x + w, y + h


def face_box(width: int, height: int, side: int = 160) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the face in a VoxCeleb2 frame of 224 x 224, scaled to other frames: the top `side` rows, `side` columns in the middle.

    160 gives rows 0-160 and columns 32-192, 192 gives rows 0-192 and columns 16-208.
    """
    left = (224 - side) / 2
    return round(width * left / 224), 0, round(width * (left + side) / 224), round(height * side / 224)


# -- files


def frame_files(folder: str | Path, extension: str = "jpg") -> list[Path]:
    """Images of a folder in the order of their names.

    Raises:
        FileNotFoundError: no such folder, or no image of that extension; the message lists those that there are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"frames {folder}: no such folder; extract the face images there, or map the lists' prefix with path_map")
    found = sorted(folder.glob(f"*.{extension}"))
    if not found:
        there = sorted({path.suffix.lstrip(".") for path in folder.iterdir() if path.suffix})
        raise FileNotFoundError(f"frames {folder}: expected *.{extension}, found {', '.join(there) or 'no file'}; set frame_ext")
    return found


def read_frames(paths: Sequence[Path]) -> list[Image]:
    """RGB images; a path that occurs twice is read once.

    Raises:
        ValueError: an image that cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    known: dict[Path, Image.Image] = {}
    for path in dict.fromkeys(paths):
        try:
            with Image.open(path) as image:
                known[path] = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as err:
            raise ValueError(f"image {path}: expected a picture, found one that cannot be read ({err}); extract it again") from err
    return [known[path] for path in paths]


def read_wav(path: str | Path) -> Tensor:
    """(samples,) float32 of a 16 kHz mono wav file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another rate, several channels, 1,024 samples or fewer, silence, NaN, or a file that soundfile cannot read.
        ImportError: soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as err:
        raise ImportError("reading wav files needs soundfile: pip install -e '.[audio]'") from err
    if not Path(path).is_file():
        raise FileNotFoundError(f"sound {path}: no such file; extract it with ffmpeg, or map the lists' prefix with path_map")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as err:
        raise ValueError(f"sound {path}: expected a wav file, found one that cannot be read ({err})") from err
    if rate != RATE or samples.shape[1] != 1:
        raise ValueError(
            f"sound {path}: expected {RATE} Hz, mono, found {rate} Hz, {samples.shape[1]} channels; "
            "convert it: ffmpeg -i IN -vn -acodec pcm_s16le -ac 1 -ar 16000 OUT.wav"
        )
    return check_sound(torch.from_numpy(samples[:, 0]), str(path))


def check_sound(waveform: Tensor, origin: str) -> Tensor:
    """The waveform, if it is long enough, finite and not silent throughout (ValueError)."""
    if len(waveform) < SHORTEST:
        raise ValueError(f"sound {origin}: expected at least {SHORTEST} samples, found {len(waveform)}")
    if not waveform.isfinite().all():
        raise ValueError(f"sound {origin}: expected finite samples, found NaN or infinity")
    if not waveform.any():
        raise ValueError(f"sound {origin}: all {len(waveform)} samples are zero; extract it again, or leave the clip out (skip_bad)")
    return waveform


@dataclass(frozen=True)
class VideoFacts:
    """What a video file says of itself."""

    frames: int
    rate: float  # frames a second
    width: int
    height: int
    seconds: float
    sound_seconds: float | None  # None = no sound track


def _open_video(path: str | Path) -> Any:
    try:
        import av
    except ImportError as err:
        raise ImportError("reading video files needs PyAV: pip install -e '.[video]'") from err
    if not Path(path).is_file():
        raise FileNotFoundError(f"video {path}: no such file; map the lists' prefix with path_map")
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as err:
        raise ValueError(f"video {path}: expected a video file, found one that cannot be read ({err})") from err
    if not container.streams.video:
        container.close()
        raise ValueError(f"video {path}: expected a video track, found none")
    return container


def video_facts(path: str | Path) -> VideoFacts:
    """Frames are counted by demuxing where the container does not state them."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.base_rate)
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        sound = container.streams.audio[0] if container.streams.audio else None
        length = None
        if sound is not None:
            length = float(sound.duration * sound.time_base) if sound.duration else float(container.duration or 0) / 1e6
        return VideoFacts(frames, rate, stream.width, stream.height, frames / rate, length)


def read_video(path: str | Path, frames: Sequence[int]) -> list[Image]:
    """The named frames (rising, repeats allowed) as RGB images: a seek to the key frame before the first, then decoding up to the last.

    Raises:
        ValueError: a frame beyond the end, or a file that cannot be decoded.
    """
    import av

    wanted = sorted(set(frames))
    found: dict[int, Any] = {}
    with _open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, base = stream.average_rate or stream.base_rate, stream.time_base
        origin = stream.start_time or 0
        try:
            if wanted[0] > 0:
                container.seek(origin + int(wanted[0] / rate / base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                number = round(float((frame.pts - origin) * base * rate))
                if number in wanted or (number > wanted[0] and not found):
                    found[number] = frame.to_image()
                if number >= wanted[-1]:
                    break
        except av.error.FFmpegError as err:
            raise ValueError(f"video {path}: decoding failed ({err})") from err
    if not found:
        raise ValueError(f"video {path}: expected frames {wanted[0]} to {wanted[-1]}, found none of them; is the file cut short?")
    known = sorted(found)
    # frame times of a variable rate may skip a number: the last frame before it is on screen then
    return [found[max((k for k in known if k <= n), default=known[0])] for n in frames]


def read_sound(path: str | Path, begin: float = 0.0, end: float | None = None) -> Tensor:
    """(samples,) float32 at 16 kHz, mono, of the first sound track between two times in seconds; PyAV resamples and mixes.

    Raises:
        ValueError: no sound track, or one that cannot be decoded.
    """
    container = _open_video(path)
    import av

    with container:
        if not container.streams.audio:
            raise ValueError(f"video {path}: expected a sound track, found none; give a wav file in the list's second column")
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        parts: list[np.ndarray] = []
        try:
            for frame in container.decode(stream):
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
                if end is not None and sum(map(len, parts)) > end * RATE:
                    break
            parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
        except av.error.FFmpegError as err:
            raise ValueError(f"video {path}: decoding its sound failed ({err})") from err
    samples = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)
    return samples[round(begin * RATE) : None if end is None else round(end * RATE)]


def map_path(path: str, path_map: dict[str, str]) -> str:
    """`path` with the longest prefix that `path_map` names replaced."""
    for old in sorted(path_map, key=len, reverse=True):
        if path.startswith(old):
            return path_map[old] + path[len(old) :]
    return path


def sound_of(video: str) -> str:
    """Sound file of a VoxCeleb2 video by the reference's rule: video/.../dev/mp4/x.mp4 -> audio/.../dev/aac/x.wav."""
    return re.sub(r"\.mp4$", ".wav", video.replace("video/file~/dev/mp4", "audio/file~/dev/aac").replace("/dev/mp4/", "/dev/aac/"))
