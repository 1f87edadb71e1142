"""A small model trained on captions and neighbors, dropped separately, and asked in every mode.

Pictures of two columns: what they show is the shade of the left one, their style that of the
right one. A caption says what a picture shows and nothing of its style.
"""

import pytest
import torch

from retrodiff import Builder, Model
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    PromptAndNeighbors,
)
from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.networks.dit import DiT
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, Uniform
from retrodiff.training import Objective, TrainingSet

N, PER_PROMPT = 128, 32
SHOWN, STYLES = ["dark", "light"], ["flat", "oil"]


class Shades(TextEncoder):
    """Sees the shade of the left column, and a little of the right one; reads the left one."""

    dim = 4
    fingerprint = Fingerprint(encoder="shades", weights="", preprocessing="none", dim=4)

    def encode_image(self, images):
        left, right = images[:, 0, :, 0].mean(1), images[:, 0, :, 1].mean(1)
        light = (left >= 0).float()
        return torch.stack([2 - 2 * light, 2 * light, right.sign(), 0.1 * (left + right)], 1)

    def encode_text(self, prompts):
        return torch.tensor([[2.0 * ("dark" in p), 2.0 * ("light" in p), 0, 0] for p in prompts])


@pytest.fixture(scope="module")
def shown():
    return torch.arange(N) % 2


@pytest.fixture(scope="module")
def images(shown):
    style = torch.arange(N) // 2 % 2
    noise = torch.randn(N, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    columns = torch.stack([shown, style], 1).view(N, 1, 1, 2) * 1.4 - 0.7
    return (columns + 0.1 * noise).clamp(-1, 1).expand(-1, -1, 2, -1)


@pytest.fixture(scope="module")
def database(images):
    records = [{"style": STYLES[i // 2 % 2]} for i in range(N)]
    return ArrayDatabase(Shades().encode_image(images), Shades.fingerprint, records)


@pytest.fixture(scope="module")
def model(images, shown, database):
    retriever, quiet = ExcludeSelf(NearestNeighbors()), {"progress": False}
    with pytest.warns(UserWarning, match="ExcludeDuplicates"):  # many pictures are nearly the same
        data = TrainingSet.of(images, Shades(), database, retriever, 3, **quiet)
    modes = {"neighbors": 0.4, "text+neighbors": 0.3, "text": 0.3}
    data = (
        data.captioned(
            [SHOWN[i] for i in shown],
            Shades(),
            modes=modes,
            searched_by="caption",
            neighbors_by_caption=0.3,
            **quiet,
        )
        .grouped("style", 0.5, **quiet)
        .jittered()
    )
    torch.manual_seed(0)
    widths = {"query": 4, "neighbors": 4}
    network = DiT(shape=(1, 2, 2), patch=2, width=64, depth=2, heads=2, widths=widths)
    model = (
        Builder()
        .encoder(Shades())
        .database(database)
        .proposal(Uniform())
        .conditioner(Dropped(PromptAndNeighbors("raw"), 0.1))
        .denoiser(EDMDenoiser(network))
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(1.0))
        .defaults(k=3, steps=10)
        .build()
    )
    objective, steps = Objective(model), 320
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2)
    randomness = torch.Generator().manual_seed(0)
    for step, batch in enumerate(data.batches(0, steps, batch_size=64, seed=0, k=3)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        objective(*batch, randomness).mean().backward()
        optimizer.step()
    objective.eval()
    model.denoiser.untrained = False
    return model


def asked(model, **request):
    """Share of samples that show what was asked, and share of the style oil."""
    images = model.sample(seed=1, progress=False, **request).images
    light = (images[:, 0, :, 0].mean(1) > 0).long()
    oil = (images[:, 0, :, 1].mean(1) > 0).float()
    return light, float(oil.mean())


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", ["text", "text+neighbors", "neighbors"])
def test_prompts_are_drawn_in_every_mode(model, mode, k):
    light, _ = asked(model, prompts=SHOWN * PER_PROMPT, mode=mode, k=k)
    assert float((light == torch.arange(2 * PER_PROMPT) % 2).float().mean()) > 0.9


def test_images_and_classes_are_drawn(model, images, shown):
    light, _ = asked(model, images=images[:64])
    assert float((light == shown[:64]).float().mean()) > 0.85
    light, _ = asked(model, classes=["light"] * 32)
    assert float(light.float().mean()) > 0.9


def test_style_follows_the_database_where_neighbors_are_shown(model, database):
    oil = {
        style: {
            **{
                mode: asked(model.replace(database=part), prompts=SHOWN * PER_PROMPT, mode=mode)[1]
                for mode in ("text", "text+neighbors", "neighbors")
            },
            "unconditional": asked(model.replace(database=part, proposal=Uniform()), n=64)[1],
        }
        for style in STYLES
        for part in [database.where(f"style == '{style}'")]
    }
    for mode in ("neighbors", "unconditional"):
        assert oil["flat"][mode] < 0.2
        assert oil["oil"][mode] > 0.8
    # Half of the trained sets beside a caption were of mixed styles.
    assert oil["oil"]["text+neighbors"] > oil["flat"]["text+neighbors"] + 0.3
    assert oil["oil"]["text"] == oil["flat"]["text"]  # a prompt alone asks no database


def test_saved_and_loaded(model, database, tmp_path):
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m", encoder=Shades(), database=database)
    one, other = (m.sample(prompts=SHOWN, seed=1, progress=False).images for m in (model, again))
    assert torch.equal(one, other)
