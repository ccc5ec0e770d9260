"""G-SimCLR: contrastive learning with batches guided by pseudo-labels (Chakraborty, Gosthipaty, Paul, ICDM workshops 2020)."""

from projects.g_simclr.autoencoder import DenoisingAutoencoder
from projects.g_simclr.batches import GuidedBatches
from projects.g_simclr.model import GSimCLR, Output

__all__ = ["DenoisingAutoencoder", "GSimCLR", "GuidedBatches", "Output"]
