"""The built model: asked, sampled, trained, moved and saved."""

from retrodiff.model.estimates import Estimate
from retrodiff.model.model import Model
from retrodiff.model.reretrieving import ReRetrieving

__all__ = ["Estimate", "Model", "ReRetrieving"]
