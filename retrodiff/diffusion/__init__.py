"""Denoisers, schedules, samplers, guidance and conditioners."""

from retrodiff.diffusion.autoencoder import Folded, Identity, PixelUnshuffle
from retrodiff.diffusion.composition import Composed
from retrodiff.diffusion.conditioner import (
    Dropped,
    NeighborEmbeddings,
    Noised,
    PromptAndNeighbors,
    QueryAndNeighbors,
    QueryOnly,
    QueryVector,
    Unconditional,
    Wrapper,
)
from retrodiff.diffusion.denoiser import (
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    Preconditioned,
    VDenoiser,
    X0Denoiser,
)
from retrodiff.diffusion.generator import DiffusionGenerator, Start
from retrodiff.diffusion.guidance import ByLevel, ClassifierFree, Interval, Mixture, Unguided
from retrodiff.diffusion.learned import LearnedNull, Projected, VectorTokens
from retrodiff.diffusion.patches import NeighborPatches
from retrodiff.diffusion.pooled import Pooled, Rescaled
from retrodiff.diffusion.prior import DiffusionPrior
from retrodiff.diffusion.sampler import (
    DDIM,
    DDPM,
    PLMS,
    DPMpp2M,
    Euler,
    EulerAncestral,
    Heun,
    Step,
    Stepwise,
    get_sampler,
)
from retrodiff.diffusion.schedule import Karras, LinearFlow, LogSpaced, ScaledLinear

__all__ = [
    "DDIM",
    "DDPM",
    "PLMS",
    "ByLevel",
    "ClassifierFree",
    "Composed",
    "DPMpp2M",
    "DiffusionGenerator",
    "DiffusionPrior",
    "Dropped",
    "EDMDenoiser",
    "EpsDenoiser",
    "Euler",
    "EulerAncestral",
    "FlowDenoiser",
    "Folded",
    "Heun",
    "Identity",
    "Interval",
    "Karras",
    "LearnedNull",
    "LinearFlow",
    "LogSpaced",
    "Mixture",
    "NeighborEmbeddings",
    "NeighborPatches",
    "Noised",
    "PixelUnshuffle",
    "Pooled",
    "Preconditioned",
    "Projected",
    "PromptAndNeighbors",
    "QueryAndNeighbors",
    "QueryOnly",
    "QueryVector",
    "Rescaled",
    "ScaledLinear",
    "Start",
    "Step",
    "Stepwise",
    "Unconditional",
    "Unguided",
    "VDenoiser",
    "VectorTokens",
    "Wrapper",
    "X0Denoiser",
    "get_sampler",
]
