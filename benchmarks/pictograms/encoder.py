"""Trains the text and image encoder of the pictograms, and measures it on unseen concepts.

    python benchmarks/pictograms/data.py --out runs/pictograms
    python benchmarks/pictograms/clipart.py --out runs/pictograms
    python benchmarks/pictograms/encoder.py --out runs/pictograms

The encoder is a small CLIP. It learns from the pictures of the splits ``train`` and ``database`` in
three styles (Noto, Fluent, Twemoji): what D holds at run time, it may know. Held-out concepts are
seen in none of the four styles, and OpenMoji is seen in no concept. Public-domain clip art widens
what it knows. Drawings whose words name a held-out concept are left out; some that show one under
another name remain (a treble clef for "musical score"), and the general words that the text tower
learns may be words of held-out titles. Two teachers help, whose weights come in packages:
EfficientNet-Lite0 for pictures, MiniLM for phrases (``teachers.py``). ``--plain`` trains the same
network without them, for comparison.

Run it again to continue; what is done is not done again. It writes ``encoder`` (a folder that
`load_encoder` takes), ``encoder.json`` (the report) and ``encoder.png`` (what prompts find).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from outlines import Outlined
from report import report, sheet
from sets import CLIPART, STYLES, Pictograms, styled
from teachers import phrase_features, picture_features, whole_words
from torch import Tensor

from retrodiff.disk.tensors import map_tensors, write_hashed_tensors
from retrodiff.encoders import CLIPEncoder, load_encoder, save_encoder
from retrodiff.pictures.converting import to_float
from retrodiff.training import ShiftScaleColor, Teachers, cosine, fit_clip

CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "lcnet_075",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "",
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 6144,
        "width": 96,
        "heads": 4,
        "layers": 2,
    },
}
COLORS = "red orange yellow green blue purple pink brown black white gray golden".split()
KINDS = "big small happy sad angry old young cute funny smiling sleeping flying round".split()
JOINED = ("a {} with {}", "{} and {}", "a {} wearing {}", "a {} on a {}", "{}, {}", "{} {}")


def main() -> None:
    """Trains what is not trained yet, and reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--name", default="encoder", help="of the folder in --out")
    parser.add_argument("--init", help="another encoder in --out whose weights are the first ones")
    parser.add_argument("--plain", action="store_true", help="without teachers, for comparison")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sets = Pictograms.read(options.out)
    seen = sets.where(lambda row: row["split"] != "held-out" and row["style"] != "openmoji")
    target = options.out / options.name
    if not (target / "encoder.json").exists():
        train(options, sets, seen, target)
    encoder = load_encoder(target)
    assert isinstance(encoder, CLIPEncoder)
    found = report(encoder, sets)
    options.out.joinpath(f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    sheet(encoder, sets).save(options.out / f"{options.name}.png")
    print(json.dumps(found, indent=1))


def train(options: argparse.Namespace, sets: Pictograms, seen: Tensor, target: Path) -> None:
    """Trains an encoder on some of the pictures and saves it with float16 weights."""
    teachers = None
    if not options.plain:
        texts = sorted({t for i in seen.tolist() for t in sets.phrasings(i)})
        texts = list(dict.fromkeys([*texts, *whole_words(), *compositions(sets, seen)]))
        teachers = Teachers(
            images=cached(
                options.out / "encoder.pictures.safetensors",
                lambda: picture_targets(sets, seen),
            ),
            texts=texts,
            text_features=cached(
                options.out / "encoder.phrases.safetensors", lambda: phrase_features(texts)
            ),
        )
    torch.manual_seed(options.seed)
    encoder = CLIPEncoder.from_config(CONFIG)
    if options.init:
        first: Any = load_encoder(options.out / options.init)
        encoder.model.load_state_dict(first.model.state_dict())
    encoder.model.visual.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    # Pictograms twice as often as clip art: they are what will be searched.
    own = torch.tensor([sets.rows[i]["style"] in STYLES for i in seen.tolist()])
    often = torch.cat([torch.arange(len(seen)), own.nonzero().flatten()])
    if teachers is not None:
        teachers = replace(teachers, images=teachers.images[often])
    seen = seen[often]
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts(encoder)}
    print(f"{len(seen)} pictures; parameters: {sizes}, {sum(sizes.values())} in all")
    fit_clip(
        encoder,
        sets.images[seen],
        [captions(sets, i) for i in seen.tolist()],
        steps=options.steps,
        batch_size=options.batch_size,
        lr=cosine(options.lr, options.steps, options.steps // 20),
        augment=Outlined(ShiftScaleColor(scale=0.2, color=0.15)),
        teachers=teachers,
        ema=0.99,
        weight_decay=0.1,
        seed=options.seed,
        checkpoint=options.out / f"{options.name}.training.safetensors",
        checkpoint_every=200,
        resume=True,
    )
    save_encoder(encoder, target, dtype=torch.float16)


def captions(sets: Pictograms, i: int) -> list[str]:
    """What a picture is called, with and without its style: so that prompts may ask for one."""
    row = sets.rows[i]
    named = [] if row["style"] == CLIPART else styled(row["title"], row["style"])
    return [*sets.phrasings(i), *named]


def parts(encoder: CLIPEncoder) -> list[tuple[str, Any]]:
    """The towers of a CLIP by name."""
    model = encoder.model
    return [("image", model.visual), ("text", model.transformer), ("words", model.token_embedding)]


def compositions(sets: Pictograms, seen: Tensor, count: int = 20_000) -> list[str]:
    """Phrases of two seen titles or keywords, or of one and a color or a property."""
    drawn = random.Random(0)
    own = [i for i in seen.tolist() if sets.rows[i]["style"] in STYLES]
    words = sorted({text for i in own for text in sets.names(i)})
    found: list[str] = []
    for _ in range(count):
        one, two = drawn.sample(words, 2)
        kind = drawn.random()
        if kind < 0.3:
            found.append(f"{drawn.choice(('', 'a '))}{drawn.choice(COLORS)} {one}")
        elif kind < 0.5:
            found.append(f"a {drawn.choice(KINDS)} {one}")
        else:
            found.append(drawn.choice(JOINED).format(one, two))
    return found


def picture_targets(sets: Pictograms, seen: Tensor, components: int = 256) -> Tensor:
    """What image embeddings shall tell: Lite0's features, the picture in 8x8 pixels, and its style.

    The features are whitened to half, so that small differences count too. The three parts have the
    same mean square per column, times their weight.
    """
    from torch.nn.functional import adaptive_avg_pool2d, one_hot

    images = sets.images[seen]
    told: list[Tensor] = []
    for features, width in (
        (picture_features(images), components),
        (adaptive_avg_pool2d(to_float(images), 8).flatten(1), 64),
    ):
        centered = features - features.mean(0)
        u, s, _ = torch.linalg.svd(centered, full_matrices=False)
        told.append(u[:, :width] * s[:width].sqrt())
    names = (*STYLES, CLIPART)
    style = one_hot(torch.tensor([names.index(sets.rows[i]["style"]) for i in seen.tolist()]))
    told.append(style.float() - style.float().mean(0))
    scaled = [part / part.square().mean().sqrt() for part in told]
    return torch.cat([scaled[0], 0.7 * scaled[1], 4 * scaled[2]], 1)


def cached(file: Path, make: Any) -> Tensor:
    """A tensor that is computed once and then read."""
    if not file.exists():
        write_hashed_tensors(file, {"features": make()})
    return map_tensors(file)["features"].clone()


if __name__ == "__main__":
    main()
