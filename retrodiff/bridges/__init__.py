"""References for other libraries' pipelines: chosen from a database, handed over, credited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrodiff.bridges.chosen import Chosen, Reference
from retrodiff.bridges.credited import Pictures, read_credit, save_credited
from retrodiff.bridges.ip_adapters import ip_adapter
from retrodiff.bridges.reference_calls import references
from retrodiff.bridges.reference_database import ReferenceDatabase, caption_database
from retrodiff.bridges.reference_retriever import ReferenceRetriever

if TYPE_CHECKING:
    from retrodiff.bridges.retrieve_references import RetrieveReferences, hub_folder

__all__ = [
    "Chosen",
    "Pictures",
    "Reference",
    "ReferenceDatabase",
    "ReferenceRetriever",
    "RetrieveReferences",
    "caption_database",
    "hub_folder",
    "ip_adapter",
    "read_credit",
    "references",
    "save_credited",
]


def __getattr__(name: str) -> Any:
    """The block is a class of diffusers, which is imported with it only."""
    if name in ("RetrieveReferences", "hub_folder"):
        try:
            from retrodiff.bridges import retrieve_references
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} needs {error.name}: pip install 'retrodiff[diffusers]'"
            ) from error
        return getattr(retrieve_references, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
