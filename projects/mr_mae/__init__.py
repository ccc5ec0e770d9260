"""MR-MAE: visible tokens mimic a frozen teacher, hidden patches are rebuilt as pixels; ConvMAE or plain ViT backbone."""

from projects.mr_mae.classifier import Classifier
from projects.mr_mae.dense import DetectionBackbone, SegmentationBackbone
from projects.mr_mae.model import MRMAE, Output

__all__ = ["MRMAE", "Classifier", "DetectionBackbone", "Output", "SegmentationBackbone"]
