"""Makes a database of a folder of pictures, and finds pictures in it by words and by example.

    python examples/search_a_folder.py PHOTOS --text "a red door" --image door.jpg --out runs/search

The first run encodes the pictures; later ones open the database that is there. `--encoder
pictograms` is the small CLIP of the package retrodiff-pictograms: nothing to download, but it knows
pictograms only.
"""

import argparse
from pathlib import Path

import torch

from retrodiff import Query, build_database, open_database
from retrodiff.databases import ImageFolder, contact_sheet
from retrodiff.encoders import CLIPEncoder, encoder_from_string
from retrodiff.pictures import to_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("photos", type=Path, help="folder of pictures")
parser.add_argument("--text", nargs="*", default=[], help="words to look for")
parser.add_argument("--image", nargs="*", default=[], help="pictures to look for the like of")
parser.add_argument("-k", type=int, default=6, help="how many to find")
parser.add_argument("--encoder", default="open_clip:ViT-B-32-quickgelu:openai")
parser.add_argument("--out", type=Path, default=Path("runs/search"))
options = parser.parse_args()
if not options.text + options.image:
    parser.error("give --text or --image")

encoder = encoder_from_string(options.encoder)
folder = options.out / "photos.rdb"
if folder.exists():
    database = open_database(folder)
else:
    database = build_database(folder, ImageFolder(options.photos), encoder, thumbnails=128)

asked, embeddings = [], []
for text in options.text:
    assert isinstance(encoder, CLIPEncoder), f"{options.encoder} knows no words: use --image"
    asked.append(text)
    embeddings.append(encoder.encode_text([text]))
for file in options.image:
    asked.append(to_image(file))
    embeddings.append(encoder.encode_image(asked[-1][None]))

found = database.search(Query(torch.cat(embeddings)), options.k)
captions = []
for name, rows, near in zip(
    options.text + options.image, found.indices, found.similarity, strict=True
):
    lines = zip(near.tolist(), database.records(rows), strict=True)
    captions.append([f"{similarity:.2f}\n{record['file']}" for similarity, record in lines])
    print(name, *(caption.replace("\n", "  ") for caption in captions[-1]), sep="\n  ")
pictures = [[database.image(row) for row in rows] for rows in found.indices.tolist()]
contact_sheet(asked, pictures, captions).save(options.out / "found.png")
print(f"look at {options.out / 'found.png'}")
