"""A wrong search kernel is caught at its first call, warned about once, and replaced."""

from __future__ import annotations

import pytest
import torch
from test_indexes import check_exact, clustered

from retrodiff.indexes import Vectors
from retrodiff.indexes import tile_maxima as tiles
from retrodiff.indexes.resident import ResidentIndex
from retrodiff.kernel_trials import KernelWarning, check_kernels


def right(values, scale, queries, sizes=None):
    return tiles.multiplied(values, scale, queries)


def one_percent(values, scale, queries, sizes=None):
    return 0.99 * right(values, scale, queries)


def last_tile(values, scale, queries, sizes=None):
    out = right(values, scale, queries)
    out[-1] = -torch.inf
    return out


def not_a_number(values, scale, queries, sizes=None):
    out = right(values, scale, queries)
    out[0, 0] = torch.nan
    return out


def raises(values, scale, queries, sizes=None):
    raise RuntimeError("no kernel image is available")


@pytest.fixture(autouse=True)
def possible(monkeypatch):
    monkeypatch.setattr(tiles, "_triton", lambda values: True)
    tiles.TRIALS.forget()
    yield
    tiles.TRIALS.forget()


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("double", [one_percent, last_tile, not_a_number, raises])
def test_a_wrong_kernel_is_replaced_and_search_stays_exact(monkeypatch, double, storage):
    monkeypatch.setattr(tiles, "launched", double)
    g = torch.Generator().manual_seed(1)
    stored, queries = clustered(3000, 64), torch.randn(4, 64, generator=g)
    index = ResidentIndex.on(Vectors([stored]), storage, torch.device("cpu"))
    with pytest.warns(KernelWarning, match="the search kernel is not used for cpu") as told:
        check_exact(index, stored, queries, 10)
    assert len(told) == 1
    check_exact(index, stored, queries, 10)  # no second warning: warnings are errors here


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_right_kernel_is_compared_once(monkeypatch, storage):
    monkeypatch.setattr(tiles, "launched", right)
    judged = []
    usual = tiles.judged
    monkeypatch.setattr(tiles, "judged", lambda *a: judged.append(a) or usual(*a))
    stored = clustered(3000, 64)
    stored[5] = 0
    index = ResidentIndex.on(Vectors([stored]), storage, torch.device("cpu"))
    hidden = torch.arange(64, 200)
    for _ in range(2):
        index.search(torch.randn(4, 64), 10, hidden)
    assert len(judged) == 1


def test_switched_off_the_kernel_runs_whatever_it_does(monkeypatch):
    monkeypatch.setattr(tiles, "launched", raises)
    index = ResidentIndex.on(Vectors([clustered(300, 16)]), "float16", torch.device("cpu"))
    with check_kernels(False), pytest.raises(RuntimeError, match="no kernel image"):
        index.search(torch.randn(2, 16), 3)
