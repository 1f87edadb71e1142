"""``retrodiff sample``: images from a saved model, in any of its modes."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("sample", help="generate images with a saved model")
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("out", help="folder for the images")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="a text; may be given several times")
    asked.add_argument("--class", dest="classes", action="append", help="a class name; likewise")
    asked.add_argument("--image", action="append", help="an image file; likewise")
    asked.add_argument("--unconditional", action="store_true", help="ask nothing")
    parser.add_argument("--n", type=int, default=1, help="images per prompt, class or image")
    parser.add_argument("--mode", help="text, text+neighbors, neighbors, class, image")
    parser.add_argument("--k", type=int, help="tokens that condition an image")
    parser.add_argument("--guidance", type=float, help="classifier-free scale")
    parser.add_argument("--sampler", help="ddim, ddpm, plms, euler, heun, dpmpp_2m")
    parser.add_argument("--steps", type=int, help="of the sampler")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--database", help="another database than the model's own")
    parser.add_argument("--batch-size", type=int, default=64, help="images per network call")
    parser.add_argument("--device", default="cpu", help="of the network: cpu, cuda, cuda:1, mps")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier images there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Loads, samples, saves."""
    from retrodiff.databases import open_database
    from retrodiff.files import check_free
    from retrodiff.generation import MARKER, own_files
    from retrodiff.model import Model
    from retrodiff.retrieval import Uniform

    if options.n < 1:
        raise ValueError(f"--n {options.n}, but at least one image must be asked for")
    check_free(options.out, MARKER, options.overwrite, own_files)
    parts: dict[str, Any] = {}
    if options.database is not None:
        parts["database"] = open_database(options.database)
        parts["proposal"] = Uniform()
    model = Model.load(options.model, **parts).to(options.device)
    out = model.sample(
        **_asked(options, tuple(model.denoiser.shape)),
        mode=options.mode,
        k=options.k,
        guidance=options.guidance,
        sampler=options.sampler,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    folder = out.save(options.out, overwrite=options.overwrite)
    print(f"{len(out)} images in {folder}")
    return 0


def _asked(options: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, Any]:
    """The argument of `Model.sample` that says what is asked."""
    import torch

    if options.prompt:
        return {"prompts": [p for p in options.prompt for _ in range(options.n)]}
    if options.classes:
        return {"classes": [c for c in options.classes for _ in range(options.n)]}
    if options.image:
        from retrodiff.training.folder import read_square

        images = [read_square(file, 224) for file in options.image]
        return {"images": torch.stack(images).repeat_interleave(options.n, 0)}
    return {"n": options.n}
