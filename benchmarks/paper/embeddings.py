"""Embeddings of the photographs under each encoder, and the features that samples are measured in.

All are computed once and kept in float16. An encoder of the conditions is reduced to the same
width, its leading principal components on D, so that networks and searches differ by what the
encoder knows alone. Quality is measured in another network's features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from photographs import Photographs, crops
from scale import Scale
from torch import Tensor

from retrodiff.databases import ArrayDatabase
from retrodiff.interfaces import Fingerprint
from retrodiff.precision import best_precision
from retrodiff.retrieval.table import tabulated
from retrodiff.training import Adversarial, cosine, fit_autoencoder

sys.path.insert(0, str(Path(__file__).parents[1]))

WIDTH = 128
"""Principal components of an encoder's features that are kept."""

CROPS = {"crops16": 16, "crops8": 8}
"""Databases of squares that are cut out of D's pictures, by the squares' side."""

Encode = Callable[[Tensor], Tensor]


class Embeddings:
    """What encoders make of the photographs.

    Args:
        scale: of the studies.
        photographs: X, D, held-out.
        folder: keeps everything.
        device: where networks run.
    """

    def __init__(
        self, scale: Scale, photographs: Photographs, folder: Path, device: str = "cpu"
    ) -> None:
        self.scale, self.photographs = scale, photographs
        self.folder, self.device = folder, device
        self._networks: dict[str, Encode] = {}
        self._kept: dict[tuple[str, ...], Any] = {}

    def features(self, images: Tensor) -> Tensor:
        """Pictures (n, 3, h, w) uint8 -> features (n, d) that quality is measured in."""
        encode = self._network(self.scale.judge)
        return torch.cat([encode(part) for part in images.split(250)]).float()

    def measured(self, part: str) -> Tensor:
        """Those features of ``database``, ``trained`` or ``held_out`` pictures."""
        return self._table(self.scale.judge, part).float()

    def conditions(self, phi: str, part: str) -> Tensor:
        """Embeddings (n, d) under an encoder, of a part of the photographs or of crops of D."""
        key = (phi, part)
        if key not in self._kept:
            mean, basis = self._axes(phi)
            self._kept[key] = (self._table(phi, part).float() - mean) @ basis
        return self._kept[key]

    def database(self, phi: str, part: str, rows: Tensor | None = None) -> ArrayDatabase:
        """A database of a part of the photographs, or of some of its rows."""
        values = self.conditions(phi, part)
        numbers = torch.arange(len(values)) if rows is None else rows
        fingerprint = Fingerprint(
            encoder=f"studies:{phi}", weights=phi, preprocessing="own", dim=values.shape[1]
        )
        records = [{"number": number} for number in numbers.tolist()]
        return ArrayDatabase(values[numbers], fingerprint, records)

    def pictures(self, part: str) -> Tensor:
        """The pictures of a part; ``crops16`` and ``crops8`` are squares of D's."""
        if part in CROPS:
            return crops(self.photographs.database.images, CROPS[part])
        return getattr(self.photographs, part).images

    def _axes(self, phi: str) -> tuple[Tensor, Tensor]:
        """Mean and leading principal components of an encoder on D."""
        key = ("axes", phi)
        if key not in self._kept:
            values = self._table(phi, "database").double()
            mean = values.mean(0)
            _, axes = torch.linalg.eigh((values - mean).T.cov())
            basis = axes.flip(1)[:, :WIDTH]
            basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
            self._kept[key] = mean.float(), basis.float()
        return self._kept[key]

    def _table(self, encoder: str, part: str) -> Tensor:
        images = self.pictures(part)
        encode = self._network(encoder)
        width = encode(images[:2]).shape[1]
        return tabulated(
            lambda start, stop: encode(images[start:stop]),
            (len(images), width),
            torch.float16,
            batch_size=250,
            what=f"{encoder} {part}",
            progress=False,
            path=self.folder / f"{encoder}-{part}.safetensors",
            about={"encoder": encoder, "part": part, "scale": self.scale.name},
            resume=True,
        )

    def _network(self, name: str) -> Encode:
        if name not in self._networks:
            self._networks[name] = self._made(name)
        return self._networks[name]

    def _made(self, name: str) -> Encode:
        if name == "pixels":
            return lambda images: F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        if name == "vqgan":
            return self._codebook()
        network = _lite(name).to(self.device).eval()

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad():
                return network.encode_image(images.to(self.device) / 127.5 - 1).float().cpu()

        return encode

    def _codebook(self) -> Encode:
        """Pooled latents of a VQ-GAN that is trained on X (Esser et al. 2021)."""
        from retrodiff.networks.patch_discriminator import PatchDiscriminator
        from retrodiff.networks.vq import VQAutoencoder

        torch.manual_seed(0)
        steps = self.scale.codebook_steps
        fresh = VQAutoencoder(
            channels=32, multipliers=(1, 2, 2), blocks_per_level=1, latent_channels=8, codes=512
        )
        critic = PatchDiscriminator(channels=32, levels=2)
        trained = fit_autoencoder(
            fresh.to(self.device),
            self.photographs.trained.images,
            steps=steps,
            batch_size=min(32, self.scale.batch),
            lr=cosine(1e-3, steps, min(100, steps // 2)),
            adversarial=Adversarial(critic.to(self.device), start=steps // 2),
            precision=best_precision(self.device),
            checkpoint=self.folder / "vqgan.training.safetensors",
            checkpoint_every=200,
            resume=True,
            progress=False,
        ).autoencoder

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad():
                latents = trained.encode(images.to(self.device) / 127.5 - 1)
            return F.avg_pool2d(latents, 2).flatten(1).float().cpu()

        return encode


def _lite(name: str) -> Any:
    """``lite0``, ``lite2`` with their weights, or ``random``: Lite0 with fresh ones."""
    from lite0 import lite

    from retrodiff.encoders import TimmEncoder

    if name == "random":
        torch.manual_seed(0)
        return TimmEncoder("tf_efficientnet_lite0", image_size=96, preprocessing="plain")
    number = int(name.removeprefix("lite"))
    return lite(number, 96 if number == 0 else 64)
