"""Latents of training images, computed once and kept in a file that is mapped.

A diffusion model that is trained on them does not encode its images at every step. The file names
the first stage that made them, by its class, its arguments and a hash of its weights; a model with
another one refuses them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from retrodiff.checkpoints.first_stages import stage_fingerprint
from retrodiff.components import evaluating, where
from retrodiff.diffusion import Identity
from retrodiff.interfaces import Autoencoder, Encoder
from retrodiff.numbers import whole
from retrodiff.precision import full_precision
from retrodiff.retrieval.table import map_table, tabulated
from retrodiff.training.images import Images, as_images, digest, embedded, pixels

KIND = "retrodiff latents"

M = TypeVar("M")


class CachedLatents:
    """Latents of images, trained on in the images' place.

    Made by `encode_latents` or `open_latents`. A `TrainingSet` takes them as its images.

    Args:
        latents: (n, c, h, w), float16, bfloat16 or float32.
        autoencoder: fingerprint of what made them, see `stage_fingerprint`.
        made_from: hash of the images.
        pictures: the images themselves, which encoders embed; None: they are not at hand.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import PrincipalPatches
        >>> from retrodiff.training import encode_latents
        >>> images = torch.rand(20, 3, 16, 16) * 2 - 1
        >>> first_stage = PrincipalPatches.fit(images, patch=4, components=8)
        >>> encode_latents(first_stage, images, "latents.safetensors", progress=False).shape
        (8, 4, 4)
    """

    def __init__(
        self, latents: Tensor, autoencoder: str, made_from: str, pictures: Images | None = None
    ) -> None:
        self.latents, self.autoencoder = latents, autoencoder
        self.made_from, self.pictures = made_from, pictures

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> latents (b, c, h, w), float32."""
        return self.latents[rows].float()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent (c, h, w)."""
        c, h, w = self.latents.shape[1:]
        return c, h, w

    def embed(self, encoder: Encoder, rows: Tensor) -> Tensor:
        """Row numbers (b,) -> embeddings (b, d) of the pictures.

        Raises:
            ValueError: the images are not at hand.
        """
        if self.pictures is None:
            raise ValueError(
                "latents alone cannot be embedded: open them with their images, "
                "open_latents(path, images), or make the training set of the images first and "
                "replace them, dataclasses.replace(data, images=latents)"
            )
        return embedded(self.pictures, encoder, rows)

    def digest(self) -> str:
        """Hash of what they were made from."""
        text = f"{KIND} {self.autoencoder} {self.made_from} {self.latents.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def encode_latents(
    autoencoder: Autoencoder,
    images: Images | Any,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> CachedLatents:
    """Encodes images once and maps their latents from a file.

    A file that is whole is opened; one that was begun is continued.

    Args:
        autoencoder: a trained first stage.
        images: n images: `FolderImages`, a tensor (n, c, h, w), or a list of pictures.
        path: of the file, such as ``latents.safetensors``.
        dtype: float16 (error below 0.05 %), bfloat16 (0.4 %) or float32.
        batch_size: images at a time.
        overwrite: replace a file that is there.
        progress: show a bar.

    Raises:
        ValueError: the file holds latents of other images or of another first stage; or a latent
            is too large for its type.
        OSError: it cannot be written.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={dtype}: give torch.float16, torch.bfloat16 or torch.float32")
    batch_size = whole("batch_size", batch_size)
    shown, path = as_images(images), Path(path).expanduser()
    device, kind = where(autoencoder) or (torch.device("cpu"), torch.float32)

    def encoded(start: int, stop: int) -> Tensor:
        batch = pixels(shown, torch.arange(start, stop))
        with torch.no_grad(), evaluating(autoencoder), full_precision():
            found = autoencoder.encode(batch.to(device, kind)).to(dtype)
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"latents of images {start} to {stop} are not finite as {dtype}: give "
                "dtype=torch.float32, or look at the autoencoder's weights"
            )
        return found

    mark, made_from = stage_fingerprint(autoencoder), digest(shown)
    _check_own(path, mark, overwrite)
    first = encoded(0, 1)
    latents = tabulated(
        encoded,
        (len(shown), *first.shape[1:]),
        dtype,
        batch_size=batch_size,
        what="encoding",
        progress=progress,
        path=path,
        about={"kind": KIND, "autoencoder": mark, "images": made_from},
        resume=True,
        overwrite=overwrite,
    )
    return CachedLatents(latents, mark, made_from, shown)


def open_latents(path: str | Path, images: Images | Any | None = None) -> CachedLatents:
    """Latents from a file written by `encode_latents`.

    Args:
        path: of the file.
        images: those that they were made from, for encoders that embed them; None: not at hand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds no latents, or those of other images.
    """
    path = Path(path).expanduser()
    latents, about = map_table(path)
    if about.get("kind") != KIND or latents.ndim != 4:
        raise ValueError(f"{path} holds no latents: make them with encode_latents")
    shown = None if images is None else as_images(images)
    if shown is not None and digest(shown) != about.get("images"):
        raise ValueError(
            f"{path} holds the latents of other images: give those, or make them again with "
            "encode_latents(..., overwrite=True)"
        )
    return CachedLatents(latents, about.get("autoencoder", ""), about.get("images", ""), shown)


def on_latents(model: M, images: Any) -> M:
    """The model as it is trained on these images: on latents, without its first stage.

    Args:
        model: a `Model`.
        images: of a training set; anything but `CachedLatents` leaves the model as it is.

    Raises:
        ValueError: the latents were made by another first stage than the model's.
    """
    if not isinstance(images, CachedLatents):
        return model
    stage: Any = getattr(model, "autoencoder", None)
    if stage is None or stage_fingerprint(stage) != images.autoencoder:
        raise ValueError(
            "the latents were made by another first stage than the model's, or by the same one "
            "before it was trained further: give the model that one, or make the latents again "
            "with encode_latents(model.autoencoder, ...)"
        )
    return model.replace(autoencoder=Identity())  # type: ignore[attr-defined]


def _check_own(path: Path, mark: str, overwrite: bool) -> None:
    """Names the reason, before any work, where a whole file is of another first stage."""
    if overwrite or not path.exists():
        return
    found = open_latents(path)
    if found.autoencoder != mark:
        raise ValueError(
            f"{path} holds latents of another first stage: choose another path, or make them "
            "again (overwrite=True)"
        )
