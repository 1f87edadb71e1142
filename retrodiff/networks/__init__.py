"""Networks: the published UNet, a small transformer, first stages, and an adapter for others'."""

from retrodiff.networks.adapted import Adapted
from retrodiff.networks.causal import CausalTransformer
from retrodiff.networks.diffusers_network import DiffusersNetwork
from retrodiff.networks.dit import DiT
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.patch_discriminator import PatchDiscriminator
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.retrieval_adapter import RetrievalAdapter
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder

__all__ = [
    "Adapted",
    "CausalTransformer",
    "DiT",
    "DiffusersNetwork",
    "KLAutoencoder",
    "PatchDiscriminator",
    "PrincipalPatches",
    "RetrievalAdapter",
    "UNet",
    "VQAutoencoder",
]
