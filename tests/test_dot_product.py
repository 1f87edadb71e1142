"""Softmax-attention with a gradient in bfloat16 that is fast on a CPU, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.attention import dot_product
from retrodiff.attention.dot_product import dot_product_attention


def tensors(n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, keys, values and what flows back."""
    generator = torch.Generator().manual_seed(n + k)
    shapes = [(2, 3, n, 16), (2, 3, k, 16), (2, 3, k, 16), (2, 3, n, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


SIZES = [(64, 64), (16, 5), (300, 300)]
WAYS = [(n, k, how) for n, k in SIZES for how in ("plain", "mask", "causal")]
WAYS.remove((16, 5, "causal"))  # causal attention is of a sequence to itself


@pytest.mark.parametrize(("n", "k", "how"), WAYS)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 1.2e-2), (torch.float32, 1e-6), (torch.float64, 1e-13)]
)
def test_values_and_gradients_are_those_of_float64(
    n: int, k: int, how: str, dtype: torch.dtype, most: float
) -> None:
    *inputs, above = tensors(n, k, dtype)
    mask = torch.rand(2, 1, 1, k, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    given = mask if how == "mask" else None
    exact = [x.detach().double().requires_grad_() for x in inputs]
    allowed = torch.ones(n, k, dtype=torch.bool).tril() if how == "causal" else given
    scores = exact[0] @ exact[1].mT / 4
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ exact[2]
    expected.backward(above.double())
    for x in inputs:
        x.requires_grad_()
    found = dot_product_attention(*inputs, given, causal=how == "causal")
    found.backward(above)
    assert found.dtype == dtype
    for mine, theirs in (
        (found, expected),
        *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True)),
    ):
        assert mine is not None
        assert theirs is not None
        assert (mine.double() - theirs).norm() <= most * theirs.norm()


def test_only_small_trained_bfloat16_takes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def torchs(*inputs: Tensor, **options: bool) -> Tensor:
        asked.append(str(inputs[0].dtype))
        return inputs[0]

    monkeypatch.setattr(dot_product.F, "scaled_dot_product_attention", torchs)
    q, k, v, _ = tensors(64, 64, torch.bfloat16)
    dot_product_attention(q.requires_grad_(), k, v)
    assert not asked  # the formula
    dot_product_attention(q.detach(), k, v)  # nothing is trained
    with torch.no_grad():
        dot_product_attention(q, k, v)
    dot_product_attention(q.float(), k.float(), v.float())
    q, k, v, _ = tensors(300, 300, torch.bfloat16)
    dot_product_attention(q.requires_grad_(), k, v)  # too many scores
    assert len(asked) == 4


def test_without_gradient_it_is_torch_bit_by_bit() -> None:
    q, k, v, _ = tensors(64, 64, torch.bfloat16)
    assert torch.equal(dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
