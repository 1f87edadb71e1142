"""Places images with any of timm's networks, its classifier removed.

timm: Wightman 2019, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.encoders.clip import inference
from retrodiff.encoders.fingerprint import WeightsHash
from retrodiff.encoders.preprocessing import Preprocessing, preprocessing_from
from retrodiff.interfaces import Encoder, Fingerprint


class TimmEncoder(nn.Module, Encoder):
    """The pooled features of a timm network; it has no text tower.

    Args:
        name: timm's model name, such as ``resnet18``.
        pretrained: load timm's weights (needs the network once); else fresh random ones.
        image_size: side that images are resized to.
        preprocessing: ``plain``, ``rdm``, ``openai`` or a `Preprocessing`.
        in_chans: channels of an image.
        device: where the weights live.
        batch_size: images per pass.
        **options: further numbers for `timm.create_model`, such as ``embed_dim``.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        *,
        image_size: int = 224,
        preprocessing: str | Preprocessing | dict[str, Any] = "plain",
        in_chans: int = 3,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        **options: Any,
    ):
        super().__init__()
        import timm

        if name not in timm.list_models(name):
            near = timm.list_models(f"*{name.split('.')[0][:6]}*")[:5]
            raise ValueError(f"timm has no model {name!r}; near it: {', '.join(near) or 'none'}")
        try:
            self.network: Any = timm.create_model(
                name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **options
            )
        except Exception as error:
            if not pretrained:
                raise
            raise OSError(
                f"cannot load timm's weights of {name!r} ({type(error).__name__}): go online once "
                "so that they are cached, or take pretrained=False for random weights"
            ) from error
        self.network.to(device).requires_grad_(not pretrained)
        self.name, self.pretrained, self.in_chans = name, pretrained, in_chans
        self.image_size, self.batch_size, self.options = image_size, batch_size, options
        self.preprocessing = preprocessing_from(preprocessing, image_size, in_chans)
        self._hash = WeightsHash()

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        return int(getattr(self.network, "head_hidden_size", None) or self.network.num_features)

    @property
    def fingerprint(self) -> Fingerprint:
        """Name and image size, hash of the weights, preprocessing, width."""
        return Fingerprint(
            encoder=f"timm:{self.name}@{self.image_size}",
            weights=self._hash.of(self.network),
            preprocessing=self.preprocessing.name,
            dim=self.dim,
        )

    def config(self) -> dict[str, Any]:
        """What builds this encoder again, as JSON-able values (weights apart)."""
        return {
            "kind": "timm",
            "name": self.name,
            "pretrained": self.pretrained,
            "image_size": self.image_size,
            "preprocessing": self.preprocessing.config(),
            "in_chans": self.in_chans,
            "batch_size": self.batch_size,
            **self.options,
        }

    def prepare(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> what the network takes."""
        return self.preprocessing.apply(images)

    def features(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> embeddings (b, d); differentiable."""
        return self.network(self.prepare(images.to(self._device_now())))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale."""
        with inference(self):
            parts = [self.features(part) for part in images.split(self.batch_size)]
            return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """What `prepare` returned -> embeddings (b, d), raw scale."""
        with inference(self):
            parts = prepared.to(self._device_now()).split(self.batch_size)
            return torch.cat([self.network(part) for part in parts])

    def _device_now(self) -> torch.device:
        return next(self.network.parameters()).device
