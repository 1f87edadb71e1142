"""Command lines that cannot be run: exit code 2, one line, nothing written."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from retrodiff.cli import main
from retrodiff.cli.words import in_options
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.model.generated import to_picture


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Pictures, an encoder, a database and a model, made by the command line."""
    desk = tmp_path_factory.mktemp("desk")
    generator = torch.Generator().manual_seed(0)
    for name in ("library", "training"):
        (desk / name).mkdir()
        for i in range(8):
            picture = torch.rand(3, 40, 40, generator=generator) * 2 - 1
            to_picture(picture).save(desk / name / f"{i}.png")
    (desk / "one").mkdir()
    to_picture(torch.zeros(3, 40, 40)).save(desk / "one" / "a.png")
    (desk / "empty").mkdir()
    (desk / "notes.txt").write_text("no picture")
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", image_size=32), desk / "enc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        for command in (
            "database build library lib.rdb --encoder enc",
            f"{TRAIN} --steps 2".replace("training m ", "training model "),
        ):
            assert main(command.split()) == 0
    return desk


TRAIN = "train training m --database lib.rdb --encoder enc --channels 32 --size 16"
SAMPLE = "sample model out --unconditional"
BUILD = "database build library b.rdb --encoder enc"
SEARCH = "database search lib.rdb --encoder enc --image library/0.png"
HUGE = str(2**64)
TABLE = [
    (f"{TRAIN} --steps 2 --device cuda", "cuda"),
    (f"{TRAIN} --steps 2 --device cuda:7", "cuda:7"),
    (f"{TRAIN} --steps 2 --device mps", "mps"),
    (f"{TRAIN} --steps 2 --device foo", "unknown device 'foo'"),
    (f"{TRAIN} --steps 0", "--steps: 0 is below"),
    (f"{TRAIN} --steps -1", "--steps: -1 is below"),
    (f"{TRAIN} --steps many", "--steps: 'many' is no whole number"),
    (f"{TRAIN} --steps 1.5", "--steps: '1.5' is no whole number"),
    (f"{TRAIN} --batch-size 0", "--batch-size: 0"),
    (f"{TRAIN} --batch-size -4", "--batch-size: -4"),
    (f"{TRAIN} --checkpoint-every 0", "--checkpoint-every: 0"),
    (f"{TRAIN} --lr nan", "--lr: nan"),
    (f"{TRAIN} --lr inf", "--lr: inf"),
    (f"{TRAIN} --lr 0", "--lr: 0"),
    (f"{TRAIN} --lr -0.1", "--lr: -0.1"),
    (f"{TRAIN} --ema 1.5", "--ema: 1.5"),
    (f"{TRAIN} --ema nan", "--ema: nan"),
    (f"{TRAIN} --seed -1", "--seed: -1"),
    (f"{TRAIN} --seed {HUGE}", "--seed"),
    (f"{TRAIN} --k 0", "--k: 0"),
    (f"{TRAIN} --k 100 --steps 1", "--k 100"),
    (f"{TRAIN.replace('--size 16', '--size 0')}", "--size: 0"),
    (f"{TRAIN.replace('--size 16', '--size 30')} --steps 1", "30"),
    (f"{TRAIN.replace('--channels 32', '--channels 40')} --steps 1", "40"),
    (f"{TRAIN.replace('training m', 'one m')} --steps 1 --k 9", "--k 9"),
    (f"{TRAIN.replace('training m', 'empty m')} --steps 1", "empty"),
    (f"{TRAIN.replace('training m', 'training .')} --steps 1", "'.' has no name of its own"),
    (f"{TRAIN.replace('lib.rdb', 'nowhere.rdb')} --steps 1", "nowhere.rdb"),
    (f"{TRAIN} --steps 30 --lr 1e30", "--lr: 1e30 must be at most 1e+06"),
    (f"{SAMPLE} --seed -1", "--seed: -1"),
    (f"{SAMPLE} --seed {HUGE}", "--seed"),
    (f"{SAMPLE} --batch-size 0", "--batch-size: 0"),
    (f"{SAMPLE} --batch-size -3", "--batch-size: -3"),
    (f"{SAMPLE} --steps 0", "--steps: 0"),
    (f"{SAMPLE} --steps 2 --sampler nope", "'nope'"),
    (f"{SAMPLE} --k 100", "--k 100"),
    (f"{SAMPLE} --k -1", "--k: -1"),
    (f"{SAMPLE} --k 0", "--k 0"),
    (f"{SAMPLE} --n 0", "--n: 0"),
    (f"{SAMPLE} --device cuda", "cuda"),
    (f"{SAMPLE} --device mps", "mps"),
    (f"{SAMPLE} --device foo", "'foo'"),
    (f"{SAMPLE} --guidance nan", "--guidance: nan"),
    (f"{SAMPLE} --guidance inf", "--guidance: inf"),
    (f"{SAMPLE} --mode text", "mode 'text'"),
    (f"{SAMPLE} --mode nope", "'nope'"),
    ("sample model out", "--prompt"),
    ("sample model out --image no.png", "no.png"),
    ("sample model out --image library", "library"),
    ("sample model out --image notes.txt", "notes.txt"),
    ("sample model out --prompt red", "no text tower"),
    ("sample empty out --unconditional", "no model.json"),
    (
        "sample pictogram out --unconditional",
        "pictogram does not exist: give the folder of a saved",
    ),
    ("sample model out --promt red", "no option --promt: did you mean --prompt?"),
    ("sample model out --unconditional --stps=2", "no option --stps: did you mean --steps?"),
    ("sample model out --unconditional --zzz", "no option --zzz (see retrodiff sample --help)"),
    ("sample model out --prompt=", "empty prompt"),
    ("sample model / --unconditional", "'/' has no name of its own"),
    (f"{BUILD} --batch-size 0", "--batch-size: 0"),
    (f"{BUILD} --thumbnails 0", "--thumbnails: 0"),
    (f"{BUILD} --thumbnails -5", "--thumbnails: -5"),
    (f"{BUILD} --workers -1", "--workers: -1"),
    (f"{BUILD} --patch-size 0", "--patch-size: 0"),
    (f"{BUILD} --patch-size 16 --patches 0", "--patches: 0"),
    (f"{BUILD} --patch-size 16 --stride 0", "--stride: 0"),
    (f"{BUILD} --patches 2", "--patch-size"),
    (f"{BUILD} --device cuda", "cuda"),
    (BUILD.replace("--encoder enc", "--encoder nowhere"), "nowhere"),
    (BUILD.replace("library", "nothing"), "nothing"),
    (f"{SEARCH} -k 0", "--k: 0"),
    (f"{SEARCH} -k 100", "--k 100"),
    (f"{SEARCH} -k 2 --out nowhere/x.png", "nowhere does not exist"),
    (f"{SEARCH} -k 2 --out sheet.xyz", "sheet.xyz"),
    (f"{SEARCH} -k 2 --out sheet", "sheet"),
    (f"{SEARCH} -k 2 --index nope", "nope"),
    (f"{SEARCH} -k 2 --where label", "label"),
    ("database search lib.rdb --encoder enc", "--text or --image"),
    (SEARCH.replace("library/0.png", "no.png"), "--image no.png: "),
    (SEARCH.replace("library/0.png", "notes.txt"), "--image notes.txt: "),
    (f"{SEARCH} --where file=='none'", "no row of lib.rdb meets the condition of --where"),
    ("database index lib.rdb annoy:trees=x", "trees"),
    ("database index lib.rdb annoy:trees=0", "trees"),
    ("database index lib.rdb usearch:rerank=-1", "rerank"),
    ("database index lib.rdb annoy -k 0", "--k: 0"),
    ("database index lib.rdb faiss:factory=IVF4096,SQ8", "IVF4096"),
    ("database index lib.rdb exact:device=cuda", "cuda"),
    ("database delete lib.rdb file", "file"),
    ("database info nowhere.rdb", "nowhere.rdb"),
    ("database nope", "nope"),
    ("nope", "nope"),
    ("info nowhere", "nowhere"),
    ("convert nowhere.ckpt c", "nowhere.ckpt"),
    ("train-encoder one e --steps 2", "one image"),
    ("train-encoder library e --size 3", "--size: 3"),
    ("train-encoder library enc", "enc exists"),
    ("demo --seed -1 --out d", "--seed: -1"),
    ("demo --out d --swap-in openmoji", "--swap-in openmoji: give a name and a database"),
]


@pytest.mark.parametrize(("command", "word"), TABLE, ids=[row[0] for row in TABLE])
def test_one_line_exit_code_2_and_nothing_written(command, word, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    before = sorted(p.name for p in desk.rglob("*"))
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a warning is a line of its own
        code = main(command.split())
    # Progress bars are drawn over with carriage returns; they are not lines of the program.
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("retrodiff: ")]
    assert code == 2
    assert len(told) == 1, told
    assert word in told[0]
    python = r"\w\(" if " index " in command else r"\w+=|\w\("  # recipes are written trees=20
    assert not re.search(python, told[0]), "a word of Python on the command line"
    left = [name for name in sorted(p.name for p in desk.rglob("*")) if name not in before]
    assert left == []


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("k=9 of 8 rows: use mode='text'", "--k 9 of 8 rows: use --mode text"),
        ("exists (overwrite=True, --overwrite)", "exists (--overwrite)"),
        ("set database=open_database(path), or", "set --database DATABASE, or"),
        ("hand it in, load(..., database=...)", "hand it in, --database DATABASE"),
        ("batch_size=0: 1 or more", "--batch-size 0: 1 or more"),
        ("encoder.dim=3, other=4", "encoder.dim=3, other=4"),
    ],
)
def test_errors_speak_in_options(text, said):
    names = ["k", "mode", "overwrite", "database", "batch_size", "dim"]
    assert in_options(text, names) == said
