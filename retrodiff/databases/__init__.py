"""What do we own? Databases of embeddings with their origin: built, opened, searched, shown."""

from retrodiff.databases.archives import Tars
from retrodiff.databases.edit import append_to_database, delete_rows
from retrodiff.databases.encoding import encode_images, encode_pictures
from retrodiff.databases.formats import open_parts, open_source
from retrodiff.databases.hub import SharedDatabase
from retrodiff.databases.images import UnreadableImage, read_image
from retrodiff.databases.imports import Part, import_embeddings
from retrodiff.databases.ingest import build_database
from retrodiff.databases.lance import LanceDatabase
from retrodiff.databases.patchify import Patchify
from retrodiff.databases.published import (
    clip_retrieval_parts,
    nn_memory_counts,
    npy_parts,
    rdm_parts,
)
from retrodiff.databases.searchable import Searchable
from retrodiff.databases.sheet import captions_of, contact_sheet
from retrodiff.databases.sources import ImageFolder, Images, Item, Source
from retrodiff.databases.store import EmbeddingDatabase, open_database
from retrodiff.databases.tables import DatasetImages, ParquetImages, SavedDataset
from retrodiff.databases.union import Union
from retrodiff.databases.views import ArrayDatabase, Subset

__all__ = [
    "ArrayDatabase",
    "DatasetImages",
    "EmbeddingDatabase",
    "ImageFolder",
    "Images",
    "Item",
    "LanceDatabase",
    "ParquetImages",
    "Part",
    "Patchify",
    "SavedDataset",
    "Searchable",
    "SharedDatabase",
    "Source",
    "Subset",
    "Tars",
    "Union",
    "UnreadableImage",
    "append_to_database",
    "build_database",
    "captions_of",
    "clip_retrieval_parts",
    "contact_sheet",
    "delete_rows",
    "encode_images",
    "encode_pictures",
    "import_embeddings",
    "nn_memory_counts",
    "npy_parts",
    "open_database",
    "open_parts",
    "open_source",
    "rdm_parts",
    "read_image",
]
