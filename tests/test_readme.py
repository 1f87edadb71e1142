"""The README's command lines run, in its order, with few steps; its Python is run by test_docs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from retrodiff.cli import main
from retrodiff.disk.shipped import shipped
from retrodiff.model.generated import to_picture

README = Path(__file__).parents[1] / "README.md"
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    for line in block.splitlines()
    if line.strip()
]
FEWER = {
    "sample": ["--steps", "2"],
    "train": ["--steps", "3", "--channels", "32"],
    "train-encoder": ["--steps", "3"],
}
ELSEWHERE = ("make demo", "make test", "pip install")
"""make demo is tests/test_demo.py, make test is this, wheels are tests/test_packaging.py."""


def test_the_two_commands_stand_at_the_top() -> None:
    assert LINES[:2] == ["make demo", "make test"]
    assert README.read_text().index("make demo") < 900


def test_every_line_is_run_here_or_elsewhere() -> None:
    assert [x for x in LINES if not x.startswith(("retrodiff ", *ELSEWHERE))] == []


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text())
    files = [link for link in links if not link.startswith("http")]
    assert len(files) > 15
    assert [file for file in files if not (README.parent / file).exists()] == []


@pytest.mark.filterwarnings("ignore:.*early in the training")
def test_from_a_folder_to_neighbors_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        shipped("pictograms")
    except FileNotFoundError:
        pytest.skip("retrodiff-pictograms is not installed")
    (tmp_path / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        color = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        noise = 0.2 * torch.randn(3, 48, 64, generator=generator)
        to_picture(color + noise).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for line in LINES:
        name, *arguments = shlex.split(line)
        if name == "retrodiff":
            if "out" in arguments and (tmp_path / "out").exists():
                (tmp_path / "out").rename(tmp_path / "first")
            if "--minutes" in arguments:
                at = arguments.index("--minutes")
                del arguments[at : at + 2]
            assert main([*arguments, *FEWER.get(arguments[0], [])]) == 0, line
    for made in ("first/sheet.png", "first/attribution.png", "found.png", "out/sheet.png"):
        with Image.open(tmp_path / made) as picture:
            assert min(picture.size) > 100, made
    assert (tmp_path / "model.run" / "metrics.csv").is_file()
