"""SCGC: self-supervised contrastive graph clustering (Kulatilleke et al., 2022)."""

from projects.scgc.contrast import Structure
from projects.scgc.features import Features
from projects.scgc.model import SCGC, AutoEncoder

__all__ = ["SCGC", "AutoEncoder", "Features", "Structure"]
