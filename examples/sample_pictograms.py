"""Draws pictures with the shipped model, and says which neighbors each was made from.

python examples/sample_pictograms.py "a red apple" "a crown" --out runs/first
"""

import argparse
from pathlib import Path

from retrodiff import presets
from retrodiff.pictures.sheet import Line, Section, draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["a red apple", "a crown", "a ship"])
parser.add_argument("--out", type=Path, default=Path("runs/first"))
parser.add_argument("--each", type=int, default=4, help="pictures for each prompt")
parser.add_argument("--steps", type=int, help="of the sampler; the model's own if not given")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

model = presets.rdm_pictograms(pretrained=True)
prompts = [prompt for prompt in options.prompts for _ in range(options.each)]
out = model.sample(prompts=prompts, seed=options.seed, steps=options.steps)

lines = []
for i in range(0, len(prompts), options.each):
    print(prompts[i])
    found = out.neighbors
    for row, similarity, record in zip(
        found.indices[i].tolist(), found.similarity[i].tolist(), found.records[i], strict=True
    ):
        if row >= 0:  # -1 is the prompt itself, which conditions beside the rows of the database
            about = "{title}, {style} ({license}, {credit})".format(**record)
            print(f"  {similarity:.2f}  row {row}: {about}")

    near = [model.database.image(row) for row in found.indices[i].tolist() if row >= 0]
    lines.append(Line(prompts[i], near, out.images[i : i + options.each]))

out.save(options.out, overwrite=True)  # PNG files, and generation.json with all of the above
draw_sheet([Section("", lines)]).save(options.out / "sheet.png")
print(f"look at {options.out / 'sheet.png'}")
