"""Hot paths do not become dearer unnoticed: counts, not times, below ceilings.

The ceilings are in costs.json, a tenth above the counts of the day they were made, with the torch
that is named there; an older one is not held to them. Where a change makes a path cheaper, or
dearer for a good reason, make them anew and say so in the commit:

    python tests/costs.py --write

Every path has a fault planted that its ceiling must notice.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from costs import Counts, calls, ceilings, older_torch, opens, operators, over, per_step
from parts import HashingEncoder
from PIL import Image
from trainings import made, run

from retrodiff.attention import NeighborAttention, absorbed, fused, kernel_calls, proving
from retrodiff.attention.absorbed import absorb
from retrodiff.databases import ImageFolder, build_database, open_database
from retrodiff.diffusion import DDIM, ClassifierFree, EDMDenoiser, EpsDenoiser
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.indexes import Exact, Vectors
from retrodiff.interfaces import Context
from retrodiff.networks import UNet, linear
from retrodiff.networks.blocks import ResBlock


@dataclass(frozen=True)
class HotPath:
    """A hot path: how it is counted, and a fault that its ceiling must notice."""

    measured: Callable[[], Counts]
    fault: Callable[[], AbstractContextManager[Any]]


def copying(owner: Any, name: str, copies: int = 1) -> AbstractContextManager[Any]:
    """A function that copies what it returns, needlessly."""
    usual = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        out = usual(*arguments, **options)
        for _ in range(copies):
            out = out.clone()
        return out

    return patch.object(owner, name, wrapped)


# --- a guided step of sampling ------------------------------------------------------------------


def sampling_step() -> Counts:
    torch.manual_seed(0)
    unet = UNet(
        in_channels=3,
        out_channels=3,
        size=16,
        channels=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(2,),
        context_width=16,
    ).eval()
    denoiser, none = EpsDenoiser(unet), Any
    generator = DiffusionGenerator(
        denoiser=denoiser,
        guidance=ClassifierFree(2.0),
        sampler=DDIM(),
        schedule=denoiser.schedule,
        autoencoder=none,  # pyright: ignore[reportArgumentType]
    )
    context, noise = Context.of(torch.randn(2, 4, 16)), torch.randn(2, 3, 16, 16)

    def sample(steps: int) -> None:
        generator.generate(context, context.zeros(), noise, steps=steps)

    # A layer's product is oneDNN's on processors of AMD alone: here on all, so that counts compare.
    linear._product.cache_clear()
    with patch.object(linear, "_made_by_amd", lambda: True):
        assert linear._product() is not None
    try:
        return per_step(operators, sample) | per_step(calls, sample)
    finally:
        linear._product.cache_clear()


# --- one search query ---------------------------------------------------------------------------


def search_query() -> Counts:
    g = torch.Generator().manual_seed(0)
    index = Exact().build(Vectors([torch.randn(20_000, 64, generator=g).half()]))
    query = torch.randn(1, 64, generator=g)

    def search() -> None:
        index.search(query, 20)

    search()
    return operators(search) | calls(search)


def rows_copied() -> AbstractContextManager[Any]:
    """Every block of stored rows is copied before it is looked at."""
    usual = Vectors.blocks

    def copied(self: Any, *arguments: Any):
        for start, rows, *more in usual(self, *arguments):
            yield start, rows.clone(), *more

    return patch.object(Vectors, "blocks", copied)


# --- attention, absorbed and fused --------------------------------------------------------------


def block() -> tuple[NeighborAttention, torch.Tensor, Any]:
    torch.manual_seed(0)
    module, x = NeighborAttention(64, 16, 4), torch.randn(2, 256, 64)
    with torch.no_grad():
        return module, x, absorb(torch.randn(2, 4, 16), module.weights)


@torch.no_grad()
def attention() -> Counts:
    module, x, tables = block()
    module.path = "absorbed"
    module(x, tables)
    return operators(lambda: module(x, tables)) | calls(lambda: module(x, tables))


@torch.no_grad()
def fused_attention() -> Counts:
    """With a double where the kernel is launched: what lies around the launch counts."""
    module, x, tables = block()
    launches = 0

    def double(x, *others):
        nonlocal launches
        launches += 1
        tables_of = proving._tables(*others[:3], 4, len(x))
        return absorbed.absorbed_attention(x, tables_of, others[3])

    with ExitStack() as stack:
        for name in ("TRITON", "INTERPRETED"):
            stack.enter_context(patch.object(fused, name, True))
        stack.enter_context(patch.object(kernel_calls, "forward", double))
        proving.TRIALS.forget()
        module(x, tables)  # the check
        launches = 0
        counts = calls(lambda: module(x, tables))
        assert module.explain(x, tables).path == "fused"
    proving.TRIALS.forget()
    return counts | {"launches": launches}


def checked_every_time() -> AbstractContextManager[Any]:
    """A check whose verdict is not kept."""
    usual = proving.TRIALS.run

    def forgetful(*arguments: Any) -> Any:
        proving.TRIALS.forget()
        return usual(*arguments)

    return patch.object(proving.TRIALS, "run", forgetful)


# --- a step of training -------------------------------------------------------------------------


def training_step() -> Counts:
    recipe, data = made()

    def train(steps: int) -> None:
        run(recipe, data, steps=steps)

    return per_step(operators, train) | per_step(calls, train)


def weights_copied() -> AbstractContextManager[Any]:
    """Each step copies all weights, needlessly and twice."""
    usual = EDMDenoiser.loss

    def copied(self: Any, *arguments: Any, **options: Any) -> Any:
        for _ in range(2):
            assert all(p.detach().clone() is not p for p in self.parameters())
        return usual(self, *arguments, **options)

    return patch.object(EDMDenoiser, "loss", copied)


# --- reading a row of a database ----------------------------------------------------------------


def database_read() -> Counts:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "pictures").mkdir()
        for i in range(12):
            Image.new("RGB", (40, 32), (20 * i, 90, 90)).save(folder / "pictures" / f"{i}.png")
        source = ImageFolder(folder / "pictures")
        build_database(folder / "d", source, HashingEncoder(), thumbnails=16, progress=False)
        database = open_database(folder / "d")
        database.image(0)

        def read() -> None:
            for row in (3, 7, 11):
                database.image(row)
                database.records([row])

        read()
        return operators(read) | calls(read) | opens(read)
    finally:
        shutil.rmtree(folder)


def opened_anew() -> AbstractContextManager[Any]:
    """A database that opens its thumbnails for each picture."""
    from retrodiff.databases.store import EmbeddingDatabase

    usual = EmbeddingDatabase.image

    def forgetful(self: Any, index: int) -> Any:
        self._thumbnails_of.cache_clear()
        return usual(self, index)

    return patch.object(EmbeddingDatabase, "image", forgetful)


PATHS = {
    "guided sampling step": HotPath(sampling_step, lambda: copying(ResBlock, "forward", 4)),
    "search query": HotPath(search_query, rows_copied),
    "attention forward": HotPath(attention, lambda: copying(NeighborAttention, "forward", 2)),
    "fused attention": HotPath(fused_attention, checked_every_time),
    "training step": HotPath(training_step, weights_copied),
    "database read": HotPath(database_read, opened_anew),
}


@pytest.mark.skipif(older_torch(), reason="the ceilings were counted with a later torch")
@pytest.mark.parametrize("name", PATHS)
def test_a_hot_path_stays_below_its_ceilings(name: str) -> None:
    told = over(PATHS[name].measured(), ceilings(name))
    assert not told, f"{name} became dearer (see the top of this file): {told}"


@pytest.mark.parametrize("name", PATHS)
def test_a_planted_fault_is_noticed(name: str) -> None:
    with PATHS[name].fault():
        assert over(PATHS[name].measured(), ceilings(name)), "its ceiling is too high"


def test_counts_are_the_same_each_time() -> None:
    assert attention() == attention()
    assert search_query() == search_query()
