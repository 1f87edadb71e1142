"""What is computed otherwise where no gradient is wanted gives the same numbers."""

from dataclasses import replace

import pytest
import torch

from retrodiff.interfaces import Context
from retrodiff.networks import UNet
from retrodiff.networks import linear as module
from retrodiff.networks.blocks import FOLD_FROM
from retrodiff.networks.linear import ROWS, Linear


def small(size=32):
    torch.manual_seed(0)
    unet = UNet(
        in_channels=3,
        out_channels=3,
        size=size,
        channels=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        context_width=16,
    ).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.05)
    return unet


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_against_float64(amd, bias, monkeypatch):
    monkeypatch.setattr(module, "_made_by_amd", lambda: amd)
    module._product.cache_clear()
    layer = Linear(48, 80, bias=bias)
    for shape in ((1, 48), (2, ROWS, 48), (3, 4, 32, 48)):
        x = torch.randn(shape)
        expected = layer.double()(x.double())
        with torch.no_grad():
            found = layer.float()(x)
        assert found.shape == (*shape[:-1], 80)
        assert torch.allclose(found.double(), expected, 1e-5, 1e-5)
    module._product.cache_clear()


def test_autocast_stays_autocast():
    layer, x = Linear(32, 32), torch.randn(2 * ROWS, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_network_without_gradients_is_the_one_with_them():
    unet, x, t = small(), torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
    context = Context.of(torch.randn(2, 4, 16))
    kept = x.clone()
    expected = unet(x, t, context)
    with torch.no_grad():
        prepared = unet.prepare(context)
        assert [kernel is not None for kernel in prepared.kernels] == [True]
        for some in (prepared, replace(prepared, kernels=()), context):
            found = unet(x, t, some)
            assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(unet(x, t, prepared), unet(x, t, prepared))
    assert torch.equal(x, kept)


def test_kernels_only_where_they_are_used_again():
    unet = small(16)
    context = Context.of(torch.randn(1, 4, 16))
    assert unet.prepare(context).kernels == ()  # gradients are wanted
    with torch.no_grad():
        assert unet.prepare(context, steps=1).kernels == ()
        assert 8 * 8 < FOLD_FROM
        prepared = unet.prepare(context)
        assert prepared.kernels == (None,)
        larger = torch.randn(1, 3, 32, 32)  # than the network was made for
        assert unet(larger, torch.tensor([5.0]), prepared).shape == larger.shape


def test_bfloat16_is_near_float32():
    unet, x, t = small(), torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
    context = Context.of(torch.randn(2, 4, 16))
    with torch.no_grad():
        expected = unet(x, t, unet.prepare(context))
        unet.bfloat16()
        found = unet(x, t, unet.prepare(context))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() <= 0.05 * expected.norm()
