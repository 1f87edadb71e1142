"""The programs of docs/diffusers.md run word for word, with tiny pipelines for downloads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import tiny_pipelines as tiny
from parts import HashingEncoder

from retrodiff.bridges import read_credit
from retrodiff.databases import Images, build_database

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"
PROGRAM = re.compile(
    r"<!-- not executed: .*test_references_programs.*-->\n```python\n([\s\S]*?)```"
)
PROGRAMS = PROGRAM.findall(PAGE.read_text())


def test_there_are_three_programs_of_at_most_fifteen_lines():
    assert len(PROGRAMS) == 3
    for program in PROGRAMS:
        assert len([line for line in program.splitlines() if line.strip()]) <= 15


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with ``photos.rdb``; encoders cost nothing, and nothing moves to a GPU."""
    from diffusers import DiffusionPipeline, ModularPipeline

    import retrodiff.encoders

    torch.manual_seed(0)
    images = [torch.rand(3, 64, 80) * 2 - 1 for _ in range(6)]
    columns = {"license": "CC0", "credit": "me"}
    source = Images(images, columns=columns)
    build_database(tmp_path / "photos.rdb", source, HashingEncoder(), thumbnails=80, progress=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retrodiff.encoders, "CLIPEncoder", lambda name, tag: HashingEncoder())
    for kind in (DiffusionPipeline, ModularPipeline):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda self: None)
    return tmp_path


def instead(monkeypatch: pytest.MonkeyPatch, kind: Any, repo: str, made: Any) -> None:
    def from_pretrained(name: str, **_: Any) -> Any:
        assert name == repo
        return made

    monkeypatch.setattr(kind, "from_pretrained", from_pretrained)


@pytest.mark.filterwarnings("ignore:.*its thumbnail of 80 x 64 pixels")  # no files, in memory
def test_the_program_for_flux2(place, monkeypatch, capsys):
    from diffusers import Flux2AutoBlocks, ModularPipeline

    init = Flux2AutoBlocks.init_pipeline

    def init_pipeline(self: Any, repo: str) -> Any:
        assert repo == "black-forest-labs/FLUX.2-dev"
        return tiny.quiet(init(self))

    monkeypatch.setattr(Flux2AutoBlocks, "init_pipeline", init_pipeline)
    monkeypatch.setattr(
        ModularPipeline,
        "load_components",
        lambda self, dtype: self.update_components(**tiny.flux2_parts(layers=30)),
    )
    exec(compile(PROGRAMS[0], str(PAGE), "exec"), {})
    credit = read_credit(place / "lighthouse.png")
    assert len(credit["references"]) == 4
    assert credit["references"][0]["record"]["license"] == "CC0"
    assert "'a lighthouse in fog': 4 of 6 rows" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*its thumbnail of 80 x 64 pixels")
def test_the_program_for_qwen_image_edit(place, monkeypatch):
    from diffusers import QwenImageEditPlusPipeline
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (64, 64))
    instead(monkeypatch, QwenImageEditPlusPipeline, "Qwen/Qwen-Image-Edit-2509", tiny.qwen())
    exec(compile(PROGRAMS[1], str(PAGE), "exec"), {})
    prompts = [read_credit(place / "out" / f"0000{i}.png")["prompt"] for i in range(2)]
    assert prompts == ["a lighthouse in fog", "a market at night"]


@pytest.mark.filterwarnings("ignore:.*its thumbnail of 80 x 64 pixels")
def test_the_program_for_sdxl(place, monkeypatch):
    from diffusers import StableDiffusionXLPipeline

    repo = "stabilityai/stable-diffusion-xl-base-1.0"
    instead(monkeypatch, StableDiffusionXLPipeline, repo, tiny.sdxl(adapter=False))
    monkeypatch.setattr(
        StableDiffusionXLPipeline,
        "load_ip_adapter",
        lambda self, name, subfolder, weight_name: tiny.load_adapter(self),
    )
    exec(compile(PROGRAMS[2], str(PAGE), "exec"), {})
    credits = [read_credit(place / "out" / f"0000{i}.png") for i in range(4)]
    assert [one["prompt"] for one in credits] == ["a lighthouse in fog"] * 2 + [
        "a market at night"
    ] * 2
    assert credits[0]["made_by"]["use"] == "pictures"
