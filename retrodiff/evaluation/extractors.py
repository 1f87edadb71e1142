"""Networks of torch-fidelity as encoders, and encoders as networks of torch-fidelity.

``fidelity:inception-v3-compat`` gives the features of published FIDs. Weights are fetched once by
torch-fidelity (into torch.hub's folder) and need the network then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrodiff.encoders import encoder_from_string, weights_hash
from retrodiff.evaluation.fidelity import MISSING
from retrodiff.interfaces import Encoder, Fingerprint
from retrodiff.pictures.converting import to_bytes

PREFIX = "fidelity:"

FORMS = "fidelity:NAME, open_clip:NAME:TAG, timm:NAME, or the folder of a saved encoder"
"""What ``--features`` may look like."""


class FidelityExtractor(Encoder):
    """The features of a network that torch-fidelity knows by name, registered ones included.

    Args:
        name: such as ``inception-v3-compat``, ``dinov2-vit-l-14``, ``clip-vit-b-32``, ``vgg16``.
        layer: of its features; None: the one that torch-fidelity takes for FID.
        device: where the weights live.
        batch_size: images per pass.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: it has no such network or layer.
        OSError: the weights are not here and cannot be fetched.

    Examples:
        >>> from retrodiff.encoders import TimmEncoder
        >>> from retrodiff.evaluation import FidelityExtractor, register_extractor
        >>> register_extractor("offline", TimmEncoder("test_resnet", image_size=32))
        >>> FidelityExtractor("offline").dim
        96
    """

    def __init__(
        self,
        name: str,
        layer: str | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ):
        known = _registry()
        if name not in known:
            raise ValueError(f"torch-fidelity has no network {name!r}; it has {', '.join(known)}")
        kind = known[name]
        self.layer = layer or kind.get_default_feature_layer_for_metric("fid")
        if self.layer not in (layers := kind.get_provided_features_list()):
            raise ValueError(f"{name} has no layer {layer!r}; it has {', '.join(layers)}")
        logits = _layer_of_logits(kind)
        self._logits = logits if logits != self.layer else None
        self.name, self.batch_size = name, batch_size
        wanted = [self.layer, *([self._logits] if self._logits else [])]
        self.network = _created(kind, name, wanted).to(device)
        self.device = torch.device(device)
        with torch.no_grad():
            probe = self._run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self._dim = probe[0].shape[1]
        own = getattr(self.network, "hash_of_weights", None)
        self._weights = own or weights_hash(self.network.state_dict())

    @property
    def dim(self) -> int:
        """Width d of the features."""
        return self._dim

    @property
    def fingerprint(self) -> Fingerprint:
        """Name and layer, hash of the weights, width."""
        return Fingerprint(
            encoder=f"{PREFIX}{self.name}:{self.layer}",
            weights=self._weights,
            preprocessing="own",
            dim=self.dim,
        )

    @property
    def has_logits(self) -> bool:
        """Whether the network is a classifier, so that it has an inception score."""
        return self._logits is not None

    def encode_image(self, images: Any) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> features (b, d)."""
        return self.encode_with_logits(images)[0]

    def encode_with_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (b, c, h, w) in [-1, 1] -> features (b, d), logits (b, classes) if it has any."""
        found = []
        with torch.no_grad():
            for part in images.split(self.batch_size):
                found.append(self._run(to_bytes(part).expand(-1, 3, -1, -1)))
        if not found:
            return torch.empty(0, self.dim), None
        features, *logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        return features, logits[0] if logits else None

    def _run(self, pixels: Tensor) -> list[Tensor]:
        outputs = self.network(pixels.to(self.device))
        return [out.flatten(1).float().cpu() for out in outputs]


def features_from_string(text: str, *, device: torch.device | str = "cpu") -> Encoder:
    """The encoder that ``--features`` names.

    Args:
        text: ``fidelity:NAME`` or ``fidelity:NAME:LAYER`` for a network of torch-fidelity, such as
            ``fidelity:inception-v3-compat``; else what `encoder_from_string` takes.
        device: where the weights live.
    """
    if text.startswith(PREFIX):
        name, _, layer = text.removeprefix(PREFIX).partition(":")
        return FidelityExtractor(name, layer or None, device=device)
    return encoder_from_string(text, device=device)


def register_extractor(
    name: str,
    encoder: Encoder | Callable[[Tensor], Tensor],
    *,
    head: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Makes a network known to torch-fidelity, so that its metrics can be computed offline.

    After that ``torch_fidelity.calculate_metrics(feature_extractor=name, ...)`` takes it, and so do
    `FidelityExtractor` and ``features_from_string``.

    Args:
        name: in torch-fidelity's list, without slashes; a name can be given once in a process.
        encoder: an `Encoder`, such as `TimmEncoder`, or a function from images (b, 3, h, w) in
            [-1, 1] to features (b, d).
        head: features (b, d) -> logits (b, classes), which the inception score needs; without it
            that score is refused.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: the name is taken.

    Examples:
        >>> from retrodiff.encoders import TimmEncoder
        >>> from retrodiff.evaluation import FidelityExtractor, register_extractor
        >>> register_extractor("own", TimmEncoder("test_resnet", image_size=32))
        >>> FidelityExtractor("own").dim
        96
    """
    known = _registry()
    if name in known:
        raise ValueError(f"torch-fidelity has a network {name!r} already: take another name")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    encode: Any = getattr(encoder, "encode_image", encoder)
    layers = ("features",) if head is None else ("features", "logits")

    known_hash = encoder.fingerprint.weights if isinstance(encoder, Encoder) else ""

    class Registered(FeatureExtractorBase):
        hash_of_weights = known_hash

        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return layers

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            if metric != "isc":
                return "features"
            if head is None:
                raise ValueError(f"{name} has no logits for an inception score: give it a head")
            return "logits"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            found = {"features": encode(input.float() / 127.5 - 1)}
            if "logits" in self.features_list:
                assert head is not None
                found["logits"] = head(found["features"])
            return tuple(found[layer] for layer in self.features_list)

    register_feature_extractor(name, Registered)


def _registry() -> dict[str, Any]:
    try:
        from torch_fidelity import registry
    except ImportError as error:
        raise ImportError(MISSING) from error
    return registry.FEATURE_EXTRACTORS_REGISTRY


def _created(kind: Any, name: str, layers: list[str]) -> Any:
    try:
        network = kind(name, layers, verbose=False)
    except Exception as error:
        raise OSError(
            f"cannot load torch-fidelity's weights of {name!r} ({type(error).__name__}): go online "
            "once so that they are cached, or take features that are at hand, such as timm:NAME"
        ) from error
    return network.requires_grad_(False).eval()


def _layer_of_logits(kind: Any) -> str | None:
    """The layer of an inception score, where it holds logits; others only say that they do."""
    try:
        layer = kind.get_default_feature_layer_for_metric("isc")
    except ValueError:
        return None
    return layer if "logits" in layer else None
