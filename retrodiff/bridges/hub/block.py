"""The block of retrodiff, as diffusers loads it from a repository."""

from retrodiff.bridges.retrieve_references import RetrieveReferences

__all__ = ["RetrieveReferences"]
