"""Networks: the published UNet, a small transformer, and the published first stages."""

from retrodiff.networks.causal import CausalTransformer
from retrodiff.networks.diffusers_network import DiffusersNetwork
from retrodiff.networks.dit import DiT
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.patch_discriminator import PatchDiscriminator
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder

__all__ = [
    "CausalTransformer",
    "DiT",
    "DiffusersNetwork",
    "KLAutoencoder",
    "PatchDiscriminator",
    "PrincipalPatches",
    "UNet",
    "VQAutoencoder",
]
