"""A planted wrong kernel is caught at its first call, warned about once, and replaced.

The doubles stand where a kernel is launched, so that these tests run on any CPU; the real kernels
pass the same check in Triton's interpreter (attention_kernel_checks.py) and on a GPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodiff import kernel_trials
from retrodiff.attention import (
    KernelWarning,
    NeighborAttention,
    check_kernels,
    fused,
    kernel_calls,
    proving,
)
from retrodiff.attention.absorbed import absorb, absorbed_attention
from retrodiff.attention.absorbed_gradients import absorbed_gradients
from retrodiff.interfaces import Tokens

Double = Callable[..., Any]
HEADS, WIDTH, K = 4, 64, 4


def right(x, m, offset, u, bias, eps, heads, height, width, plan) -> Tensor:
    """What a right kernel gives, computed otherwise: products in float32, one rounding."""
    del plan
    tables = proving._tables(m.float(), offset.float(), u.float(), heads, len(x))
    shape = (height, width) if height else None
    return absorbed_attention(x.float(), tables, bias.float(), eps, shape).to(x.dtype)


def right_back(grad, x, m, offset, u, eps, heads, height, width, plan):
    del plan
    tables = proving._tables(m.float(), offset.float(), u.float(), heads, len(x))
    shape = (height, width) if height else None
    found = absorbed_gradients(grad.float(), x.float(), tables, eps, shape)
    kinds = (x.dtype, m.dtype, offset.dtype, u.dtype, torch.float32)
    return tuple(t.to(kind) for t, kind in zip(found, kinds, strict=True))


def one_percent(*arguments) -> Tensor:
    return right(*arguments) * 1.01


def not_a_number(*arguments) -> Tensor:
    out = right(*arguments)
    out[-1, 3, 5] = torch.nan
    return out


def one_head(x, m, offset, u, *rest) -> Tensor:
    """The second head sees the neighbors of the first."""
    m = m.clone()
    m[:, :, K : 2 * K] = m[:, :, :K]
    return right(x, m, offset, u, *rest)


def last_row(*arguments) -> Tensor:
    out = right(*arguments)
    out[0, -1] = arguments[0][0, -1]
    return out


def does_nothing(x, *_) -> Tensor:
    return x.clone()


def raises(*_) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nand a second line")


def wrong_back(*arguments):
    grad_x, *rest = right_back(*arguments)
    return grad_x, *(t * 0.9 for t in rest)


def nan_back(*arguments):
    grad_x, grad_m, *rest = right_back(*arguments)
    return grad_x, torch.full_like(grad_m, torch.nan), *rest


@pytest.fixture(autouse=True)
def possible(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    """Kernels count as possible on a CPU, nothing is tuned, and nothing was tried."""
    monkeypatch.setenv("RETRODIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(fused, "INTERPRETED", True)
    monkeypatch.setattr(fused, "TRITON", True)
    monkeypatch.setattr(kernel_calls, "forward", right)
    monkeypatch.setattr(kernel_calls, "backward", right_back)
    proving.TRIALS.forget()
    yield
    proving.TRIALS.forget()


class Counted:
    """A double that counts its calls."""

    def __init__(self, double: Double) -> None:
        self.double, self.calls = double, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.double(*arguments)


def planted(monkeypatch: pytest.MonkeyPatch, name: str, double: Double) -> Counted:
    counted = Counted(double)
    monkeypatch.setattr(kernel_calls, name, counted)
    return counted


def block(dtype: torch.dtype = torch.float32, path: Any = None) -> NeighborAttention:
    torch.manual_seed(0)
    return NeighborAttention(WIDTH, 16, HEADS, path=path).to(dtype)


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1, rows: int = 3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 48, WIDTH, generator=g).to(dtype)
    return x, torch.randn(rows, K, 16, generator=g).to(dtype)


def prepared(module: NeighborAttention, values: Tensor, nulls: int = 0):
    with torch.no_grad():
        return absorb(Tokens(values, None, nulls), module.weights)


TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "double", [one_percent, not_a_number, one_head, last_row, does_nothing, raises]
)
def test_a_wrong_kernel_is_replaced(monkeypatch, double: Double, dtype: torch.dtype) -> None:
    kernel = planted(monkeypatch, "forward", double)
    module, (x, values) = block(dtype), inputs(dtype)
    tables = prepared(module, values)
    expected = absorbed_attention(x, tables, module.to_out.bias)
    with torch.no_grad():
        with pytest.warns(KernelWarning) as told:
            out = module(x, tables)
        assert torch.equal(out, expected)
        for _ in range(3):  # no second warning: warnings are errors here
            assert torch.equal(module(x, tables), expected)
    assert kernel.calls == 1
    (text,) = [str(w.message) for w in told]
    assert "\n" not in text
    assert f"width {WIDTH}, {HEADS} heads, k={K}" in text
    assert "RETRODIFF_KERNEL_CHECK=0" in text
    reason = "RuntimeError: out of resource" if double is raises else "is allowed"
    assert reason in text
    choice = module.explain(x, tables)
    assert choice.path == "absorbed"
    assert reason in choice.reason


@pytest.mark.parametrize("dtype", TYPES)
def test_a_right_kernel_is_compared_once(monkeypatch, dtype: torch.dtype) -> None:
    kernel = planted(monkeypatch, "forward", right)
    judged = Counted(proving.judged_forward)
    monkeypatch.setattr(proving, "judged_forward", judged)
    module, (x, values) = block(dtype), inputs(dtype)
    tables = prepared(module, values)
    with torch.no_grad():
        first, second = module(x, tables), module(x, tables)
    assert torch.equal(first, second)
    assert (kernel.calls, judged.calls) == (2, 1)
    assert module.explain(x, tables).path == "fused"
    assert list(proving.TRIALS.verdicts().values()) == ["proven"]


def test_another_class_is_tried_anew(monkeypatch) -> None:
    judged = Counted(proving.judged_forward)
    monkeypatch.setattr(proving, "judged_forward", judged)
    with torch.no_grad():
        for dtype, k, nulls in [
            (torch.float32, 4, 0),
            (torch.float32, 4, 1),
            (torch.float32, 3, 0),
            (torch.bfloat16, 4, 0),
            (torch.float32, 4, 0),
        ]:
            module, (x, values) = block(dtype), inputs(dtype)
            module(x, prepared(module, values[:, :k], nulls))
    assert judged.calls == 4


def gradients(module: NeighborAttention, x: Tensor, values: Tensor) -> list[Tensor]:
    x, values = x.requires_grad_(), values.requires_grad_()
    out = module(x, values)
    g = torch.Generator().manual_seed(5)
    grad = torch.randn(out.shape, generator=g).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, values, *module.parameters()], grad)]


@pytest.mark.parametrize("double", [wrong_back, nan_back, raises])
def test_only_the_backward_is_wrong(monkeypatch, double: Double) -> None:
    kernel = planted(monkeypatch, "backward", double)
    expected = gradients(block(path="absorbed"), *inputs())
    module = block(path="fused")
    with pytest.warns(KernelWarning, match=r"not used for backward") as told:
        found = gradients(module, *inputs())
    assert len(told) == 1
    again = gradients(module, *inputs())
    for a, b, c in zip(found, again, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, b)
    assert kernel.calls == 1
    x, values = inputs()
    assert module.explain(x, prepared(module, values)).path == "fused"  # the forward is right


def test_right_gradients_are_kept(monkeypatch) -> None:
    judged = Counted(proving.judged_backward)
    monkeypatch.setattr(proving, "judged_backward", judged)
    expected = gradients(block(path="absorbed"), *inputs())
    module = block(path="fused")
    for _ in range(2):
        for a, b in zip(gradients(module, *inputs()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert judged.calls == 1


def test_equal_neighbors_and_one_neighbor_are_no_fault() -> None:
    """Their gradients cancel to nothing but rounding."""
    module = block(path="fused")
    x, values = inputs()
    gradients(module, x, values[:, :1].repeat(1, 3, 1))
    gradients(module, *(t.detach() for t in (x, values[:, :1])))


def test_switched_off_the_kernel_runs_whatever_it_does(monkeypatch) -> None:
    kernel = planted(monkeypatch, "forward", one_percent)
    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    with torch.no_grad(), check_kernels(False):
        assert torch.equal(module(x, tables), one_percent(*given(x, tables, module)))
        monkeypatch.setattr(kernel_calls, "forward", raises)
        with pytest.raises(RuntimeError, match="out of resource"):
            module(x, tables)
    monkeypatch.setattr(kernel_calls, "forward", kernel)
    with torch.no_grad(), pytest.warns(KernelWarning):
        module(x, tables)


def given(x: Tensor, tables: Any, module: NeighborAttention):
    return x, tables.m, tables.offset, tables.u, module.to_out.bias, 1e-5, HEADS, 0, 0, None


def test_the_switch_also_holds_until_it_is_turned_again() -> None:
    check_kernels(False)
    assert not kernel_trials._on
    with check_kernels(True):
        assert kernel_trials._on
    assert not kernel_trials._on
    check_kernels(True)
    assert kernel_trials._on


def test_no_check_while_a_graph_is_recorded(monkeypatch) -> None:
    kernel = planted(monkeypatch, "forward", right)
    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    monkeypatch.setattr(kernel_trials, "capturing", lambda device: True)
    with torch.no_grad():
        with pytest.warns(KernelWarning, match="before a CUDA graph recorded it") as told:
            out = module(x, tables)
        module(x, tables)
        assert len(told) == 1
        assert kernel.calls == 0
        assert torch.equal(out, absorbed_attention(x, tables, module.to_out.bias))
        monkeypatch.setattr(kernel_trials, "capturing", lambda device: False)
        module(x, tables)  # checked now
        monkeypatch.setattr(kernel_trials, "capturing", lambda device: True)
        module(x, tables)  # and known while recording
    assert kernel.calls == 2


def test_compiled_without_a_break_the_check_runs_with_the_first_call(monkeypatch) -> None:
    kernel = planted(monkeypatch, "forward", one_head)
    module, (x, values) = block(path="fused"), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        tables = prepared(module, values)
        with pytest.warns(KernelWarning):
            out = compiled(x, tables)
        torch.testing.assert_close(out, absorbed_attention(x, tables, module.to_out.bias))
        compiled(x, tables)
    assert kernel.calls == 1


def test_seeds_and_inputs_are_left_alone() -> None:
    module, (x, values) = block(path="fused"), inputs()
    before, copy = torch.get_rng_state(), x.clone()
    gradients(module, x, values)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, copy)


def test_under_autocast() -> None:
    module, (x, values) = block(path="fused"), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, values)
    out.sum().backward()
    assert out.dtype == torch.float32
    told = proving.TRIALS.verdicts()
    assert len(told) == 2
    assert set(told.values()) == {"proven"}
    assert all("float32 with tables in bfloat16" in name for name in told)


def test_tensors_that_show_nothing_prove_nothing(monkeypatch) -> None:
    """A fresh network adds nothing: the check waits for one that does."""
    kernel = planted(monkeypatch, "forward", does_nothing)
    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    still = replace(tables, u=torch.zeros_like(tables.u))
    with torch.no_grad():
        module.to_out.bias.zero_()
        for _ in range(3):
            assert torch.equal(module(x, still), x)
        with pytest.warns(KernelWarning, match="is allowed"):
            module(x, tables)
    assert kernel.calls == 4


def test_nan_of_the_caller_is_no_fault_of_the_kernel() -> None:
    module, (x, values) = block(), inputs()
    x[0, 0] = torch.nan
    tables = prepared(module, values)
    with torch.no_grad():
        out = module(x, tables)
    assert out[0, 0].isnan().all()
    assert not out[1:].isnan().any()


def test_no_room_for_the_comparison_is_no_fault(monkeypatch) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(proving, "judged_forward", full)
        module(x, tables)
        assert proving.TRIALS.verdicts() == {}
        patch.setattr(kernel_calls, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):  # as without any check
            module(x, tables)


def test_a_fault_that_shows_when_the_result_is_looked_at(monkeypatch) -> None:
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(proving, "judged_forward", lost)
    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    with torch.no_grad(), pytest.warns(KernelWarning, match="an illegal memory access"):
        out = module(x, tables)
    assert torch.equal(out, absorbed_attention(x, tables, module.to_out.bias))


def test_of_a_large_batch_the_last_samples_are_compared(monkeypatch) -> None:
    def last_sample(*arguments):
        out = right(*arguments)
        out[5] = 0
        return out

    monkeypatch.setattr(proving, "COMPARED", 2 * 48 * WIDTH)
    planted(monkeypatch, "forward", last_sample)
    module, (x, values) = block(), inputs(rows=8)
    tables = prepared(module, values, nulls=2)
    with torch.no_grad(), pytest.warns(KernelWarning):
        out = module(x, tables)
    assert torch.equal(out, absorbed_attention(x, tables, module.to_out.bias))


def test_threads_share_one_warning(monkeypatch) -> None:
    planted(monkeypatch, "forward", one_head)
    module, (x, values) = block(), inputs()
    tables = prepared(module, values)
    out: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            out.append(module(x, tables))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(told) == 1
    assert all(torch.equal(one, out[0]) for one in out)


@pytest.mark.parametrize("shape", [None, (4, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_written_out_are_those_of_autograd(shape, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    module = NeighborAttention(WIDTH, 16, HEADS).to(dtype)
    values = torch.randn(3, 4, K, 16, dtype=dtype)
    mask = torch.rand(3, 4, K) > 0.3
    mask[..., 0] = True
    with torch.no_grad():
        tables = absorb(Tokens(values, mask, 1), module.weights)
    x = torch.randn(3, 48, WIDTH, dtype=dtype, requires_grad=True)
    m, offset, u = (t.requires_grad_() for t in (tables.m, tables.offset, tables.u))
    bias = torch.randn(WIDTH, dtype=dtype, requires_grad=True)
    out = absorbed_attention(x, tables, bias, shape=shape)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, [x, m, offset, u, bias], grad)
    with torch.no_grad():
        found = absorbed_gradients(grad, x, tables, shape=shape)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
