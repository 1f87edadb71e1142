"""Maps images to embeddings with any of timm's networks, its classifier removed.

timm: Wightman 2019, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.encoders.fingerprint import WeightsHash
from retrodiff.encoders.passes import embedded, prepared
from retrodiff.encoders.preprocessing import Preprocessing, Size, preprocessing_from, shown
from retrodiff.encoders.reach import ask_once
from retrodiff.encoders.trained import of_timm
from retrodiff.interfaces import Encoder, Fingerprint
from retrodiff.numbers import whole

SOURCES = ("hf-hub", "hf_hub", "local-dir")
"""What timm takes before a colon: a repository of the Hub, a folder."""


class TimmEncoder(nn.Module, Encoder):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The pooled features of a timm network; it has no text tower.

    Embeddings come back as float32 on the CPU, wherever the weights are; ``encoder.to(device)``
    moves those.

    Args:
        name: timm's model name, such as ``resnet18`` or, with the tag of its weights,
            ``resnet18.a1_in1k``; also ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        pretrained: load timm's weights (needs the network once); else fresh random ones.
        image_size: side that images are resized to; None: the network's own.
        preprocessing: None: that of the weights, as timm knows it. ``plain``, ``rdm``, ``openai``
            or a `Preprocessing`: another one.
        in_chans: channels of an image.
        device: where the weights live.
        batch_size: images per pass.
        **options: further numbers for `timm.create_model`, such as ``embed_dim``.

    Raises:
        ValueError: timm has no such network or weights, or the network takes no such size.

    Examples:
        >>> encoder = TimmEncoder("test_vit", image_size=96)
        >>> encoder.dim, encoder.preprocessing.name
        (64, 'short-96-0.95-bicubic-half')
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        *,
        image_size: int | None = None,
        preprocessing: str | Preprocessing | dict[str, Any] | None = None,
        in_chans: int = 3,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        **options: Any,
    ):
        super().__init__()
        from timm.data import resolve_data_config  # pyright: ignore[reportPrivateImportUsage]

        self.name, self.pretrained = timm_name(name, pretrained), pretrained
        self.in_chans = whole("in_chans", in_chans)
        self.batch_size, self.options = whole("batch_size", batch_size), options
        size = options.get("img_size") if image_size is None else image_size
        size = None if size is None else _whole_size(size)
        self.network: Any = self._created(size)
        self.network.to(device).requires_grad_(not pretrained)
        config = resolve_data_config({}, model=self.network)
        self._own_size = _square(config["input_size"][-2:])
        self.image_size: Size = self._own_size if size is None else size
        own = of_timm(config, self.image_size, in_chans)
        self.preprocessing = preprocessing_from(preprocessing, self.image_size, own, in_chans)
        self._hash = WeightsHash()

    def _created(self, size: Size | None) -> Any:
        import timm

        options: dict[str, Any] = {"num_classes": 0, "in_chans": self.in_chans, **self.options}
        known: Any = None if ":" in self.name else timm.get_pretrained_cfg(self.name)
        if size is not None and known is not None and known.fixed_input_size:
            if size != _square(known.input_size[-2:]):
                options.setdefault("img_size", size)
        try:
            if self.pretrained or ":" in self.name:
                ask_once(*_repository(self.name, known))
            return timm.create_model(self.name, pretrained=self.pretrained, **options)
        except (TypeError, AssertionError, ValueError) as error:
            given = ", ".join(f"{k}={v!r}" for k, v in options.items())
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"timm cannot make {self.name!r} with {given}: {reason}") from error
        except Exception as error:
            if not self.pretrained and ":" not in self.name:
                raise
            raise OSError(
                f"cannot load timm's weights of {self.name!r} ({type(error).__name__}): go online "
                "once so that they are cached, or take pretrained=False for random weights"
            ) from error

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        return int(getattr(self.network, "head_hidden_size", None) or self.network.num_features)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        return f"TimmEncoder({self.identity.encoder})"

    @property
    def fingerprint(self) -> Fingerprint:
        """Name and image size, hash of the weights, preprocessing, width."""
        return Fingerprint(
            encoder=f"timm:{self.name}@{shown(self.image_size)}",
            weights=self._hash.of(self.network),
            preprocessing=self.preprocessing.name,
            dim=self.dim,
        )

    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again, as JSON-able values (weights apart)."""
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

    @property
    def preparation(self) -> Callable[[Tensor], Tensor]:
        """Images (b, c, h, w), uint8 or in [-1, 1], of any size -> what the network takes."""
        return self.preprocessing.apply

    def prepare(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> what the network takes."""
        return self.preprocessing.apply(images)

    def features(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> embeddings (b, d) on its device; differentiable."""
        return self._run(self.prepare(images.to(self.device)))

    def encode_image(self, images: Any) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale.

        Args:
            images: also whatever `retrodiff.pictures.to_images` takes: PIL images, arrays, paths,
                a list of images of several sizes.

        Returns:
            float32 on the CPU.

        Raises:
            ValueError: images whose type or range has no clear meaning; embeddings that are not
                finite; a size that the network does not take.
        """
        parts = prepared(images, self.prepare, self.batch_size, self.in_chans)
        return embedded(self._run, self.network, parts, self.dim, "image")

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """Images that `prepare` returned -> embeddings (b, d), raw scale, float32 on the CPU."""
        parts = prepared.split(self.batch_size)
        return embedded(self._run, self.network, parts, self.dim, "image")

    def _run(self, prepared: Tensor) -> Tensor:
        try:
            return self.network(prepared)
        except (AssertionError, RuntimeError, ValueError) as error:
            h, w = prepared.shape[-2:]
            if isinstance(error, torch.OutOfMemoryError) or self._own_size == _square((h, w)):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.name!r} takes no images of {w} x {h} pixels ({reason}): its own "
                f"image_size={self._own_size}"
            ) from error


def timm_name(name: str, pretrained: bool = False) -> str:
    """The name that timm knows a network by; repositories of timm itself become plain names.

    Args:
        name: such as ``resnet18``, ``resnet18.a1_in1k``, ``hf-hub:timm/resnet18.a1_in1k``.
        pretrained: whether weights are asked for.

    Raises:
        ValueError: there is no such network, tag, or weights; the message names those near it.
    """
    import timm

    source, colon, place = name.partition(":")
    known = place if colon else name
    if not colon or source in ("hf-hub", "hf_hub"):
        known = known.removeprefix("timm/")
        if colon and not (place.startswith("timm/") and timm.is_model(known)):
            known = ""
    elif source not in SOURCES:
        raise ValueError(f"timm has no source {source!r}: {', '.join(f'{s}:' for s in SOURCES)}")
    else:
        known = ""
    if not known:
        return name
    bare, _, tag = known.partition(".")
    if not timm.is_model(bare):
        near = get_close_matches(bare.lower(), timm.list_models(), 5, 0.5)
        raise ValueError(f"timm has no model {name!r}; near it: {', '.join(near) or 'none'}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f"timm has no weights {tag!r} of {bare!r}; it has: {', '.join(tags) or 'none'}"
        )
    if pretrained and not timm.models.is_model_pretrained(known):
        raise ValueError(
            f"timm has no weights of {bare!r}: take pretrained=False (--no-pretrained), or another "
            "network"
        )
    return known


def _repository(name: str, config: Any) -> tuple[str, str]:
    """The repository and a file of a network's weights; empty where they lie elsewhere."""
    source, colon, place = name.partition(":")
    if colon:
        return (place.partition("@")[0] if source in ("hf-hub", "hf_hub") else ""), "config.json"
    return str((config and config.hf_hub_id) or ""), "config.json"


def _whole_size(size: Any) -> Size:
    if isinstance(size, list | tuple) and len(size) == 2:
        return _square([whole("image_size", side) for side in size])
    return whole("image_size", size)


def _square(sides: Any) -> Size:
    """Height and width, as one number where they are the same."""
    h, w = (int(side) for side in sides)
    return h if h == w else (h, w)
