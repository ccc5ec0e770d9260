"""The embedded default: talking heads drawn and voiced on the fly, whose valence can only be seen and whose arousal can only be heard.

Class = 2 [valence > 0] + [arousal > 0]: one modality alone can be right half of the time at most, both together always. What both share, and what the
contrastive loss can find, is when the syllables come: the mouth opens with them and the voice sounds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from projects.hicmae.audio import RATE, model_input, random_gain
from projects.hicmae.model import MEAN, STD

FRAMES, PER_SECOND = 16, 25
SAMPLES = FRAMES * RATE // PER_SECOND
CLASSES = ("low valence, low arousal", "low valence, high arousal", "high valence, low arousal", "high valence, high arousal")


class Talker(NamedTuple):
    video: np.ndarray  # (16, size, size, 3) uint8
    sound: np.ndarray  # (10240,) float32, 16 kHz
    label: int
    syllables: np.ndarray  # (16,) envelope at the frames, 0..1


def talker(seed: int, number: int, size: int = 32) -> Talker:
    """Clip `number` of the set `seed`; its class is number mod 4, so that any stretch of numbers is balanced."""
    rng = np.random.default_rng([seed, number])
    label = number % 4
    valence, arousal = 2 * (label // 2) - 1, 2 * (label % 2) - 1
    bursts = rng.uniform(0, FRAMES / PER_SECOND, 2 + rng.poisson(1))

    def envelope(t: np.ndarray) -> np.ndarray:
        return np.minimum(1.0, np.exp(-((t[:, None] - bursts) ** 2) / (2 * 0.05**2)).sum(1))

    opening = envelope((np.arange(FRAMES) + 0.5) / PER_SECOND)
    return Talker(_draw(rng, size, valence, opening), _voice(rng, arousal, envelope), label, opening)


def _draw(rng: np.random.Generator, size: int, valence: int, opening: np.ndarray) -> np.ndarray:
    """Head, eyes and mouth; the mouth's corners rise with valence, it opens with the syllables."""
    offset, drift = rng.uniform(-2, 2, 2), rng.uniform(-1, 1, 2)
    radius = rng.uniform(0.32, 0.42) * size
    skin, ground = rng.uniform(0.4, 0.9, 3), rng.uniform(0, 0.6, 3)
    curvature = valence * 0.25 * radius * rng.uniform(0.7, 1.3)
    brightness = rng.uniform(0.8, 1.2)
    moved = np.linspace(-0.5, 0.5, FRAMES)[:, None, None, None] * drift
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)[None] + 0.5
    y, x = np.moveaxis(grid - size / 2 - offset - moved, -1, 0)

    def paint(canvas: np.ndarray, share: np.ndarray, colour: np.ndarray | float) -> np.ndarray:
        return canvas + np.clip(share, 0, 1)[..., None] * (colour - canvas)

    canvas = np.broadcast_to(ground, (FRAMES, size, size, 3))
    canvas = paint(canvas, radius + 0.5 - np.hypot(y, x / 0.85), skin)
    for side in (-1, 1):
        canvas = paint(canvas, 0.1 * radius + 0.5 - np.hypot(y + 0.25 * radius, x - side * 0.35 * radius), 0.05)
    across = x / (0.5 * radius)
    middle = 0.42 * radius + curvature * (0.5 - across**2)
    half = (0.05 + 0.35 * opening)[:, None, None] * radius / 2
    canvas = paint(canvas, np.where(np.abs(across) <= 1, half + 0.5 - np.abs(y - middle), 0), np.array([0.35, 0.05, 0.05]))
    canvas = brightness * canvas + rng.normal(0, 0.08, canvas.shape)
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)


def _voice(rng: np.random.Generator, arousal: int, envelope: object) -> np.ndarray:
    """Harmonics of a gliding pitch; arousal widens the glide and brightens the sound, loudness says nothing."""
    t = np.arange(SAMPLES) / RATE
    base = np.exp(rng.uniform(np.log(90), np.log(260)))
    swing = 8.0 if arousal > 0 else 2.0
    glide = np.sin(2 * np.pi * (rng.uniform(1.5, 3.0) * t + rng.uniform()))
    turn = np.exp(2j * np.pi * np.cumsum(base * 2 ** (swing / 2 * glide / 12)) / RATE)
    tilt = rng.uniform(1.2, 1.8) - 0.4 * arousal
    sound, harmonic = np.zeros(SAMPLES), np.ones(SAMPLES, complex)
    for h in range(1, 13):
        harmonic = harmonic * turn
        sound += h**-tilt * harmonic.imag
    sound *= envelope(t)
    sound += rng.normal(0, 0.1 * np.sqrt(np.mean(sound**2)), SAMPLES)  # 20 dB below the voice
    return (0.1 * rng.uniform(0.5, 1.5) * sound / np.sqrt(np.mean(sound**2))).astype(np.float32)


def normalised(frames: Tensor) -> Tensor:
    """(3, T, H, W) float32, ImageNet-normalised, from (T, H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return (frames.permute(3, 0, 1, 2).float() / 255 - mean) / std


class SyntheticTalkers(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Clips of `talker`, drawn once: (video (3, 16, size, size), audio (1, frames, bins), label, number in this set).

    Args:
        seed, count, first: clips first .. first + count - 1 of the set `seed`. Sets of other seeds share no clip.
        gain: draw the loudness anew each time (pre-training).
    """

    def __init__(
        self, seed: int, count: int, *, first: int = 0, size: int = 32, frames: int = 64, bins: int = 32, gain: bool = False
    ) -> None:
        drawn = [talker(seed, first + i, size) for i in range(count)]
        self.videos = torch.from_numpy(np.stack([one.video for one in drawn]))
        self.sounds = torch.from_numpy(np.stack([one.sound for one in drawn]))
        self.labels = [one.label for one in drawn]
        self.syllables = torch.from_numpy(np.stack([one.syllables for one in drawn]))
        self.frames, self.bins, self.gain = frames, bins, gain
        self.audio = None if gain else model_input(self.sounds, frames, bins)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int, int]:
        if self.audio is not None:
            audio = self.audio[number]
        else:
            audio = model_input(self.sounds[number], self.frames, self.bins, gain=random_gain())
        return normalised(self.videos[number]), audio, self.labels[number], number
