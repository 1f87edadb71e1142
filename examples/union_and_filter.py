"""A part of a database, and several databases searched as one, each with its share.

    python examples/union_and_filter.py "a musical instrument" "a bird" --out runs/union

Conditions are on columns of the database. A union without weights gives the nearest rows wherever
they lie; with weights 3 and 1 each query gets three neighbors of the first and one of the second.
Any of these is a database: `model.replace(database=...)` samples with it.
"""

import argparse
from pathlib import Path

from retrodiff import Query, TextEncoder, open_database, presets
from retrodiff.databases import Searchable, Union
from retrodiff.pictures.sheet import Line, Section, draw_sheet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["a musical instrument", "a bird", "a crown"])
parser.add_argument("--other", help="a database of yours, made with `--encoder pictograms`")
parser.add_argument("-k", type=int, default=4, help="how many neighbors")
parser.add_argument("--out", type=Path, default=Path("runs/union"))
options = parser.parse_args()

model = presets.rdm_pictograms(pretrained=True)
assert isinstance(model.database, Searchable)
assert isinstance(model.encoder, TextEncoder)
noto = model.database.where("style == 'noto' and license == 'Apache-2.0'")
if options.other is None:
    other = model.database.where("style in ['fluent', 'twemoji'] and title != 'crown'")
else:
    other = open_database(options.other)

databases: dict[str, Searchable] = {
    "the first": noto,
    "the second": other,
    "both: the nearest": Union(noto, other),
    "three of the first, one of the second": Union(noto, other, weights=[3, 1]),
}
query, sections = Query(model.encoder.encode_text(options.prompts)), []
for name, database in databases.items():
    found, lines = database.search(query, options.k), []
    for prompt, rows, near in zip(
        options.prompts, found.indices, found.similarity.tolist(), strict=True
    ):
        origins = [str(record.get("style", "other")) for record in database.records(rows)]
        print(f"{prompt}, {name}: {', '.join(origins)}")
        captions = [f"{s:.2f}\n{origin}" for s, origin in zip(near, origins, strict=True)]
        lines.append(Line(prompt, [database.image(row) for row in rows], captions=captions))
    sections.append(Section(f"{name} ({len(database):,} rows)", lines))

options.out.mkdir(parents=True, exist_ok=True)
draw_sheet(sections).save(options.out / "union.png")
print(f"look at {options.out / 'union.png'}")
