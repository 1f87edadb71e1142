"""First stages: autoencoders trained on images, and latents that are kept on disk."""

from retrodiff.training.stages.adversarial import Adversarial
from retrodiff.training.stages.cached_latents import CachedLatents, encode_latents, open_latents
from retrodiff.training.stages.codebook import CodeUse
from retrodiff.training.stages.first_stage import StageResult, fit_autoencoder
from retrodiff.training.stages.perceptual import FeatureDistance, lpips_distance

__all__ = [
    "Adversarial",
    "CachedLatents",
    "CodeUse",
    "FeatureDistance",
    "StageResult",
    "encode_latents",
    "fit_autoencoder",
    "lpips_distance",
    "open_latents",
]
