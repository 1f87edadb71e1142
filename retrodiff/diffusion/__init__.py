"""Denoisers, schedules, samplers, guidance and conditioners."""

from retrodiff.diffusion.autoencoder import Folded, Identity, PixelUnshuffle
from retrodiff.diffusion.conditioner import (
    Dropped,
    NeighborEmbeddings,
    Pooled,
    PromptAndNeighbors,
    QueryAndNeighbors,
    QueryOnly,
    QueryVector,
    Rescaled,
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
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.diffusion.guidance import ClassifierFree, Interval, Unguided
from retrodiff.diffusion.learned import LearnedNull, Projected
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
    "ClassifierFree",
    "DPMpp2M",
    "DiffusionGenerator",
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
    "NeighborEmbeddings",
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
    "Step",
    "Stepwise",
    "Unconditional",
    "Unguided",
    "VDenoiser",
    "Wrapper",
    "X0Denoiser",
    "get_sampler",
]
