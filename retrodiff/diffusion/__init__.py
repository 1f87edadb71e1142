"""Denoisers, schedules, samplers, guidance and conditioners."""

from retrodiff.diffusion.autoencoder import Identity, PixelUnshuffle
from retrodiff.diffusion.conditioner import (
    Dropped,
    NeighborEmbeddings,
    QueryAndNeighbors,
    QueryOnly,
    Unconditional,
)
from retrodiff.diffusion.denoiser import (
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    Preconditioned,
    VDenoiser,
)
from retrodiff.diffusion.guidance import ClassifierFree, Interval, Unguided
from retrodiff.diffusion.sampler import DDIM, DDPM, PLMS, DPMpp2M, Euler, Heun, sampler_named
from retrodiff.diffusion.schedule import Karras, LinearFlow, LogSpaced, ScaledLinear

__all__ = [
    "DDIM",
    "DDPM",
    "PLMS",
    "ClassifierFree",
    "DPMpp2M",
    "Dropped",
    "EDMDenoiser",
    "EpsDenoiser",
    "Euler",
    "FlowDenoiser",
    "Heun",
    "Identity",
    "Interval",
    "Karras",
    "LinearFlow",
    "LogSpaced",
    "NeighborEmbeddings",
    "PixelUnshuffle",
    "Preconditioned",
    "QueryAndNeighbors",
    "QueryOnly",
    "ScaledLinear",
    "Unconditional",
    "Unguided",
    "VDenoiser",
    "sampler_named",
]
