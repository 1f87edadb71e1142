"""The built model: asked, sampled, trained, moved and saved."""

from retrodiff.model.model import Model

__all__ = ["Model"]
