"""What Regularized Auto-Encoders Learn from the Data-Generating Distribution (Alain & Bengio, 2013)."""

from projects.regularized_ae.model import AutoEncoder, hessian_estimate
from projects.regularized_ae.sampler import energy_difference, metropolis_hastings

__all__ = ["AutoEncoder", "energy_difference", "hessian_estimate", "metropolis_hastings"]
