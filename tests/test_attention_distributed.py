"""Two processes, each with half of the batch, get the gradients of one with all of it (DDP)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parts import small_network
from torch import Tensor, nn

from retrodiff.attention import NeighborAttention
from retrodiff.diffusion import EDMDenoiser
from retrodiff.interfaces import Context, Tokens

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
PATHS = (None, "absorbed", "standard")


class Loss(nn.Module):
    """The training loss of some rows, as a module that DDP can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = EDMDenoiser(small_network()).double()

    def forward(self, rows: slice) -> Tensor:
        x0, sigma, noise, values = drawn((4, 1, 8, 8), (4,), (4, 1, 8, 8), (4, 3, 8))
        context = Context({"neighbors": Tokens(values[rows])})
        if rows == slice(2, 4):  # all that this half has is the null condition
            context = context.zeros()
        elif rows == slice(0, 4):
            context = Context.cat([Context.of(values[:2]), Context.of(values[2:]).zeros()])
        return self.denoiser.loss(x0[rows], sigma[rows].abs() + 0.1, noise[rows], context).mean()


class Block(nn.Module):
    """One cross-attention; the second half of its batch is null."""

    def __init__(self, path: Any, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = NeighborAttention(16, 8, 2, path=path).double()
        self.k = k

    def forward(self, rows: slice) -> Tensor:
        x, values = drawn((4, 9, 16), (4, self.k, 8))
        nulls = max(0, rows.stop - 2 - max(0, rows.start - 2))
        values[2:] = 0
        return self.block(x[rows], Tokens(values[rows], None, nulls)).square().mean()


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def modules() -> dict[str, nn.Module]:
    blocks = {f"{path}, k={k}": Block(path, k) for path in PATHS for k in (1, 3)}
    return {"denoiser": Loss(), **blocks}


def gradients(run: nn.Module, module: nn.Module, rows: slice) -> dict[str, Tensor]:
    run(rows).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def work(rank: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name, module in modules().items():
        wrapped = nn.parallel.DistributedDataParallel(module)
        found[name] = gradients(wrapped, module, slice(2 * rank, 2 * rank + 2))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, module in modules().items():
        whole = gradients(module, module, slice(0, 4))
        assert whole.keys() == dict(module.named_parameters()).keys()
        assert any(bool(gradient.any()) for gradient in whole.values())
        for half in halves:
            assert half[name].keys() == whole.keys()
            for key, gradient in whole.items():
                torch.testing.assert_close(half[name][key], gradient, msg=f"{name}: {key}")
