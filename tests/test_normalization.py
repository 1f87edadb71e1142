"""The gradient of group normalization against torch's own in float64, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrodiff.networks.normalization import GroupNorm

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [8, 24])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)]
)
def test_the_gradient_is_that_of_torch(
    layout: torch.memory_format, side: int, dtype: torch.dtype, most: float
) -> None:
    generator = torch.Generator().manual_seed(side)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    norm = GroupNorm(8, 32).to(kind)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(3, 32, side, side + 1, generator=generator) * 2 + 1
    above = torch.randn(x.shape, generator=generator)
    x, above = (t.to(dtype).contiguous(memory_format=layout) for t in (x, above))
    exact = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    expected = F.group_norm(exact, 8, weight, bias)
    expected.backward(above.double())
    x.requires_grad_()
    found = norm(x)
    found.backward(above)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    for mine, theirs in (
        (found, expected),
        (x.grad, exact.grad),
        (norm.weight.grad, weight.grad),
        (norm.bias.grad, bias.grad),
    ):
        assert mine is not None
        assert theirs is not None
        assert (mine.double() - theirs).norm() <= most * theirs.norm()


def test_without_gradient_it_is_torch_bit_by_bit() -> None:
    norm = GroupNorm(4, 16)
    x = torch.randn(2, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.group_norm(x, 4, norm.weight, norm.bias)
        assert torch.equal(norm(x), expected)
    assert torch.equal(norm(x.requires_grad_()), expected)


def test_a_second_gradient_is_refused_not_wrong() -> None:
    norm = GroupNorm(4, 16)
    x = torch.randn(2, 16, 20, 20).contiguous(memory_format=torch.channels_last).requires_grad_()
    (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
