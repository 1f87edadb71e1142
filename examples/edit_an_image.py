"""Edits a picture: a part of the sampler's steps is made again, with a prompt and its neighbors.

    python examples/edit_an_image.py "a green apple" --picture mine.png --out runs/edit

Writes `edit.png`: the prompt, the picture, and what comes of it, the stronger the further right.
Without --picture it takes an apple of the shipped database.
"""

import argparse
from pathlib import Path

from PIL import Image

from retrodiff import presets
from retrodiff.databases import Searchable
from retrodiff.pictures import to_image
from retrodiff.pictures.sheet import Line, Section, draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["a green apple", "a tomato", "a red heart"])
parser.add_argument("--picture", type=Path, help="best on white, with one thing in it")
parser.add_argument("--out", type=Path, default=Path("runs/edit"))
parser.add_argument("--steps", type=int, default=20, help="of the sampler")
parser.add_argument("--strengths", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0])
options = parser.parse_args()

model = presets.rdm_pictograms(pretrained=True)
if options.picture is None:
    assert isinstance(model.database, Searchable)
    picture = model.database.where("title == 'red apple' and style == 'noto'").image(0)
else:
    opened = Image.open(options.picture).convert("RGBA")
    paper = Image.new("RGBA", opened.size, "white")
    picture = to_image(Image.alpha_composite(paper, opened).convert("RGB").resize((64, 64)))

edits = []
for strength in options.strengths:
    out = model.sample(
        prompts=options.prompts, start=picture, strength=strength, steps=options.steps, seed=0
    )
    edits.append(out.images)

names = [f"strength {strength:g}" for strength in options.strengths]
lines = [
    Line(prompt, [picture, *(images[i] for images in edits)], captions=["the picture", *names])
    for i, prompt in enumerate(options.prompts)
]
options.out.mkdir(parents=True, exist_ok=True)
draw_sheet([Section("", lines)], side=96).save(options.out / "edit.png")
print(f"look at {options.out / 'edit.png'}")
