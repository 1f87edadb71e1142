"""What do we own? Databases of embeddings with their origin: built, opened, searched, shown."""

from retrodiff.databases.edit import append_to_database, delete_rows
from retrodiff.databases.images import UnreadableImage, read_image
from retrodiff.databases.ingest import build_database, encode_images
from retrodiff.databases.patchify import Patchify
from retrodiff.databases.searchable import Searchable
from retrodiff.databases.sheet import captions_of, contact_sheet
from retrodiff.databases.sources import ImageFolder, Images, Item, Source
from retrodiff.databases.store import EmbeddingDatabase, open_database
from retrodiff.databases.views import ArrayDatabase, Subset

__all__ = [
    "ArrayDatabase",
    "EmbeddingDatabase",
    "ImageFolder",
    "Images",
    "Item",
    "Patchify",
    "Searchable",
    "Source",
    "Subset",
    "UnreadableImage",
    "append_to_database",
    "build_database",
    "captions_of",
    "contact_sheet",
    "delete_rows",
    "encode_images",
    "open_database",
    "read_image",
]
