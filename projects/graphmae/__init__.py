"""GraphMAE: self-supervised masked graph autoencoders (Hou et al., KDD 2022)."""

from projects.graphmae.model import Features, GraphMAE, Output
from projects.graphmae.molecule import MoleculeGraphMAE

__all__ = ["Features", "GraphMAE", "MoleculeGraphMAE", "Output"]
