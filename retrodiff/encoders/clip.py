"""Maps images and text to embeddings in one space, with open_clip's own model classes.

CLIP: Radford et al. 2021; φ of Blattmann et al. 2022 is its ViT-B/32. Any name and tag of open_clip
works for who can download weights; `CLIPEncoder.from_config` makes one from numbers, to be trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.disk.untrusted import read_json
from retrodiff.encoders.fingerprint import WeightsHash
from retrodiff.encoders.passes import embedded, prepared
from retrodiff.encoders.preprocessing import Preprocessing, Size, plain, preprocessing_from, shown
from retrodiff.encoders.prompts import prompt_list, tokens_of
from retrodiff.encoders.reach import ask_once
from retrodiff.encoders.trained import of_open_clip
from retrodiff.encoders.vocabulary import LARGEST, clip_tokenizer
from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.numbers import whole


class CLIPEncoder(nn.Module, TextEncoder):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A CLIP model as encoder of images and text; embeddings are raw, as CLIP gives them.

    They come back as float32 on the CPU, wherever the weights are; ``encoder.to(device)`` moves
    those.

    Args:
        name: open_clip's model name, such as ``ViT-B-32-quickgelu``; also ``hf-hub:OWNER/NAME`` or
            ``local-dir:FOLDER``, which bring their own weights.
        pretrained: tag of open_clip (``openai``, ``laion2b_s34b_b79k``) or a file; loaded on first
            use. None: fresh random weights.
        preprocessing: None: that of the weights, as open_clip knows it. ``rdm``, ``openai``,
            ``plain`` or a `Preprocessing`: another one.
        image_size: side of the images that the network takes; None: its own.
        device: where the weights live.
        batch_size: images or prompts per pass.

    Raises:
        ValueError: open_clip has no such model or weights, or the two do not belong together.

    Examples:
        >>> encoder = CLIPEncoder("ViT-B-32-quickgelu", "openai")
        >>> encoder.dim, encoder.preprocessing.name
        (512, 'openai-224')
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None = None,
        *,
        preprocessing: str | Preprocessing | dict[str, Any] | None = None,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ):
        super().__init__()
        import open_clip

        config, own = _configured(name, pretrained)
        _refuse_wrong_activation(name, pretrained, config)
        self.name, self.pretrained = name, pretrained
        if image_size is not None:
            config["vision_cfg"]["image_size"] = whole("image_size", image_size)
        self._sized = image_size
        size = _size_of(config)
        chosen = preprocessing_from(preprocessing, size, of_open_clip(own, size))
        self._setup(config, chosen, device, batch_size)
        if pretrained is None and ":" not in name:
            self.clip = open_clip.create_model(
                name, device=self.device, force_image_size=self._sized
            )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        preprocessing: str | Preprocessing | dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> CLIPEncoder:
        """A CLIP of given size with fresh weights, ready to be trained.

        Args:
            config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, if wished, ``quick_gelu``: the
                arguments of `open_clip.CLIP`. ``text_cfg.vocab_size`` may be any from 514: the
                tokenizer then has the first so many tokens of CLIP's 49408.
            preprocessing: None: ``plain``; or ``rdm``, ``openai``, a `Preprocessing`.
            device: where the weights live.
            batch_size: images or prompts per pass.
        """
        import open_clip

        self = cls.__new__(cls)
        nn.Module.__init__(self)
        numbers: dict[str, Any] = json.loads(json.dumps(dict(config)))
        text = numbers["text_cfg"]
        tokenizer = clip_tokenizer(
            text.setdefault("vocab_size", LARGEST), text.get("context_length", 77)
        )
        self.name = self.pretrained = self._sized = None
        size = _size_of(numbers)
        chosen = preprocessing_from(preprocessing, size, plain(size))
        self._setup(numbers, chosen, device, batch_size)
        self._tokenizer = tokenizer
        self.clip = open_clip.CLIP(**numbers).to(self.device)
        return self

    def _setup(
        self,
        config: dict[str, Any],
        preprocessing: Preprocessing,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        self._config = config
        self.image_size: Size = _size_of(config)
        self.preprocessing = preprocessing
        self.batch_size = whole("batch_size", batch_size)
        self._hash = WeightsHash()
        self._tokenizer: Any = None
        self._cut: set[str] = set()
        self.register_module("clip", None)
        # Remembers the device until there are weights: whatever moves a module moves it, too.
        anchor = torch.empty(0, dtype=torch.float32, device=torch.device(device))
        self.register_buffer("_anchor", anchor, persistent=False)

    @property
    def model(self) -> Any:
        """open_clip's module; its pretrained weights are loaded when it is first asked for."""
        if self.clip is None:
            self.clip = _load(str(self.name), self.pretrained, self.device, self._sized)
        return self.clip

    @property
    def device(self) -> torch.device:
        """Where the weights are, or will be when they are loaded."""
        return self.get_buffer("_anchor").device

    @property
    def dim(self) -> int:
        """Width d of an embedding; known without loading weights."""
        return int(self._config["embed_dim"])

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory; published ones are loaded when first used."""
        return self.clip is not None

    def __repr__(self) -> str:
        return f"CLIPEncoder({self.identity.encoder})"

    @property
    def fingerprint(self) -> Fingerprint:
        """Name with activation and image size, hash of the weights, preprocessing, width."""
        return replace(self._named(), weights=self._hash.of(self.model))

    @property
    def identity(self) -> Fingerprint:
        """The fingerprint; the hash of weights that are not loaded yet is empty."""
        return self.fingerprint if self.loaded else self._named()

    def _named(self) -> Fingerprint:
        if self.name is None:
            text = json.dumps(self._config, sort_keys=True)
            name = f"clip:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        else:
            gelu = "quick_gelu" if self._config.get("quick_gelu") else "gelu"
            name = f"open_clip:{self.name}:{gelu}"
        return Fingerprint(
            encoder=f"{name}@{shown(self.image_size)}",
            weights="",
            preprocessing=self.preprocessing.name,
            dim=self.dim,
        )

    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again, as JSON-able values (weights apart)."""
        common = {"preprocessing": self.preprocessing.config(), "batch_size": self.batch_size}
        if self._sized is not None:
            common["image_size"] = self._sized
        if self.name is None:
            return {"kind": "clip", "config": self._config, **common}
        return {"kind": "open_clip", "name": self.name, "pretrained": self.pretrained, **common}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> tokens (b, length) int64 on the encoder's device.

        What a prompt has beyond the encoder's length is left out, with a warning (`PromptCut`).
        """
        if self._tokenizer is None:
            import open_clip

            self._tokenizer = open_clip.get_tokenizer(self.name)
        return tokens_of(self._tokenizer, prompt_list(prompts), self._cut).to(self.device)

    @property
    def preparation(self) -> Callable[[Tensor], Tensor]:
        """Images (b, c, h, w), uint8 or in [-1, 1], of any size -> what the image tower takes."""
        return self.preprocessing.apply

    def prepare(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> what the image tower takes."""
        return self.preprocessing.apply(images)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> embeddings (b, d) on its device; differentiable."""
        return self.model.encode_image(self.prepare(images.to(self.device)))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (b, length) -> embeddings (b, d) on its device; differentiable."""
        return self.model.encode_text(tokens)

    def encode_image(self, images: Any) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale.

        Args:
            images: also whatever `retrodiff.pictures.to_images` takes: PIL images, arrays, paths,
                a list of images of several sizes.

        Returns:
            float32 on the CPU.

        Raises:
            ValueError: images whose type or range has no clear meaning; embeddings that are not
                finite.
        """
        parts = prepared(images, self.prepare, self.batch_size)
        return embedded(self.model.encode_image, self.model, parts, self.dim, "image")

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """Images that `prepare` returned -> embeddings (b, d), raw scale, float32 on the CPU."""
        parts = prepared.split(self.batch_size)
        return embedded(self.model.encode_image, self.model, parts, self.dim, "image")

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> embeddings (b, d), raw scale, float32 on the CPU."""
        prompts = prompt_list(prompts)
        if not prompts:
            return torch.empty(0, self.dim, dtype=torch.float32, device="cpu")
        parts = self.tokenize(prompts).split(self.batch_size)
        return embedded(self.model.encode_text, self.model, parts, self.dim, "prompt")

    def extra_repr(self) -> str:
        """What a printout shows beside the modules."""
        return f"name={self.name!r}, pretrained={self.pretrained!r}, dim={self.dim}"


def _configured(name: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's numbers, and what its weights ask of images."""
    import open_clip

    kind, _, place = name.partition(":")
    if place:
        if pretrained is not None:
            raise ValueError(
                f"{name!r} brings its own weights: leave pretrained={pretrained!r} out"
            )
        about = _described(kind, place)
        config = about.get("model_cfg", about)
        if config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("trust_remote_code"):
            raise ValueError(
                f"the tokenizer of {name!r} asks to run code of its own (trust_remote_code), which "
                "is never done here"
            )
        return config, about.get("preprocess_cfg") or {}
    config = open_clip.get_model_config(name)
    if config is None:
        near = get_close_matches(name, open_clip.list_models(), 3)
        way = f"; near it: {', '.join(near)}" if near else ": see open_clip.list_models()"
        raise ValueError(f"open_clip has no model {name!r}{way}")
    tagged: Any = None
    if pretrained is not None and not Path(pretrained).is_file():
        tagged = open_clip.get_pretrained_cfg(name, pretrained)
    return config, dict(tagged or {})


def _described(kind: str, place: str) -> dict[str, Any]:
    """The ``open_clip_config.json`` of a repository or a folder."""
    if kind == "local-dir":
        file = Path(place).expanduser() / "open_clip_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{place} holds no open_clip_config.json: not of open_clip")
    elif kind == "hf-hub":
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(place, "open_clip_config.json"))
        except Exception as error:  # no route, no cache, no such repository: one way out
            raise OSError(
                f"cannot fetch open_clip_config.json of {place!r} ({type(error).__name__}): is it "
                "a repository of open_clip, and are you online?"
            ) from error
    else:
        raise ValueError(f"open_clip has no source {kind!r}: hf-hub:OWNER/NAME, local-dir:FOLDER")
    return read_json(file, largest=1 << 20)


def _size_of(config: Mapping[str, Any]) -> Size:
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple):
        return size[0] if size[0] == size[1] else (size[0], size[1])
    return size


def _refuse_wrong_activation(name: str, pretrained: str | None, config: dict[str, Any]) -> None:
    """OpenAI's weights need quick-GELU; open_clip only warns and gives wrong embeddings."""
    import open_clip

    if pretrained is None or ":" in name or Path(pretrained).is_file():
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


def _repository(name: str, pretrained: str) -> tuple[str, str]:
    """The repository and the file of a tag's weights; empty where they lie elsewhere."""
    import open_clip

    cfg: Any = open_clip.get_pretrained_cfg(name, pretrained)
    repo, _, file = str((cfg or {}).get("hf_hub", "")).rpartition("/")
    return repo, file or "open_clip_config.json"


def _load(
    name: str, pretrained: str | None, device: torch.device, image_size: int | None
) -> nn.Module:
    import open_clip

    try:
        if pretrained is not None:
            ask_once(*_repository(name, pretrained))
        model = open_clip.create_model(
            name, pretrained=pretrained, device=device, force_image_size=image_size
        )
    except Exception as error:
        # Whatever the download raises (no route, no cache, a proxy), the way out is the same.
        which = f"the weights {pretrained!r} of {name!r}" if pretrained else f"{name!r}"
        raise OSError(
            f"cannot load {which} ({type(error).__name__}): go online once so that they are "
            "cached, or give pretrained= a checkpoint file you have"
        ) from error
    return model.requires_grad_(False).eval()
