"""Audio front end (Sec. 6.2 of the data description): Kaldi-compatible log-mel filter bank, padding, AudioSet normalisation; torch alone.

torchaudio has no build for the torch in use, and kaldi-native-fbank refuses 128 bins at 512 points (the third triangle covers no bin and stays at the floor).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

RATE = 16_000
"""Samples a second."""
WINDOW, SHIFT, POINTS = 400, 160, 512
"""25 ms, 10 ms, and the length of the transform."""
FLOOR = 1.1920929e-07
"""Smallest energy before the logarithm (float32's epsilon): digital silence is ln(FLOOR) = -15.94."""
MEAN, STD = -4.2677393, 4.5689974
"""AudioSet statistics; the input is (x - MEAN) / (2 STD)."""


def frame_count(samples: int) -> int:
    """Frames of a waveform: no padding at its ends."""
    return 1 + (samples - WINDOW) // SHIFT if samples >= WINDOW else 0


@lru_cache
def mel_triangles(bins: int) -> Tensor:
    """(256, bins) float64 weights of the power spectrum's bins 0 to 255, edges equally spaced in mel between 20 Hz and 8 kHz."""

    def mel(hertz: Tensor | float) -> Tensor:
        return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)

    low, high = mel(20.0), mel(RATE / 2)
    step = (high - low) / (bins + 1)
    place = (mel(torch.arange(POINTS // 2, dtype=torch.float64) * RATE / POINTS)[:, None] - low) / step
    left = torch.arange(bins, dtype=torch.float64)
    return torch.minimum(place - left, left + 2 - place).clamp(min=0)


@lru_cache
def hann() -> Tensor:
    """(400,) symmetric window, float64."""
    return 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(WINDOW, dtype=torch.float64) / (WINDOW - 1))


def filter_bank(waveform: Tensor, bins: int = 128) -> Tensor:
    """Natural log-mel energies (..., frames, bins) of waveforms (..., samples) in [-1, 1] at 16 kHz; any leading shape, any device.

    Each frame: mean off, pre-emphasis 0.97, Hann window, power spectrum, triangles, logarithm. No dither, no energy row.

    Raises:
        ValueError: fewer samples than one window.
    """
    if waveform.shape[-1] < WINDOW:
        raise ValueError(f"waveform: expected at least {WINDOW} samples (25 ms at 16 kHz), found {waveform.shape[-1]}")
    frames = waveform.unfold(-1, WINDOW, SHIFT)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = torch.cat([0.03 * frames[..., :1], frames[..., 1:] - 0.97 * frames[..., :-1]], -1)
    power = torch.fft.rfft(frames * hann().to(frames), POINTS)[..., : POINTS // 2].abs().square()
    return (power @ mel_triangles(bins).to(power)).clamp(min=FLOOR).log()


def model_input(waveform: Tensor, frames: int = 256, bins: int = 128, *, gain: float | Tensor = 1.0) -> Tensor:
    """Normalised spectrograms (..., 1, frames, bins): mean off, gain, filter bank, zeros after the log up to `frames` or cut there.

    Padding becomes 0.467 and silence -1.278: zero log-energy is loud, and the released models expect it so.
    """
    waveform = (waveform - waveform.mean(-1, keepdim=True)) * gain
    return ((fit_frames(filter_bank(waveform, bins), frames) - MEAN) / (2 * STD)).unsqueeze(-3)


def fit_frames(log_mel: Tensor, frames: int) -> Tensor:
    """(..., n, bins) padded with zeros at the end, or cut, to (..., frames, bins)."""
    return torch.nn.functional.pad(log_mel[..., :frames, :], (0, 0, 0, max(0, frames - log_mel.shape[-2])))


def random_gain(generator: torch.Generator | None = None) -> float:
    """0.5 + Beta(10, 10), mean 1; from the ratio of two Gamma(10) draws, each a sum of ten exponentials."""
    draws = torch.rand(20, generator=generator, dtype=torch.float64).clamp(min=1e-300).log().neg()
    return 0.5 + float(draws[:10].sum() / draws.sum())
