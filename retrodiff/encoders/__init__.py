"""Where does this image or text lie? Encoders and what they do to an image first."""

from retrodiff.encoders.cache import Cached
from retrodiff.encoders.clip import CLIPEncoder
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.encoders.folder import encoder_from_string, load_encoder, save_encoder
from retrodiff.encoders.preprocessing import Preprocessing
from retrodiff.encoders.timm import TimmEncoder

__all__ = [
    "CLIPEncoder",
    "Cached",
    "Preprocessing",
    "TimmEncoder",
    "encoder_from_string",
    "load_encoder",
    "save_encoder",
    "weights_hash",
]
