"""CROMA: contrastive radar-optical masked autoencoders (Fuller, Millard and Green, NeurIPS 2023)."""

from projects.croma.model import CROMA, Encoders, Encodings
from projects.croma.weights import load_encoders

__all__ = ["CROMA", "Encoders", "Encodings", "load_encoders"]
