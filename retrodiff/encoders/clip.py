"""Places images and text in one space, with open_clip's own model classes.

CLIP: Radford et al. 2021; φ of Blattmann et al. 2022 is its ViT-B/32. Any name and tag of open_clip
works for who can download weights; `CLIPEncoder.from_config` makes one from numbers, to be trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.encoders.fingerprint import WeightsHash
from retrodiff.encoders.preprocessing import Preprocessing, preprocessing_from
from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.precision import full_precision


class CLIPEncoder(nn.Module, TextEncoder):
    """A CLIP model as encoder of images and text; embeddings are raw, as CLIP gives them.

    Args:
        name: open_clip's model name, such as ``ViT-B-32-quickgelu``.
        pretrained: tag of open_clip (``openai``, ``laion2b_s34b_b79k``) or a file; loaded on first
            use. None: fresh random weights.
        preprocessing: ``rdm``, ``openai``, ``plain`` or a `Preprocessing`.
        device: where the weights live.
        batch_size: images or prompts per pass.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        *,
        preprocessing: str | Preprocessing | dict[str, Any] = "rdm",
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ):
        super().__init__()
        import open_clip

        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"open_clip has no model {name!r}: see open_clip.list_models()")
        _refuse_wrong_activation(name, pretrained, config)
        self.name, self.pretrained = name, pretrained
        self._setup(config, preprocessing, device, batch_size)
        if pretrained is None:
            self.clip = open_clip.create_model(name, device=self._device)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        preprocessing: str | Preprocessing | dict[str, Any] = "plain",
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> CLIPEncoder:
        """A CLIP of given size with fresh weights, ready to be trained.

        Args:
            config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, if wished, ``quick_gelu``: the
                arguments of `open_clip.CLIP`.
            preprocessing: ``plain``, ``rdm``, ``openai`` or a `Preprocessing`.
            device: where the weights live.
            batch_size: images or prompts per pass.
        """
        import open_clip

        self = cls.__new__(cls)
        nn.Module.__init__(self)
        numbers: dict[str, Any] = json.loads(json.dumps(dict(config)))
        vocabulary = numbers["text_cfg"].setdefault("vocab_size", 49408)
        if vocabulary < 49408:
            raise ValueError(
                f"text_cfg.vocab_size={vocabulary} is less than the tokenizer's 49408 tokens"
            )
        self.name = self.pretrained = None
        self._setup(numbers, preprocessing, device, batch_size)
        self.clip = open_clip.CLIP(**numbers).to(self._device)
        return self

    def _setup(
        self,
        config: dict[str, Any],
        preprocessing: str | Preprocessing | dict[str, Any],
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        self._config = config
        size = config["vision_cfg"].get("image_size", 224)
        self.image_size: int = size[0] if isinstance(size, list | tuple) else size
        self.preprocessing = preprocessing_from(preprocessing, self.image_size)
        self.batch_size = batch_size
        self._device = torch.device(device)
        self._hash = WeightsHash()
        self._tokenizer: Callable[[list[str]], Tensor] | None = None
        self.register_module("clip", None)

    @property
    def model(self) -> Any:
        """open_clip's module; its pretrained weights are loaded when it is first asked for."""
        if self.clip is None:
            self.clip = _load(str(self.name), str(self.pretrained), self._device)
        return self.clip

    @property
    def dim(self) -> int:
        """Width d of an embedding; known without loading weights."""
        return int(self._config["embed_dim"])

    @property
    def loaded(self) -> bool:
        """Whether the weights are here; until then `identity` is known without them."""
        return self.clip is not None

    @property
    def fingerprint(self) -> Fingerprint:
        """Name with activation and image size, hash of the weights, preprocessing, width."""
        return replace(self.identity, weights=self._hash.of(self.model))

    @property
    def identity(self) -> Fingerprint:
        """The fingerprint with an empty weights hash."""
        if self.name is None:
            text = json.dumps(self._config, sort_keys=True)
            name = f"clip:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        else:
            gelu = "quick_gelu" if self._config.get("quick_gelu") else "gelu"
            name = f"open_clip:{self.name}:{gelu}"
        return Fingerprint(
            encoder=f"{name}@{self.image_size}",
            weights="",
            preprocessing=self.preprocessing.name,
            dim=self.dim,
        )

    def config(self) -> dict[str, Any]:
        """What builds this encoder again, as JSON-able values (weights apart)."""
        common = {"preprocessing": self.preprocessing.config(), "batch_size": self.batch_size}
        if self.name is None:
            return {"kind": "clip", "config": self._config, **common}
        return {"kind": "open_clip", "name": self.name, "pretrained": self.pretrained, **common}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> tokens (b, length) int64."""
        if self._tokenizer is None:
            import open_clip

            if self.name is None:
                length = self._config["text_cfg"].get("context_length", 77)
                self._tokenizer = open_clip.SimpleTokenizer(context_length=length)
            else:
                self._tokenizer = open_clip.get_tokenizer(self.name)
        return self._tokenizer(list(prompts)).to(self._device_now())

    def prepare(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> what the image tower takes."""
        return self.preprocessing.apply(images)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> embeddings (b, d); differentiable."""
        return self.model.encode_image(self.prepare(images.to(self._device_now())))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (b, length) -> embeddings (b, d); differentiable."""
        return self.model.encode_text(tokens)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale."""
        with inference(self):
            parts = [self.image_features(part) for part in images.split(self.batch_size)]
            return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """What `prepare` returned -> embeddings (b, d), raw scale."""
        with inference(self):
            parts = prepared.to(self._device_now()).split(self.batch_size)
            return torch.cat([self.model.encode_image(part) for part in parts])

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> embeddings (b, d), raw scale."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is one string, expected a list: [{prompts!r}]")
        if not prompts:
            return torch.empty(0, self.dim)
        with inference(self):
            tokens = self.tokenize(prompts).split(self.batch_size)
            return torch.cat([self.text_features(part) for part in tokens])

    def _device_now(self) -> torch.device:
        return next(self.model.parameters()).device

    def extra_repr(self) -> str:
        """What a printout shows beside the modules."""
        return f"name={self.name!r}, pretrained={self.pretrained!r}, dim={self.dim}"


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """No gradients, no autocast and evaluation mode, until the end of the block.

    Embeddings that a database stores and those that are asked of it must be of one precision.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), full_precision():
            yield
    finally:
        module.train(training)


def _refuse_wrong_activation(name: str, pretrained: str | None, config: dict[str, Any]) -> None:
    """OpenAI's weights need quick-GELU; open_clip only warns and gives wrong embeddings."""
    import open_clip

    if pretrained is None or Path(pretrained).is_file():
        return
    cfg: Any = open_clip.get_pretrained_cfg(name, pretrained)
    if not cfg:
        other = f"{name}-quickgelu"
        base = name.removesuffix("-quickgelu")
        tags = open_clip.list_pretrained_tags_by_model(name)
        way = f"tags of it: {', '.join(tags) or 'none'}"
        if base != name and open_clip.get_pretrained_cfg(base, pretrained):
            way = f"that tag belongs to {base!r}"
        elif open_clip.get_pretrained_cfg(other, pretrained):
            way = f"that tag belongs to {other!r}"
        raise ValueError(f"open_clip has no weights {pretrained!r} for {name!r}; {way}")
    wanted, is_quick = bool(cfg.get("quick_gelu")), bool(config.get("quick_gelu"))
    if wanted != is_quick:
        right = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {pretrained!r} were trained with {'quick-GELU' if wanted else 'GELU'}, "
            f"{name!r} computes {'quick-GELU' if is_quick else 'GELU'}: use {right!r}"
        )


def _ask_hub(name: str, pretrained: str) -> None:
    """One request before many: without a network, open_clip asks again for the better of a minute.

    Raises whatever the request does, unless the Hub answers, something is cached, or the weights
    come from elsewhere.
    """
    import open_clip
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cfg: Any = open_clip.get_pretrained_cfg(name, pretrained)
    repo, _, file = str((cfg or {}).get("hf_hub", "")).rpartition("/")
    if not repo:
        return
    try:
        snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        with suppress(HfHubHTTPError):
            get_hf_file_metadata(hf_hub_url(repo, file or "open_clip_config.json"), timeout=10)


def _load(name: str, pretrained: str, device: torch.device) -> nn.Module:
    import open_clip

    try:
        _ask_hub(name, pretrained)
        model = open_clip.create_model(name, pretrained=pretrained, device=device)
    except Exception as error:
        # Whatever the download raises (no route, no cache, a proxy), the way out is the same.
        raise OSError(
            f"cannot load the weights {pretrained!r} of {name!r} ({type(error).__name__}): go "
            "online once so that they are cached, or give pretrained= a checkpoint file you have"
        ) from error
    return model.requires_grad_(False).eval()
