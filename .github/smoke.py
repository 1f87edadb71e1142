"""What must work right after `pip install retrodiff`, away from the checkout and without any extra.

cd /tmp && python smoke.py
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

import retrodiff
from retrodiff import build_database, presets
from retrodiff.databases import Images
from retrodiff.encoders import TimmEncoder
from retrodiff.retrieval import Uniform

package = Path(retrodiff.__file__).parent
assert "site-packages" in package.parts, f"this is no installed package: {package}"
assert retrodiff.__version__ == version("retrodiff")
assert (package / "py.typed").is_file()

said = subprocess.run(
    [sys.executable, "-m", "retrodiff", "--help"], capture_output=True, text=True, check=True
)
assert "database" in said.stdout

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    encoder = TimmEncoder("test_resnet", image_size=32)
    images = Images(list(torch.rand(12, 3, 32, 32) * 2 - 1))
    database = build_database(f"{folder}/d.rdb", images, encoder, progress=False)
    model = presets.rdm_small(encoder=encoder, database=database, channels=32)
    out = model.replace(proposal=Uniform()).sample(n=2, steps=2)
    out.save(f"{folder}/out")
    assert Path(folder, "out", "00001.png").stat().st_size > 500

extras = [
    name
    for name in ("sklearn", "faiss", "usearch", "lancedb", "fastapi", "diffusers")
    if find_spec(name) is not None
]
print(
    f"retrodiff {version('retrodiff')}, Python {sys.version.split()[0]}, torch "
    f"{torch.__version__}; of the extras: {', '.join(extras) or 'none'}"
)
