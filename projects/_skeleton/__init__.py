"""A masked auto-encoder on handwritten digits: the smallest whole project, to be copied by `make new-project`."""

from projects._skeleton.model import MaskedAutoencoder, Output

__all__ = ["MaskedAutoencoder", "Output"]
