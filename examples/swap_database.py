"""One network, several databases: the same prompts and seed, and nothing is trained in between.

    python examples/swap_database.py --mine PICTURES --out runs/swap

Writes `swap.png`: for each database prompt | neighbors | samples. `--mine` is a folder of pictures
of yours, best on white and with one thing each: the network was trained on pictograms only. How
closely it follows the style of its neighbors so far is in the model's card.
"""

import argparse
from pathlib import Path

from retrodiff import build_database, presets
from retrodiff.databases import ImageFolder, Searchable
from retrodiff.pictures.sheet import Line, Section, draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["a cat face", "a crown", "an apple"])
parser.add_argument("--mine", type=Path, help="folder of pictures of yours")
parser.add_argument("--out", type=Path, default=Path("runs/swap"))
parser.add_argument("--each", type=int, default=3, help="pictures for each prompt")
parser.add_argument("--steps", type=int, help="of the sampler; the model's own if not given")
options = parser.parse_args()

model = presets.rdm_pictograms(pretrained=True)
assert isinstance(model.database, Searchable)
databases = {"all": model.database}
for style in ("noto", "fluent", "twemoji"):
    databases[style] = model.database.where(f"style == '{style}'")
if options.mine is not None:
    mine = options.out / "mine.rdb"
    databases["mine"] = build_database(
        mine, ImageFolder(options.mine), model.encoder, thumbnails=64, overwrite=True
    )

sections = []
for name, database in databases.items():
    swapped = model.replace(database=database, proposal=None)  # the weights are shared
    prompts = [prompt for prompt in options.prompts for _ in range(options.each)]
    out = swapped.sample(prompts=prompts, mode="neighbors", seed=0, steps=options.steps)
    lines = []
    for i in range(0, len(prompts), options.each):
        near = [database.image(row) for row in out.neighbors.indices[i].tolist()]
        lines.append(Line(prompts[i], near, out.images[i : i + options.each]))
    sections.append(Section(f"{name}: {len(database):,} rows", lines))

options.out.mkdir(parents=True, exist_ok=True)
draw_sheet(sections).save(options.out / "swap.png")
print(f"look at {options.out / 'swap.png'}")
