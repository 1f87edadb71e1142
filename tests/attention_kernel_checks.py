"""The Triton kernels on CPU tensors, in Triton's interpreter.

Not collected by itself: the interpreter must be chosen before triton is imported, so
`test_attention_kernels.py` runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import SHARED, needs_shared
from torch import Tensor, nn

from retrodiff.attention import (
    KernelWarning,
    NeighborAttention,
    check_kernels,
    kernel_calls,
    proving,
    reference_attention,
    use_path,
)
from retrodiff.attention.absorbed import absorb
from retrodiff.attention.fused import fused_attention
from retrodiff.attention.launches import INTERPRETED, launch
from retrodiff.attention.reference import keys_values, standard_attention
from retrodiff.interfaces import Tokens

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def tried_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test begins without verdicts and tuned sizes; a kernel found wrong fails it."""
    monkeypatch.setenv("RETRODIFF_CACHE", str(tmp_path))
    proving.TRIALS.forget()


def block(width: int, heads: int, dtype: torch.dtype, context: int = 12) -> NeighborAttention:
    torch.manual_seed(0)
    module = NeighborAttention(width, context, heads)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(module.norm.weight, 1.0, 0.2)
    return module.to(dtype)


def gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


CASES = {
    # width, heads, k, positions, regions, shape, mask, null rows
    "one group of heads": (48, 3, 4, 20, 1, None, True, 1),
    "several groups": (24, 12, 20, 18, 1, None, True, 0),
    "k not a power of two, odd n": (40, 5, 11, 37, 1, None, False, 0),
    "regions in runs": (32, 2, 3, 24, 2, None, True, 0),
    "regions in blocks": (32, 4, 4, 24, 4, (4, 6), True, 1),
    "one neighbor": (32, 4, 1, 16, 1, None, False, 2),
    "more neighbors than columns": (16, 2, 64, 16, 1, None, True, 0),
}


NARROW = {
    torch.bfloat16: ("one group of heads", "several groups", "regions in blocks"),
    torch.float16: ("k not a power of two, odd n",),
}
PAIRS = [(case, torch.float32) for case in CASES]
PAIRS += [(case, dtype) for dtype, some in NARROW.items() for case in some]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_forward_and_backward(case: str, dtype: torch.dtype) -> None:
    width, heads, k, n, r, shape, masked, nulls = CASES[case]
    module = block(width, heads, dtype)
    x = torch.randn(3, n, width).to(dtype).requires_grad_()
    values = torch.randn(3, r, k, 12).to(dtype)
    mask = torch.rand(3, r, k) > 0.3
    mask[0, 0, 0] = True
    if r > 1:
        mask[0, 1] = False  # a region that sees nothing
    values[3 - nulls :] = 0
    values.requires_grad_()
    tokens = Tokens(values, mask if masked else None, nulls)
    grad = torch.randn(3, n, width)
    inputs = [x, values, *module.parameters()]
    out = fused_attention(x, absorb(tokens, module.weights), module.to_out.bias, shape=shape)
    ours = gradients(out, inputs, grad)

    plain_out = standard_attention(x, keys_values(tokens, module.weights), module.weights, shape)
    plain = gradients(plain_out, inputs, grad)

    wide = block(width, heads, torch.float64)
    wide.load_state_dict(module.state_dict())
    x64 = x.detach().double().requires_grad_()
    values64 = values.detach().double().requires_grad_()
    exact_out = standard_attention(
        x64,
        keys_values(Tokens(values64, tokens.mask, nulls), wide.weights),
        wide.weights,
        shape,
    )
    torch.testing.assert_close(
        exact_out, reference_attention(x64, Tokens(values64, tokens.mask), wide.weights, shape)
    )
    exact = gradients(exact_out, [x64, values64, *wide.parameters()], grad)
    names = ["out", "x", "values", *dict(module.named_parameters())]
    checked = zip(names, (out, *ours), (plain_out, *plain), (exact_out, *exact), strict=True)
    for name, mine, theirs, right in checked:
        assert mine.dtype == theirs.dtype
        # An error of nothing in the plain block is no bound: allow one rounding of the result.
        slack = torch.finfo(dtype).eps * right.norm()
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + slack, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 4, 11, 20])
@pytest.mark.parametrize("mean", [0, 30])
def test_error_is_at_most_twice_that_of_the_plain_block(
    dtype: torch.dtype, k: int, mean: float
) -> None:
    """Rows far from zero, neighbors of unit scale; with k = 20 heads are taken in groups."""
    torch.manual_seed(0)
    module = NeighborAttention(192, 64, 6).to(dtype)
    assert (launch(size=32, heads=6, k=k, dtype=dtype).groups > 1) == (
        k == 20 and dtype == torch.float32
    )
    x, values = (torch.randn(1, 32, 192) + mean).to(dtype), torch.randn(1, k, 64)
    values = (values / values.norm(dim=-1, keepdim=True)).to(dtype)
    exact = reference_attention(x.double(), values.double(), module.weights.to(torch.float64))
    plain = standard_attention(x, keys_values(values, module.weights), module.weights)
    with torch.no_grad():
        ours = fused_attention(x, absorb(values, module.weights), module.to_out.bias)
    bound = 1.5 if dtype == torch.float32 else 2
    assert (ours - exact).norm() <= bound * (plain - exact).norm()


def test_wide_x_with_narrow_tables_as_under_autocast() -> None:
    module = block(32, 2, torch.float32)
    x, values = torch.randn(2, 16, 32, requires_grad=True), torch.randn(2, 4, 12)
    expected = reference_attention(x.double(), values.double(), module.weights.to(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        tables = module.prepare(values)
        out = module(x, tables)
    assert module.explain(x, tables).path == "fused"
    assert tables.m.dtype == torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue]
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.02 * (expected - x).norm()
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own checks
def test_the_operator_keeps_its_contract_with_torch() -> None:
    module = block(32, 2, torch.float32)
    tables = absorb(torch.randn(2, 4, 4, 12), module.weights)
    x = torch.randn(2, 16, 32, requires_grad=True)
    for height in (0, 4):
        arguments = (x, tables.m, tables.offset, tables.u, module.to_out.bias, 1e-5, 2)
        arguments = tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments
        )
        torch.library.opcheck(torch.ops.retrodiff.neighbor_attention, (*arguments, height, height))


def test_compiles_without_graph_breaks() -> None:
    module = block(32, 2, torch.float32)
    module.path = "fused"
    x, values = torch.randn(3, 16, 32, requires_grad=True), torch.randn(3, 4, 12)

    def step(x: Tensor, values: Tensor) -> Tensor:
        return module(x, Tokens(values, None, 1))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = step(x, values)
    torch.testing.assert_close(compiled(x, values), expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x, values).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_non_contiguous_input_and_gradient() -> None:
    module = block(32, 2, torch.float32)
    tables = absorb(torch.randn(2, 4, 12), module.weights)
    x = torch.randn(2, 32, 16).mT.requires_grad_()
    out = fused_attention(x, tables, module.to_out.bias)
    grad = torch.randn(2, 32, 16).mT
    (found,) = torch.autograd.grad(out, x, grad)
    straight = x.detach().contiguous().requires_grad_()
    again = fused_attention(straight, tables, module.to_out.bias)
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(found, torch.autograd.grad(again, straight, grad.contiguous())[0])


def test_nan_stays_in_its_sample() -> None:
    module = block(32, 2, torch.float32)
    values = torch.randn(2, 4, 12)
    values[0, 1] = torch.nan
    x = torch.randn(2, 16, 32)
    out = fused_attention(x, absorb(values, module.weights), module.to_out.bias)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def test_nothing_visible_is_the_null_condition_exactly() -> None:
    module = block(32, 2, torch.float32)
    x, values = torch.randn(2, 16, 32), torch.randn(2, 3, 12)
    hidden = Tokens(values, torch.tensor([[True] * 3, [False] * 3]))
    out = fused_attention(x, absorb(hidden, module.weights), module.to_out.bias)
    assert torch.equal(out[1], x[1] + module.to_out.bias)
    nulls = Tokens(values, None, 1)
    out = fused_attention(x, absorb(nulls, module.weights), module.to_out.bias)
    assert torch.equal(out[1], x[1] + module.to_out.bias)
    every = fused_attention(x, absorb(Tokens(values).zeros(), module.weights), module.to_out.bias)
    assert torch.equal(every, x + module.to_out.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "mean", "gain"), [(4, 0, 1), (20, 30, 8)])
def test_the_check_leaves_room_for_rounding_and_none_for_faults(
    dtype: torch.dtype, k: int, mean: float, gain: float
) -> None:
    """A right kernel has half of what is allowed in reserve, one percent is too much."""
    torch.manual_seed(k)
    module = NeighborAttention(192, 64, 6).to(dtype)
    x, values = (torch.randn(1, 16, 192) + mean).to(dtype), torch.randn(1, k, 64)
    values = (gain * values / values.norm(dim=-1, keepdim=True)).to(dtype)
    with torch.no_grad():
        tables, bias = absorb(values, module.weights), module.to_out.bias
        out = fused_attention(x, tables, bias)
        rest = (x, tables.m, tables.offset, tables.u, bias, 1e-5, 6, None, "interpreted")
        (right,) = proving.judged_forward(out, *rest)
        (wrong,) = proving.judged_forward(out * 1.01, *rest)
    assert right.error <= 0.6 * right.allowed, right
    assert not wrong.holds, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "r"), [(1, 1), (5, 4)])
def test_the_check_of_gradients_leaves_room_for_rounding(
    dtype: torch.dtype, k: int, r: int
) -> None:
    torch.manual_seed(k)
    module = NeighborAttention(96, 64, 3).to(dtype)
    x, values = torch.randn(2, 24, 96).to(dtype), torch.randn(2, r, k, 64).to(dtype)
    grad = torch.randn(2, 24, 96).to(dtype)
    with torch.no_grad():
        tables = absorb(Tokens(values, None, 1), module.weights)
        rest = (grad, x, tables.m, tables.offset, tables.u, 1e-5, 3)
        with check_kernels(False):
            found = torch.ops.retrodiff.neighbor_attention_backward(*rest, 0, 0)
        findings = proving.judged_backward(found, *rest, None, "interpreted")
    for finding in findings:
        assert finding.error <= 0.6 * finding.allowed, finding


def test_a_planted_fault_in_the_real_kernel_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = kernel_calls.forward

    def one_percent(*arguments):
        return usual(*arguments) * 1.01

    monkeypatch.setattr(kernel_calls, "forward", one_percent)
    module = block(48, 3, torch.bfloat16)
    x, values = torch.randn(2, 20, 48).bfloat16(), torch.randn(2, 4, 12).bfloat16()
    tables = absorb(values, module.weights)
    with torch.no_grad(), pytest.warns(KernelWarning, match="is allowed"):
        out = module(x, tables)
    module.path = "absorbed"
    with torch.no_grad():
        assert torch.equal(out, module(x, tables))


def test_too_many_neighbors_and_float64_go_to_the_next_path() -> None:
    module = block(32, 2, torch.float32)
    module.path = None
    x, values = torch.randn(1, 512, 32), torch.randn(1, 65, 12)
    told: Any = module.explain(x, absorb(values, module.weights))
    assert told.path == "absorbed"
    assert "k=65 is above the kernels' limit of 64" in told.reason
    wide = module.double()
    tables = absorb(values[:, :4].double(), wide.weights)
    assert "float64 is not one of" in wide.explain(x.double(), tables).reason
    out = wide(x.double(), tables)
    torch.testing.assert_close(
        out, reference_attention(x.double(), values[:, :4].double(), wide.weights)
    )


@needs_shared
@pytest.mark.parametrize("name", ["rdm_vq_tiny", "rdm_kl_tiny"])
def test_published_miniatures_on_the_fused_path(name: str) -> None:
    from safetensors.torch import load_file

    from retrodiff.checkpoints.foreign.compvis import load_compvis

    stem = SHARED / "parity" / name
    unet = load_compvis(stem.with_suffix(".ckpt"), stem.with_suffix(".yaml")).unet
    io = load_file(f"{stem}.io.safetensors")
    use_path(unet, "fused")
    with torch.no_grad():
        eps = unet(io["x"], io["timesteps"], io["context"])
    assert (eps - io["eps"]).norm() <= 1e-4 * io["eps"].norm()


def test_launch_sizes_cover_every_head_and_neighbor() -> None:
    sizes = itertools.product(range(1, 65), (1, 2, 4, 10, 20, 33, 64), DTYPES, (False, True))
    for heads, k, dtype, backward in sizes:
        plan = launch(size=64, heads=heads, k=k, dtype=dtype, backward=backward)
        assert plan.kp >= k
        assert plan.hg * plan.groups >= heads
        assert plan.hg * plan.kp >= 16  # the smallest product of a tensor core
        assert plan.hg * plan.kp <= 256


DTYPES = (torch.float32, torch.bfloat16)
