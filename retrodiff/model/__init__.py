"""The built model: asked, sampled, trained, moved and saved."""

from retrodiff.model.model import Model
from retrodiff.model.reretrieving import ReRetrieving

__all__ = ["Model", "ReRetrieving"]
