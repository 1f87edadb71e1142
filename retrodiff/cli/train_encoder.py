"""``retrodiff train-encoder``: a small encoder of one's own pictures, without any download."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types

if TYPE_CHECKING:
    from retrodiff.encoders import CLIPEncoder
    from retrodiff.training.captioned import Captioned

FEW = 20
"""Least held-out pictures that recall is reported for."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train-encoder",
        help="train a small encoder on your images, where none can be downloaded",
        description="Without --captions, trains a timm network so that two crops of one image lie "
        "close (SimCLR); it knows images only. With --captions, trains a small CLIP: text and "
        "images. The folder it writes is what --encoder of the other commands takes. With a "
        "published CLIP at hand, use that: open_clip:ViT-B-32-quickgelu:openai.",
    )
    parser.add_argument(
        "images", type=types.path, help="folder of images; with --captions any source of pictures"
    )
    parser.add_argument("out", type=types.new_folder, help="folder of the encoder")
    parser.add_argument(
        "--captions",
        action="append",
        default=[],
        metavar="WHERE",
        help="txt (a text file beside each image), a table FILE.csv or FILE.jsonl with columns "
        "file and caption, or the name of a column; may be given several times",
    )
    parser.add_argument("--network", default="test_resnet", help="name of a timm network")
    parser.add_argument(
        "--size", type=types.integer(16, 512), default=32, help="side it sees, in pixels"
    )
    parser.add_argument("--steps", type=types.count, default=500, help="training steps")
    parser.add_argument("--batch-size", type=types.integer(2), default=64, help="images per step")
    parser.add_argument(
        "--lr", type=types.real(most=1e6, above=0), default=2e-3, help="highest learning rate"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument(
        "--checkpoint-every", type=types.count, default=200, help="steps between checkpoints"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier encoder there")
    clip = parser.add_argument_group("with --captions")
    clip.add_argument(
        "--dim", type=types.integer(8, 4096), default=128, help="width of an embedding"
    )
    clip.add_argument(
        "--vocabulary", type=types.integer(514), default=6144, help="tokens that the text tower has"
    )
    clip.add_argument(
        "--ema", type=types.real(0, 1), default=0.99, help="decay of the weights' average"
    )
    clip.add_argument("--flip", action="store_true", help="also learn from mirrored images")
    clip.add_argument(
        "--teacher-images",
        type=types.path,
        metavar="FILE",
        help="features of the images by another network: safetensors or npz",
    )
    clip.add_argument(
        "--teacher-texts",
        type=types.path,
        metavar="FILE",
        help="features of captions and other texts by another network: safetensors or npz",
    )
    clip.add_argument(
        "--held-out",
        type=types.real(0, 0.9),
        default=0.1,
        help="share of the images that is kept to report how well text finds them",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, trains, saves."""
    from retrodiff.disk.files import check_free
    from retrodiff.encoders.folder import MARKER, own_files

    out = Path(options.out)
    if not options.captions and (options.teacher_images or options.teacher_texts):
        raise types.UsageError("--teacher-images and --teacher-texts need --captions")
    check_free(out, MARKER, options.overwrite, own_files)
    checkpoint = out.with_name(out.name + ".training.safetensors")
    line = _clip(options, out, checkpoint) if options.captions else _views(options, out, checkpoint)
    checkpoint.unlink(missing_ok=True)
    print(f"{line}: {out}")
    return 0


def _how(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """What both kinds of training take."""
    from retrodiff.training import cosine

    return {
        "steps": options.steps,
        "lr": cosine(options.lr, options.steps, min(50, options.steps // 10)),
        "seed": options.seed,
        "checkpoint": checkpoint,
        "checkpoint_every": options.checkpoint_every,
        "resume": options.resume,
        "overwrite": options.overwrite,
    }


def _views(options: argparse.Namespace, out: Path, checkpoint: Path) -> str:
    """An encoder of images alone."""
    import torch

    from retrodiff.encoders import TimmEncoder, save_encoder
    from retrodiff.training.contrastive import crop_and_flip, fit_views
    from retrodiff.training.folder_images import FolderImages

    torch.manual_seed(options.seed)
    encoder = TimmEncoder(options.network, image_size=options.size, preprocessing="plain")
    images = FolderImages(options.images, options.size)
    if len(images) < 2:
        raise ValueError(f"{options.images} holds one image, but views of two or more are compared")
    losses = fit_views(
        encoder,
        images[torch.arange(len(images))],
        crop_and_flip,
        batch_size=min(options.batch_size, len(images)),
        **_how(options, checkpoint),
    )
    save_encoder(encoder, out, overwrite=options.overwrite)
    last = losses[-max(1, len(losses) // 10) :].mean()
    return f"trained on {len(images)} images for {options.steps} steps (loss {last:.2f})"


def _clip(options: argparse.Namespace, out: Path, checkpoint: Path) -> str:
    """An encoder of images and text."""
    import torch

    from retrodiff.encoders import CLIPEncoder, save_encoder
    from retrodiff.training import ShiftScaleColor, Teachers, fit_clip
    from retrodiff.training.captioned import read_captioned
    from retrodiff.training.teacher_files import teacher_images, teacher_texts

    pairs = read_captioned(options.images, options.captions, options.size)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(options.seed))
    held = order[: int(len(pairs) * options.held_out)]
    rows = order[len(held) :].sort().values
    if len(rows) < 2:
        raise ValueError(f"{len(pairs)} images with captions are too few: give two or more")
    texts, text_features = [], None
    if options.teacher_texts:
        texts, text_features = teacher_texts(options.teacher_texts)
    features = None
    if options.teacher_images:
        features = teacher_images(options.teacher_images, pairs)[rows]
    torch.manual_seed(options.seed)
    encoder = CLIPEncoder.from_config(_config(options))
    losses = fit_clip(
        encoder,
        pairs.images[rows],
        [pairs.captions[i] for i in rows.tolist()],
        batch_size=min(options.batch_size, len(rows)),
        augment=ShiftScaleColor(flip=options.flip),
        teachers=Teachers(images=features, texts=texts, text_features=text_features),
        ema=options.ema,
        **_how(options, checkpoint),
    )
    save_encoder(encoder, out, overwrite=options.overwrite)
    last = losses[-max(1, len(losses) // 10) :].mean()
    for line in _recall(encoder, pairs, held):
        print(line)
    return (
        f"trained on {len(rows)} images with {len({t for c in pairs.captions for t in c})} "
        f"captions for {options.steps} steps (loss {last:.2f})"
    )


def _config(options: argparse.Namespace) -> dict[str, Any]:
    """A small CLIP in open_clip's numbers."""
    return {
        "embed_dim": options.dim,
        "vision_cfg": {
            "image_size": options.size,
            "timm_model_name": options.network,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "",
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": options.vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    }


def _recall(encoder: CLIPEncoder, pairs: Captioned, held: Any) -> list[str]:
    """How well the captions of held-out images find them, in a line."""
    import torch

    from retrodiff.evaluation import text_recall

    if len(held) < FEW:
        return [f"{len(held)} images are held out, too few to report how well text finds them"]
    captions = [pairs.captions[i] for i in held.tolist()]
    texts = list(dict.fromkeys(own[0] for own in captions))
    right = torch.tensor([[text in own for own in captions] for text in texts])
    found = text_recall(
        encoder.encode_text(texts), encoder.encode_image(pairs.images[held]), right, (1, 5, 20)
    )
    shares = ", ".join(f"{value:.2f} at {k}" for k, value in found.items())
    by_chance = 1 - (1 - right.float().mean(1)) ** 5
    return [
        f"recall of {len(texts)} captions among {len(held)} held-out images: {shares} "
        f"(a guess: {float(by_chance.mean()):.2f} at 5)"
    ]
