"""``retrodiff sample``: images from a saved model, in any of its modes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types
from retrodiff.diffusion.sampler import SAMPLERS

if TYPE_CHECKING:
    from retrodiff.model import Model
    from retrodiff.model.generated import Generation

SHEET = "sheet.png"
MODES = ("text", "text+neighbors", "neighbors", "class", "image", "unconditional")


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sample",
        help="generate images with a saved model",
        description="Writes PNG files, generation.json (what each was made from, and how) and "
        f"{SHEET} (query | neighbors | samples) into a folder.",
    )
    parser.add_argument(
        "model", type=types.path, help="folder of a saved model, or the name of one with a package"
    )
    parser.add_argument("out", type=types.new_folder, help="folder for the images")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt", type=types.prompt, action="append", help="a text; may be given several times"
    )
    asked.add_argument("--class", dest="classes", action="append", help="a class name; likewise")
    asked.add_argument("--image", type=types.path, action="append", help="an image file; likewise")
    asked.add_argument(
        "--unconditional", action="store_true", help="no query: rows of the database are drawn"
    )
    parser.add_argument(
        "--n", type=types.count, default=1, help="images per prompt, class or image"
    )
    add_settings(parser)
    parser.add_argument("--database", type=types.path, help="another database than the model's own")
    parser.add_argument(
        "--encoder",
        help="for a model that was saved without one: open_clip:NAME:TAG, timm:NAME or a folder",
    )
    parser.add_argument(
        "--device", type=types.device, default="cpu", help="of the network: cpu, cuda, cuda:1, mps"
    )
    parser.add_argument(
        "--from-checkpoint",
        action="store_true",
        help="sample what an unfinished training of the model has learned so far",
    )
    parser.add_argument(
        "--start", type=types.path, help="an image file to edit, of the size that the model makes"
    )
    parser.add_argument(
        "--strength", type=types.real(0, 1), help="how much of --start is redone: 1 forgets it"
    )
    parser.add_argument(
        "--attribution",
        action="store_true",
        help="record which neighbor painted which region; drawn in attribution.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier images there")
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds how images are sampled, to a command that samples."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        metavar="MODE",
        help=f"{', '.join(MODES)}; if not given: what the query suggests",
    )
    parser.add_argument(
        "--k", type=types.integer(0), help="tokens that condition an image; else the model's"
    )
    parser.add_argument(
        "--guidance", type=types.real(0), help="classifier-free scale; else the model's"
    )
    parser.add_argument(
        "--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; else the model's"
    )
    parser.add_argument(
        "--steps", type=types.integer(1, 100_000), help="of the sampler; else the model's"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument(
        "--trust-database",
        action="store_true",
        help="open the database wherever a model that others saved says that it is",
    )
    parser.add_argument(
        "--batch-size", type=types.count, default=64, help="images per network call"
    )


def run(options: argparse.Namespace) -> int:
    """Loads, samples, saves."""
    from retrodiff.model.generated import ATTRIBUTION

    _, out = sampled(options, options.out)
    drawn = f" and {options.out}/{ATTRIBUTION}" if options.attribution else ""
    images = "1 image" if len(out) == 1 else f"{len(out)} images"
    print(f"{images} in {options.out}; look at {options.out}/{SHEET}{drawn}")
    return 0


def sampled(options: argparse.Namespace, folder: str) -> tuple[Model, Generation]:
    """The model that the options name, and images of it, saved in a folder with their sheet."""
    from retrodiff.databases import open_database
    from retrodiff.disk.files import check_free
    from retrodiff.encoders import encoder_from_string
    from retrodiff.model.generated import MARKER, own_files
    from retrodiff.retrieval import Uniform

    check_free(folder, MARKER, options.overwrite, own_files)
    parts: dict[str, Any] = {}
    if options.database is not None:
        parts["database"] = open_database(options.database)
        parts["proposal"] = Uniform()
    if options.encoder is not None:
        parts["encoder"] = encoder_from_string(options.encoder)
    model = _model(options, parts).to(options.device)
    asked = _asked(options)
    out = model.sample(
        **asked,
        mode=options.mode,
        k=options.k,
        guidance=options.guidance,
        sampler=options.sampler,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
        attribution=getattr(options, "attribution", False),
        start=getattr(options, "start", None),
        strength=getattr(options, "strength", None),
    )
    saved = out.save(folder, overwrite=options.overwrite)
    _save_sheet(saved / SHEET, model, out, asked)
    return model, out


def _model(options: argparse.Namespace, parts: dict[str, Any]) -> Model:
    """The saved model, or what its unfinished training has learned so far."""
    from pathlib import Path

    from retrodiff.model import Model
    from retrodiff.training import unfinished

    trust = options.trust_database
    if options.from_checkpoint:
        return unfinished.load_unfinished(options.model, trust_database=trust, **parts)
    if not Path(options.model).exists() and unfinished.is_unfinished(Path(options.model)):
        raise FileNotFoundError(
            f"{options.model} is not trained to its end: continue the training (retrodiff train "
            "with --resume), or sample what it has learned so far (--from-checkpoint)"
        )
    return Model.load(options.model, trust_database=trust, **parts)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The argument of `Model.sample` that says what is asked."""
    from retrodiff.pictures import to_image

    if options.prompt:
        return {"prompts": [p for p in options.prompt for _ in range(options.n)]}
    if options.classes:
        return {"classes": [c for c in options.classes for _ in range(options.n)]}
    if options.image:
        # Whole pictures, as builds and searches embed them.
        return {"images": [i for i in map(to_image, options.image) for _ in range(options.n)]}
    return {"n": options.n}


def _save_sheet(file: Any, model: Model, out: Generation, asked: dict[str, Any]) -> None:
    """Query, neighbors and samples of the first images; those that share both are on one line."""
    import torch

    from retrodiff.databases import captions_of
    from retrodiff.disk.files import atomic_write
    from retrodiff.pictures import Line, Section, draw_sheet

    n = min(len(out), 32)
    words: Any = next(iter(asked.values()))
    unconditional = isinstance(words, int)
    blank = torch.ones(3, 32, 32)
    lines: dict[tuple[Any, ...], Line] = {}
    for i, captions in enumerate(captions_of(out.neighbors.rows(slice(0, n)))):
        rows = out.neighbors.indices[i].flatten().tolist()
        query = "(a row of the database)" if unconditional else _shown(words[i])
        key = (out.query.source[i] if out.query.source else i, *rows)
        if isinstance(query, torch.Tensor) and not isinstance(words, int):
            key = (id(words[i]), *rows)
        if (line := lines.get(key)) is not None:
            lines[key] = replace(line, samples=[*line.samples, out.images[i]])
            continue
        kept = [(row, said) for row, said in zip(rows, captions, strict=True) if row >= 0][:12]
        near = [_picture(model, row, blank) for row, _ in kept]
        lines[key] = Line(query, near, [out.images[i]], captions=[said for _, said in kept])
    title = f"{len(out)} image{'s' * (n > 1)}" if n == len(out) else f"{n} of {len(out)} images"
    with atomic_write(file) as partial:
        draw_sheet([Section(title, list(lines.values()))], 128).save(partial, format="PNG")


def _shown(asked: Any) -> Any:
    """A prompt or class as it is; a picture as floats."""
    from retrodiff.pictures import to_float

    return asked if isinstance(asked, str) else to_float(asked)


def _picture(model: Model, row: int, blank: Any) -> Any:
    """A database row's picture; blank where neither thumbnail nor file is at hand."""
    image = getattr(model.database, "image", None)
    try:
        return blank if image is None else image(row)
    except (OSError, ValueError):
        return blank
