"""Databases of embeddings with each row's origin: built, opened, searched, shown and shared."""

from retrodiff.databases.build.edit import append_to_database, delete_rows
from retrodiff.databases.build.encoding import encode_images, encode_pictures
from retrodiff.databases.build.imports import Part, import_embeddings
from retrodiff.databases.build.ingest import build_database
from retrodiff.databases.build.released import (
    clip_retrieval_parts,
    nn_memory_counts,
    npy_parts,
    rdm_parts,
)
from retrodiff.databases.contact_sheet import captions_of, contact_sheet
from retrodiff.databases.lance import LanceDatabase
from retrodiff.databases.memory import ArrayDatabase
from retrodiff.databases.opening import open_database
from retrodiff.databases.parquet import ParquetDatabase
from retrodiff.databases.searchable import Searchable, Subset
from retrodiff.databases.shared import SharedDatabase
from retrodiff.databases.sources.folders import ImageFolder, Images, Item, Source
from retrodiff.databases.sources.formats import open_parts, open_source
from retrodiff.databases.sources.patchify import Patchify
from retrodiff.databases.sources.tables import DatasetImages, ParquetImages, SavedDataset
from retrodiff.databases.sources.tars import Tars
from retrodiff.databases.sources.zips import Zips
from retrodiff.databases.store import EmbeddingDatabase
from retrodiff.databases.union import Union
from retrodiff.pictures.thumbnails import UnreadableImage, read_image

__all__ = [
    "ArrayDatabase",
    "DatasetImages",
    "EmbeddingDatabase",
    "ImageFolder",
    "Images",
    "Item",
    "LanceDatabase",
    "ParquetDatabase",
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
    "Zips",
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
