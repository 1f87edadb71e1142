"""Trains the pictograms' first stage: 64x64 pictures to 16x16 latents of 4 channels and back.

    python benchmarks/pictograms/data.py                       # once: gets the pictures
    python benchmarks/pictograms/first_stage.py --pictures 400000 --threads 2

The same command continues after an interruption and, with more ``--pictures``, after it has
finished. It trains on Noto, Fluent and Twemoji, on the concepts of the splits ``train`` and
``database``, never on held-out ones. At the end it writes

- runs/pictograms/first_stage: the first stage (`load_autoencoder` opens it);
- runs/pictograms/first_stage.json: PSNR, SSIM and rmse of held-out concepts in each style, with
  OpenMoji, a style that was never seen;
- runs/pictograms/first_stage.reconstructions.png: for each style a line of held-out originals and
  a line of their reconstructions.

``--decoder-of FOLDER`` goes on with the decoder of a finished first stage alone: its latents stay,
and so does a network that was trained on them. With ``--perceptual lite1`` (features of
EfficientNet-Lite1, which judges nothing here) and ``--adversarial-start`` edges become sharp:

    python benchmarks/pictograms/first_stage.py --decoder-of runs/pictograms/first_stage \
        --out runs/pictograms/sharp --pictures 80000 --perceptual lite1 --adversarial-start 700 \
        --latent-noise 0.1 --lr 7e-4

``--report`` writes these three for the state of a training that is still going on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.checkpoints.first_stages import load_autoencoder, save_autoencoder
from retrodiff.evaluation.reconstruction import reconstruction
from retrodiff.networks import KLAutoencoder, PatchDiscriminator
from retrodiff.training import Adversarial, FeatureDistance, cosine
from retrodiff.training.checkpoint import read_state
from retrodiff.training.stages.first_stage import fit_autoencoder, normalize_latents

sys.path.insert(0, str(Path(__file__).parents[1]))
from lite0 import lite

TRAINED = ("noto", "fluent", "twemoji")


def main() -> None:
    """Reads, trains, reports, saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms/first_stage"))
    parser.add_argument("--pictures", type=int, default=400_000, help="seen in all, with repeats")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--latent-noise", type=float, default=0.05)
    parser.add_argument("--kl-weight", type=float, default=1e-6)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--decoder-of", type=Path, help="a first stage whose latents are kept")
    parser.add_argument("--perceptual", choices=("lite1",), help="a distance of its feature maps")
    parser.add_argument("--perceptual-weight", type=float, default=0.1)
    parser.add_argument("--adversarial-start", type=int, help="step from which a critic counts")
    parser.add_argument("--adversarial-weight", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="of the state so far; no training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    autoencoder: Any = KLAutoencoder(
        channels=32, multipliers=options.multipliers, blocks_per_level=1, latent_channels=4
    )
    if options.decoder_of is not None:
        autoencoder = load_autoencoder(options.decoder_of)
    images = torch.cat([read(options.data, s, ("train", "database")) for s in TRAINED])
    size = sum(p.numel() for p in autoencoder.parameters())
    print(f"{size / 1e6:.2f} M parameters, {len(images)} pictures", flush=True)
    checkpoint = options.out.with_name(options.out.name + ".training.safetensors")
    steps = options.pictures // options.batch_size
    if options.report:
        state = read_state(checkpoint)
        average = state.part("ema.average")
        with torch.no_grad():
            for name, parameter in autoencoder.eval().named_parameters():
                parameter.copy_(average.get(name, parameter))
        if options.decoder_of is None:
            normalize_latents(autoencoder, images)
        report(autoencoder, options, {"steps": state.done})
        return
    started, seen = time.perf_counter(), 0

    def after(done: int, *_: float) -> None:
        nonlocal seen
        seen += options.batch_size
        if done % 200 == 0:
            speed = seen / (time.perf_counter() - started)
            print(f"step {done} of {steps}, {speed:.1f} pictures/s", flush=True)

    result = fit_autoencoder(
        autoencoder,
        images,
        steps=steps,
        batch_size=options.batch_size,
        lr=cosine(options.lr, steps, min(200, steps // 10)),
        kl_weight=options.kl_weight,
        latent_noise=options.latent_noise,
        decoder_only=options.decoder_of is not None,
        perceptual=perceptual(options),
        perceptual_weight=options.perceptual_weight,
        adversarial=adversarial(options),
        ema=0.999,
        precision=options.precision,
        checkpoint=checkpoint,
        checkpoint_every=500,
        resume=True,
        after=after,
        progress=False,
    )
    report(result.autoencoder, options, {"steps": steps, "loss": float(result.losses[-50:].mean())})


def perceptual(options: argparse.Namespace) -> FeatureDistance | None:
    """The distance of feature maps down to an eighth of the pixels, where one is asked for."""
    if options.perceptual is None:
        return None
    return FeatureDistance.of(lite(1, 64), layers=(0, 1, 2))


def adversarial(options: argparse.Namespace) -> Adversarial | None:
    """A critic of patches, where one is asked for."""
    if options.adversarial_start is None:
        return None
    critic = PatchDiscriminator(channels=32, levels=2)
    return Adversarial(critic, options.adversarial_start, options.adversarial_weight)


def read(folder: Path, style: str, splits: tuple[str, ...]) -> Tensor:
    """The pictures (n, 3, 64, 64) of some splits of one set, as bytes."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(folder / f"{style}.parquet", columns=["image", "split"]).to_pylist()
    pictures = [
        np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        for row in rows
        if row["split"] in splits
    ]
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous()


def report(autoencoder: Any, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Numbers and a picture of held-out concepts; both are kept beside the first stage."""
    from PIL import Image

    numbers: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(options).items()}, **facts}
    columns = []
    for style in (*TRAINED, "openmoji"):
        if not (options.data / f"{style}.parquet").exists():
            continue
        held_out = read(options.data, style, ("held-out",))
        found = reconstruction(autoencoder, held_out)
        numbers[style] = found.numbers()
        print(f"{style}: {found}", flush=True)
        some = torch.linspace(0, min(len(held_out), len(found.images)) - 1, 12).long()
        made = ((found.images[some] + 1) * 127.5).round().clamp(0, 255).byte()
        columns.append(torch.stack([held_out[some], made], 1).flatten(0, 1))  # original, made, ...
    pairs = [c.unflatten(0, (-1, 2)) for c in columns]  # (12, 2, 3, h, w) for each style
    rows = [row for pair in pairs for row in (pair[:, 0], pair[:, 1])]
    sheet = torch.cat([torch.cat(list(row), -1) for row in rows], -2)
    save_autoencoder(autoencoder, options.out, overwrite=True, extra=numbers)
    file = options.out.with_name(options.out.name + ".reconstructions.png")
    picture = Image.fromarray(sheet.movedim(0, -1).contiguous().numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file)
    text = json.dumps(numbers, indent=2)
    options.out.with_name(options.out.name + ".json").write_text(text + "\n")
    print(f"{options.out}, {file}")


if __name__ == "__main__":
    main()
