"""``retrodiff convert`` on miniature files: what it writes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_files import configuration, published_state, write_checkpoint

from retrodiff.checkpoints.foreign.compvis import ema_name, read_config
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.cli import main
from retrodiff.diffusion import NeighborEmbeddings
from retrodiff.model import Model


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A checkpoint and its yaml; its width is that of the paper's CLIP."""
    config = configuration("kl")
    config["model"]["params"]["unet_config"]["params"]["context_dim"] = 512
    (tmp_path / "its.yml").write_text(yaml.safe_dump(config))
    path = write_checkpoint(tmp_path / "model.ckpt", published_state(config), epoch=3)
    return str(path), str(tmp_path / "its.yml")


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line that a refused command prints; nothing was written."""
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert not Path(command[2]).exists()
    return line


def test_a_checkpoint_becomes_a_folder(files: tuple[str, str], tmp_path: Path) -> None:
    checkpoint, config = files
    out = str(tmp_path / "out")
    command = ["convert", checkpoint, out, "--config", config, "--scale", "unit"]
    assert main(command) == 0
    model = Model.load(out)
    assert model.conditioner == NeighborEmbeddings("unit", convert=False)
    found = model.denoiser.network.conv_out.bias  # type: ignore[attr-defined]
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(found, state[ema_name("out.2.bias")])
    assert {p.suffix for p in Path(out).rglob("*.*")} == {".json", ".safetensors"}
    assert main([*command, "--overwrite", "--convert-scale", "--raw-weights"]) == 0
    model = Model.load(out)
    assert model.conditioner == NeighborEmbeddings("unit", convert=True)
    found = model.denoiser.network.conv_out.bias  # type: ignore[attr-defined]
    assert torch.equal(found, state["model.diffusion_model.out.2.bias"])


def test_the_first_stage_may_have_a_file_of_its_own(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, config = files
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    start = "first_stage_model."
    unet = {k: v for k, v in state.items() if not k.startswith(start)}
    own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    paths = (tmp_path / "unet.ckpt", tmp_path / "first.ckpt")
    for path, part in zip(paths, (unet, own), strict=True):
        write_checkpoint(path, part)
    command = ["convert", str(paths[0]), str(tmp_path / "out"), "--config", config]
    assert "no first stage" in refused(capsys, [*command, "--scale", "raw"])
    assert main([*command, "--scale", "raw", "--first-stage", str(paths[1])]) == 0
    found = Model.load(tmp_path / "out").autoencoder.state_dict()  # type: ignore[attr-defined]
    assert any(torch.equal(v, own["decoder.conv_out.bias"]) for v in found.values())


def test_a_recognized_model_has_its_scale_and_its_encoder(
    files: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, config = files
    known: Any = replace(read_config(config), name="rdm_imagenet", scale="raw")
    monkeypatch.setitem(PUBLISHED, "rdm_imagenet", known)
    command = ["convert", checkpoint, str(tmp_path / "out"), "--preset", "rdm_imagenet"]
    line = refused(capsys, [*command, "--scale", "unit"])
    assert "trained on raw embeddings, but --scale unit" in line
    assert main(command) == 0
    model = Model.load(tmp_path / "out")
    assert model.encoder is not None
    assert model.encoder.identity.encoder.startswith("open_clip:ViT-B-32-quickgelu")  # type: ignore[attr-defined]


def test_bad_input_is_one_line(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, config = files
    out = str(tmp_path / "out")
    assert "--scale raw" in refused(capsys, ["convert", checkpoint, out, "--config", config])
    assert "none.ckpt is neither" in refused(capsys, ["convert", str(tmp_path / "none.ckpt"), out])
    assert "hand in --config" in refused(capsys, ["convert", checkpoint, out])
    text = Path(config).read_text()
    Path(config).write_text(text.replace("UNetModel", "Transformer"))
    line = refused(capsys, ["convert", checkpoint, out, "--config", config])
    assert "of another model family" in line
    Path(config).write_text(text)
    content = Path(checkpoint).read_bytes()
    Path(checkpoint).write_bytes(content[: len(content) // 2])
    line = refused(capsys, ["convert", checkpoint, out, "--config", config])
    assert "is truncated" in line
