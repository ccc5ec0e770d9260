"""HiCMAE: hierarchical contrastive masked autoencoder for audio-visual emotion recognition (Sun et al., Information Fusion 2024)."""

from projects.hicmae.emotion import EmotionModel
from projects.hicmae.model import SIZES, HiCMAE, Output

__all__ = ["SIZES", "EmotionModel", "HiCMAE", "Output"]
