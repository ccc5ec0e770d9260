"""MixedAE: a masked auto-encoder on mixed images with homologous recognition (Chen et al., CVPR 2023)."""

from projects.mixed_ae.model import Classifier, MixedAE, Output

__all__ = ["Classifier", "MixedAE", "Output"]
