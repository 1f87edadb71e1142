"""Encoders that map images and text to embeddings, and their preprocessing of images."""

from retrodiff.encoders.cache import Cached
from retrodiff.encoders.class_names import ClassNames
from retrodiff.encoders.clip import CLIPEncoder
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.encoders.folder import load_encoder, save_encoder
from retrodiff.encoders.names import encoder_from_string
from retrodiff.encoders.preprocessing import Preprocessing
from retrodiff.encoders.prompts import PromptCut
from retrodiff.encoders.regions import Regions
from retrodiff.encoders.timm import TimmEncoder

__all__ = [
    "CLIPEncoder",
    "Cached",
    "ClassNames",
    "Preprocessing",
    "PromptCut",
    "Regions",
    "TimmEncoder",
    "encoder_from_string",
    "load_encoder",
    "save_encoder",
    "weights_hash",
]
