"""``retrodiff train-autoencoder``: a first stage on a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types

if TYPE_CHECKING:
    from torch import Tensor

    from retrodiff.evaluation.reconstruction import Reconstruction
    from retrodiff.networks import KLAutoencoder, VQAutoencoder
    from retrodiff.training.folder_images import FolderImages
    from retrodiff.training.stages.adversarial import Adversarial

MULTIPLIERS = (1, 2, 3, 4, 4, 4)
"""Widths of the levels, as multiples of the first."""

MOST_HELD_OUT = 500

SHAPE = {
    "kind": "kl",
    "factor": 4,
    "latent_channels": 4,
    "channels": 32,
    "blocks": 1,
    "codes": 1024,
}
"""Options of a new first stage, and their defaults."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train-autoencoder",
        help="train a first stage (KL or VQ autoencoder) on a folder of images",
        description="Trains an autoencoder whose latents a diffusion model then learns. The folder "
        "it writes is what --first-stage of train takes; reconstructions.png in it shows images "
        "that it was not trained on, each above its reconstruction.",
    )
    parser.add_argument("images", type=types.path, help="folder of images")
    parser.add_argument("out", type=types.new_folder, help="folder of the first stage")
    parser.add_argument(
        "--held-out",
        type=types.path,
        help="folder of images that are only measured; else one in twenty is left out for that",
    )
    parser.add_argument(
        "--decoder-of",
        type=types.path,
        help="train the decoder of this first stage alone: its latents stay, and so does a network "
        "that was trained on them",
    )
    parser.add_argument("--kind", choices=("kl", "vq"), help="Gaussian latents, or a codebook")
    parser.add_argument("--size", type=types.integer(8), default=64, help="side of the images")
    parser.add_argument(
        "--factor",
        type=int,
        choices=(2, 4, 8, 16, 32),
        help="pixels per latent position and side",
    )
    parser.add_argument(
        "--latent-channels", type=types.integer(1), help="numbers per latent position"
    )
    parser.add_argument(
        "--channels",
        type=types.count,
        help="width of the first level, a multiple of 32; the next ones have 2, 3 and 4 times that",
    )
    parser.add_argument("--blocks", type=types.integer(1, 8), help="residual blocks of each level")
    parser.add_argument("--codes", type=types.integer(2), help="of a vq codebook")
    parser.add_argument("--steps", type=types.count, default=5000, help="training steps")
    parser.add_argument("--batch-size", type=types.count, default=32, help="images per step")
    parser.add_argument(
        "--lr", type=types.real(most=1e6, above=0), default=1e-3, help="highest learning rate"
    )
    parser.add_argument(
        "--ema", type=types.real(0, 1), default=0.999, help="decay of the weights' average"
    )
    parser.add_argument(
        "--kl-weight", type=types.real(0), default=1e-6, help="of the KL divergence (kl)"
    )
    parser.add_argument(
        "--latent-noise",
        type=types.real(0),
        default=0.05,
        help="noise on the latents while training, as a share of their deviation",
    )
    parser.add_argument(
        "--perceptual",
        default="none",
        help="none, lpips (its VGG weights are downloaded once), or the encoder whose feature maps "
        "are compared: timm:NAME or a folder",
    )
    parser.add_argument(
        "--perceptual-weight", type=types.real(0), default=1.0, help="of that distance"
    )
    parser.add_argument(
        "--adversarial-start",
        type=types.integer(0),
        help="step from which a discriminator counts; without it there is none",
    )
    parser.add_argument(
        "--adversarial-weight", type=types.real(0), default=0.5, help="of the discriminator"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 is faster on GPUs and on CPUs that know it",
    )
    parser.add_argument(
        "--checkpoint-every", type=types.count, default=200, help="steps between checkpoints"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument("--device", type=types.device, default="cpu", help="cpu, cuda, mps")
    parser.add_argument(
        "--latents", type=types.path, help="file that receives the latents of all images"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training; --steps may be more than before",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier first stage there"
    )
    parser.set_defaults(run=run, **SHAPE)


def run(options: argparse.Namespace) -> int:
    """Reads, trains, measures, saves."""
    from retrodiff.checkpoints.first_stages import load_autoencoder, save_autoencoder
    from retrodiff.disk.files import place
    from retrodiff.training import cosine
    from retrodiff.training.folder_images import FolderImages
    from retrodiff.training.stages.cached_latents import encode_latents
    from retrodiff.training.stages.first_stage import fit_autoencoder

    out = place(options.out)
    checkpoint = out.with_name(out.name + ".training.safetensors")
    if _finished(out, checkpoint, options):
        print(f"{out} was trained with these options already: nothing is left to do")
    else:
        autoencoder = _autoencoder(options)
        images = FolderImages(options.images, options.size)
        training, held_out = _split(images, options)
        result = fit_autoencoder(
            autoencoder.to(options.device),
            training,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=cosine(options.lr, options.steps, min(100, options.steps // 10)),
            kl_weight=options.kl_weight,
            latent_noise=options.latent_noise,
            decoder_only=options.decoder_of is not None,
            perceptual=_perceptual(options),
            perceptual_weight=options.perceptual_weight,
            adversarial=_adversarial(options),
            ema=options.ema,
            precision=options.precision,
            seed=options.seed,
            checkpoint=checkpoint,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            overwrite=options.overwrite,
        )
        found, sheet = _measured(result.autoencoder, held_out)
        extra: dict[str, Any] = {"training": _settings(options), "held_out": found.numbers()}
        print(f"held out: {found}")
        if result.code_use is not None:
            extra["codes"] = vars(result.code_use)
            print(f"training images: {result.code_use}")
        replace = options.overwrite or options.resume
        save_autoencoder(result.autoencoder.cpu(), out, overwrite=replace, extra=extra, sheet=sheet)
        checkpoint.unlink(missing_ok=True)
        print(f"trained on {len(training)} images for {options.steps} steps: {out}")
    if options.latents is not None:
        images = FolderImages(options.images, options.size)
        file = Path(options.latents)
        made = encode_latents(load_autoencoder(out), images, file, overwrite=options.overwrite)
        print(f"{len(made)} latents of shape {made.shape}: {file}")
    return 0


def _finished(out: Path, checkpoint: Path, options: argparse.Namespace) -> bool:
    """Checks, before any work, what is at the places to be written."""
    from retrodiff.checkpoints.first_stages import MARKER, own_files, read_extra
    from retrodiff.disk.files import check_free
    from retrodiff.training.checkpoint import Checkpoint

    for name, usual in SHAPE.items():
        if options.decoder_of is not None and getattr(options, name) != usual:
            raise ValueError(
                f"--{name.replace('_', '-')} is of a new first stage, and --decoder-of keeps that "
                f"of {options.decoder_of}: leave one of the two out"
            )
    if options.decoder_of is None and options.size % options.factor:
        raise ValueError(
            f"size={options.size} is no multiple of factor={options.factor}: choose one that is"
        )
    state = Checkpoint(checkpoint, resume=options.resume, overwrite=options.overwrite).load()
    if options.resume and not options.overwrite and (out / MARKER).is_file():
        extra = read_extra(out)
        same = isinstance(extra, dict) and extra.get("training") == _settings(options)
        if same and (state is None or state.done == options.steps):
            checkpoint.unlink(missing_ok=True)
            return True
    check_free(out, MARKER, options.overwrite, own_files)
    return False


def _autoencoder(options: argparse.Namespace) -> KLAutoencoder | VQAutoencoder:
    import torch

    from retrodiff.checkpoints.first_stages import load_autoencoder
    from retrodiff.networks import KLAutoencoder, VQAutoencoder

    if options.decoder_of is not None:
        found = load_autoencoder(options.decoder_of)
        if not isinstance(found, (KLAutoencoder, VQAutoencoder)):
            raise ValueError(
                f"--decoder-of {options.decoder_of} holds {type(found).__name__}: only KL and VQ "
                "autoencoders are trained here"
            )
        return found
    torch.manual_seed(options.seed)
    levels = options.factor.bit_length()
    shape: dict[str, Any] = {
        "channels": options.channels,
        "multipliers": MULTIPLIERS[:levels],
        "blocks_per_level": options.blocks,
        "latent_channels": options.latent_channels,
    }
    if options.kind == "kl":
        return KLAutoencoder(**shape)
    return VQAutoencoder(**shape, codes=options.codes)


def _split(images: FolderImages, options: argparse.Namespace) -> tuple[Any, Tensor]:
    """The images to train on, and those to measure."""
    import torch

    from retrodiff.training.folder_images import FolderImages
    from retrodiff.training.seeds import derived

    if options.held_out is not None:
        return images, FolderImages(options.held_out, options.size).bytes[:MOST_HELD_OUT]
    if len(images) < 2:
        raise ValueError(
            f"{options.images} holds one image, and one is needed to measure: give more images"
        )
    order = torch.randperm(len(images), generator=derived(options.seed, "held out", 0))
    count = min(MOST_HELD_OUT, max(1, len(images) // 20))
    return images.bytes[order[count:].sort().values], images.bytes[order[:count].sort().values]


def _perceptual(options: argparse.Namespace) -> Any:
    from retrodiff.encoders import encoder_from_string
    from retrodiff.training.stages.perceptual import FeatureDistance, lpips_distance

    if options.perceptual == "none":
        return None
    if options.perceptual == "lpips":
        return lpips_distance(device=options.device)
    encoder: Any = encoder_from_string(options.perceptual, device=options.device)
    return FeatureDistance.of(encoder)


def _adversarial(options: argparse.Namespace) -> Adversarial | None:
    from retrodiff.networks.patch_discriminator import PatchDiscriminator
    from retrodiff.training.stages.adversarial import Adversarial

    if options.adversarial_start is None:
        return None
    levels = max(1, min(3, (options.size // 3).bit_length() - 1))
    discriminator = PatchDiscriminator(channels=32, levels=levels)
    return Adversarial(discriminator, options.adversarial_start, options.adversarial_weight)


def _measured(autoencoder: Any, held_out: Tensor) -> tuple[Reconstruction, bytes]:
    """Numbers, and a picture of some images and their reconstructions as PNG."""
    import io

    from PIL import Image

    from retrodiff.evaluation.reconstruction import comparison_sheet, reconstruction
    from retrodiff.model.generated import to_picture
    from retrodiff.pictures import to_float

    found = reconstruction(autoencoder, held_out, shown=24)
    originals = to_float(held_out[: len(found.images)])
    picture = to_picture(comparison_sheet(originals, found.images))
    scale = max(1, 96 // held_out.shape[-1])
    size = (scale * picture.width, scale * picture.height)
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(out, "PNG")
    return found, out.getvalue()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is trained."""
    no = {"images", "out", "held_out", "resume", "overwrite", "run", "command", "device", "latents"}
    if options.decoder_of is None:  # as it was before there was this option
        no |= {"decoder_of"}
    return {k: v for k, v in vars(options).items() if k not in no and k != "checkpoint_every"}
