"""Point-CMAE (Ren et al., ACCV 2024): a point cloud masked twice, one encoder, two decoders whose features must agree where both masks hide."""

from projects.point_cmae.classifier import PointClassifier
from projects.point_cmae.model import PointCMAE
from projects.point_cmae.segmenter import PartSegmenter

__all__ = ["PartSegmenter", "PointCMAE", "PointClassifier"]
