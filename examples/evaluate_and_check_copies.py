"""Measures a model's samples, and looks for copies of its database among them.

    python examples/evaluate_and_check_copies.py --n 500 --out runs/report

Samples the shipped model and compares with 392 pictures that are neither in its database nor among
its training images. `--features` should be a published network, and another than the one that
conditions the model: what is near, and what is a copy, is judged with it. Open `report.html`.
"""

import argparse
from pathlib import Path

import retrodiff_pictograms

from retrodiff import open_database, presets
from retrodiff.evaluation import evaluate, features_from_string
from retrodiff.model.generated import to_picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--n", type=int, default=500, help="samples")
parser.add_argument("--steps", type=int, help="of the sampler; the model's own if not given")
parser.add_argument(
    "--features", default="timm:resnet50.a1_in1k", help="or a folder, or fidelity:…"
)
parser.add_argument("--out", type=Path, default=Path("runs/report"))
options = parser.parse_args()

features = features_from_string(options.features)
held_out = options.out / "held-out"
held_out.mkdir(parents=True, exist_ok=True)
unseen = open_database(Path(retrodiff_pictograms.__path__[0]) / "held_out")
for row in range(len(unseen)):
    to_picture(unseen.image(row)).save(held_out / f"{row:03}.png")

model = presets.rdm_pictograms(pretrained=True)
samples = model.sample(n=options.n, steps=options.steps, seed=0, progress=True)
report = evaluate(samples, held_out, features, database=model.database, conditioning=model.encoder)
print(*report.lines(), sep="\n")
for copied in report.copying:  # the pairs that are nearest to each other
    for sample, row, margin in copied.worst(3):
        print(f"sample {sample} and row {row}: {margin:+.3f}")
report.save(options.out / "report", overwrite=True)
print(f"open {options.out / 'report' / 'report.html'}")
