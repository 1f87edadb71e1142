"""Whole models by name: plain functions that fill a builder. The paper's is one among others.

Calling one builds the model; ``Builder.from_preset(rdm_imagenet, ...)`` gives the open recipe.
The paper's models come with ``checkpoint=`` the published file, a diffusers folder or a Hub name of
one; without it they have fresh weights, and sampling from them warns.
"""

from retrodiff.presets.published_family import from_published as from_published
from retrodiff.presets.rarm import ChosenTokens as ChosenTokens
from retrodiff.presets.rarm import rarm_animals, rarm_dogs, rarm_mammals
from retrodiff.presets.rdm import Chosen as Chosen
from retrodiff.presets.rdm import ldm_imagenet, rdm_768, rdm_ffhq, rdm_imagenet
from retrodiff.presets.relatives import Sizes as Sizes
from retrodiff.presets.relatives import (
    instance_conditioned,
    knn_diffusion,
    ldm,
    region_retrieval,
    unclip,
    unclip_prior,
)
from retrodiff.presets.trained_here import rdm_pictograms, rdm_small

__all__ = [
    "instance_conditioned",
    "knn_diffusion",
    "ldm",
    "ldm_imagenet",
    "rarm_animals",
    "rarm_dogs",
    "rarm_mammals",
    "rdm_768",
    "rdm_ffhq",
    "rdm_imagenet",
    "rdm_pictograms",
    "rdm_small",
    "region_retrieval",
    "unclip",
    "unclip_prior",
]
