"""How far resizing and cropping stray from Pillow's: ours and torchvision's, in levels of 255.

``python benchmarks/preprocessing_parity.py``

CLIP was trained on pictures that torchvision handed to Pillow: bicubic resize of the short side,
then a central crop. Differences below one level are rounding to bytes, which ours leaves out.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from retrodiff.encoders.preprocessing import CenterCrop, ResizeShort


def pictures() -> dict[str, np.ndarray]:
    """Photographs and the hardest patterns (h, w, 3)."""
    from skimage import data

    noise = np.random.default_rng(0).integers(0, 256, (301, 417, 3), dtype=np.uint8)
    checks = (np.indices((300, 400)).sum(0) % 2 * 255).astype(np.uint8)
    return {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "noise": noise,
        "checks": checks[..., None].repeat(3, -1),
    }


def torchvisions(size: int) -> v2.Transform:
    """Its resize and crop."""
    return v2.Compose(
        [v2.Resize(size, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    )


def ours(images: Tensor, size: int) -> Tensor:
    """Resize and crop as encoders have them, back in levels."""
    return (CenterCrop(size).apply(ResizeShort(size).apply(images)) + 1) * 127.5


def main() -> None:
    """Prints mean and maximal differences."""
    for name, picture in pictures().items():
        bytes_ = torch.from_numpy(picture.copy()).movedim(-1, 0)[None]
        floats = bytes_.float() / 127.5 - 1
        for size in (64, 224, 448):
            pillow = v2.functional.pil_to_tensor(torchvisions(size)(Image.fromarray(picture)))
            theirs = (torchvisions(size)(floats) + 1) * 127.5
            found = {
                "ours, bytes": ours(bytes_, size),
                "ours, floats": ours(floats, size),
                "torchvision, bytes": torchvisions(size)(bytes_).float(),
                "torchvision, floats": theirs,
                "torchvision, floats cut off": theirs.clamp(0, 255),
            }
            print(f"{name} {picture.shape[1]}x{picture.shape[0]} -> {size}")
            for what, result in found.items():
                off = (result - pillow.float()).abs()
                print(f"  {what:28} mean {float(off.mean()):.3f}  most {float(off.max()):.2f}")


if __name__ == "__main__":
    main()
