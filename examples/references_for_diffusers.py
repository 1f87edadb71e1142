"""References for a pipeline of diffusers, found by prompt in a folder of your own pictures.

    python examples/references_for_diffusers.py PHOTOS "a lighthouse in fog" --out runs/references

The pipeline is any that takes `image=[...]`; the default needs a large GPU and a download. Each
picture is saved with what it was made from: `retrodiff credit PICTURE` prints it.
"""

import argparse
from pathlib import Path

from diffusers import DiffusionPipeline

from retrodiff import build_database, open_database
from retrodiff.bridges import ReferenceRetriever, references
from retrodiff.databases import ImageFolder
from retrodiff.encoders import encoder_from_string

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("photos", type=Path, help="folder of pictures")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--pipeline", default="Qwen/Qwen-Image-Edit-2509")
parser.add_argument("--encoder", default="open_clip:ViT-B-32-quickgelu:openai")
parser.add_argument("--license", default="all rights reserved", help="of your pictures")
parser.add_argument("-k", type=int, default=2, help="references for each prompt")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", type=Path, default=Path("runs/references"))
options = parser.parse_args()

encoder = encoder_from_string(options.encoder)
folder = options.out / "photos.rdb"
if folder.exists():
    database = open_database(folder)
else:
    source = ImageFolder(options.photos, columns={"license": options.license})
    database = build_database(folder, source, encoder, thumbnails=256)

pipe = DiffusionPipeline.from_pretrained(options.pipeline, torch_dtype="auto")
pipe.enable_model_cpu_offload()
retriever = ReferenceRetriever(encoder, diversity=0.3, copies=0.97, min_side=64)
out = references(
    pipe,
    database,
    options.prompts,
    options.k,
    retriever=retriever,
    num_inference_steps=options.steps,
)
out.save(options.out / "pictures")
print(f"look at {options.out / 'pictures'}")
