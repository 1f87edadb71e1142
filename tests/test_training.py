"""Training: it learns, resumes exactly, averages as torch-ema does, and says what is wrong."""

import math

import pytest
import torch
from parts import HashingEncoder, small_network
from torch import nn

from retrodiff.interfaces import Query
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, neighbor_table
from retrodiff.testing import small_database
from retrodiff.training import NamedEMA, Objective, TrainingSet, constant, cosine, fit, optimize
from retrodiff.training.contrastive import fit_clip
from retrodiff.training.seeds import derived


@pytest.fixture
def data(encoder, database):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(20, 1, 1, 1, generator=generator) * 2 - 1).expand(-1, 1, 8, 8)
    return TrainingSet.of(images, encoder, database, NearestNeighbors(), 4, progress=False)


def run(recipe, data, **options):
    torch.manual_seed(0)
    network = small_network()
    model = recipe.build()
    model.denoiser.network.load_state_dict(network.state_dict())
    settings = {"steps": 12, "batch_size": 8, "lr": constant(1e-2), "ema": 0.9, "progress": False}
    return fit(model, data, **{**settings, **options})


def weights(model):
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_the_loss_falls(recipe, data):
    fitted = run(recipe, data, steps=150)
    assert float(fitted.losses[-20:].mean()) < 0.7 * float(fitted.losses[:20].mean())


def test_the_same_seed_gives_the_same_weights(recipe, data):
    first, again = run(recipe, data), run(recipe, data)
    other = run(recipe, data, seed=1)
    assert same(weights(first.model), weights(again.model))
    assert not same(weights(first.model), weights(other.model))


@pytest.mark.parametrize("killed_at", [3, 7])
def test_an_interrupted_run_resumes_to_the_same_weights(
    recipe, data, tmp_path, killed_at, monkeypatch
):
    whole = run(recipe, data)
    checkpoint = tmp_path / "state.safetensors"
    real = TrainingSet.rows_at

    def killed(self, step, batch_size, seed):
        if step == killed_at:
            raise KeyboardInterrupt
        return real(self, step, batch_size, seed)

    monkeypatch.setattr(TrainingSet, "rows_at", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, checkpoint=checkpoint)
    monkeypatch.setattr(TrainingSet, "rows_at", real)
    resumed = run(recipe, data, checkpoint=checkpoint, resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert torch.equal(whole.losses, resumed.losses)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_kill_between_checkpoints_loses_only_those_steps(recipe, data, tmp_path, monkeypatch):
    """As after kill -9: nothing is saved at the end, the last checkpoint is all there is."""
    whole = run(recipe, data)
    checkpoint = tmp_path / "state.safetensors"
    real = TrainingSet.rows_at

    def killed(self, step, batch_size, seed):
        if step == 9:
            raise RuntimeError("killed")
        return real(self, step, batch_size, seed)

    monkeypatch.setattr(TrainingSet, "rows_at", killed)
    with pytest.raises(RuntimeError, match=r"killed"):
        run(recipe, data, checkpoint=checkpoint, checkpoint_every=4)
    monkeypatch.setattr(TrainingSet, "rows_at", real)
    resumed = run(recipe, data, checkpoint=checkpoint, checkpoint_every=4, resume=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_a_checkpoint_of_another_run_is_refused(recipe, data, tmp_path):
    checkpoint = tmp_path / "state.safetensors"
    run(recipe, data, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"steps=12, seed=0.*steps=13, seed=0"):
        run(recipe, data, steps=13, checkpoint=checkpoint, resume=True)


def test_snapshots_are_the_average_at_their_step(recipe, data):
    full = run(recipe, data, snapshots=[5])
    short = run(recipe, data, steps=5, lr=constant(1e-2))
    assert same(weights(full.snapshots[5]), weights(short.model))
    assert not same(weights(full.model), weights(full.snapshots[5]))


def test_the_average_is_torch_emas_and_saved_by_name():
    from torch_ema import ExponentialMovingAverage

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    mine, theirs = NamedEMA(module, 0.7), ExponentialMovingAverage(module.parameters(), 0.7)
    for _ in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        mine.update()
        theirs.update()
    state = mine.state()
    assert set(state) == {
        "updates",
        "average.0.weight",
        "average.0.bias",
        "average.1.weight",
        "average.1.bias",
    }
    for (name, _), shadow in zip(module.named_parameters(), theirs.shadow_params, strict=True):
        assert torch.equal(state[f"average.{name}"], shadow)
    fresh = NamedEMA(module, 0.7)
    fresh.load({key: state[key] for key in reversed(state)})
    assert all(torch.equal(fresh.state()[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"average.2.weight"):
        fresh.load({**state, "average.2.weight": torch.zeros(1)})


def test_every_image_is_seen_once_per_epoch(data):
    rows = torch.cat([data.rows_at(step, 8, 0) for step in range(5)])
    assert sorted(rows[:20].tolist()) == list(range(20))
    assert sorted(rows[20:40].tolist()) == list(range(20))
    assert rows[:20].tolist() != rows[20:40].tolist()


def test_a_batch_carries_its_own_neighbors(data, database, encoder):
    images, query, neighbors = data.batch(torch.tensor([3, 7]), 2)
    assert torch.equal(query.embedding, encoder.encode_image(images))
    expected = database.search(query, 2)
    assert torch.equal(neighbors.indices, expected.indices)
    assert torch.equal(neighbors.embeddings, expected.embeddings)


def test_training_images_in_the_database_can_leave_themselves_out(encoder, database):
    images = torch.rand(5, 1, 8, 8)
    ids = torch.tensor([0, 1, 2, 3, -1])
    data = TrainingSet.of(
        images, encoder, database, ExcludeSelf(NearestNeighbors()), 4, ids=ids, progress=False
    )
    assert not bool((data.table == ids[:, None]).any())


class CountingImages:
    """Images that count how many were read."""

    def __init__(self, images):
        self.images, self.read = images, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        self.read += len(rows)
        return self.images[rows]


def test_a_training_set_with_a_cache_is_mapped_and_made_once(encoder, database, tmp_path):
    images = CountingImages(torch.rand(20, 1, 8, 8) * 2 - 1)

    def made(encoder=encoder, database=database, k=4, images=images):
        return TrainingSet.of(
            images,
            encoder,
            database,
            NearestNeighbors(),
            k,
            cache=tmp_path / "cache",
            batch_size=8,
            progress=False,
        )

    first = made()
    plain = TrainingSet.of(
        images.images, encoder, database, NearestNeighbors(), 4, progress=False, batch_size=8
    )
    assert torch.equal(first.embeddings, plain.embeddings)
    assert torch.equal(first.table, plain.table)
    files = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert files == ["embeddings.safetensors", "neighbors.safetensors"]
    kept = [(tmp_path / "cache" / name).read_bytes() for name in files]
    images.read = 0
    again = made()
    assert images.read == 16  # some are looked at, to see that they are the same; none is encoded
    rows = torch.tensor([3, 7])
    assert torch.equal(first.batch(rows)[1].embedding, again.batch(rows)[1].embedding)
    assert torch.equal(first.batch(rows)[2].indices, again.batch(rows)[2].indices)
    for change, message in (
        ({"encoder": HashingEncoder(seed=1)}, "encoder.weights"),
        ({"images": CountingImages(images.images + 1)}, "images"),
        ({"database": small_database(rows=40, dim=8, seed=1)}, "database"),
        ({"k": 5}, "k='4', now k='5'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**change)
    assert [(tmp_path / "cache" / name).read_bytes() for name in files] == kept
    whole = kept[0]
    (tmp_path / "cache" / files[0]).unlink()
    (tmp_path / "cache" / f"{files[0]}.partial").write_bytes(whole[:-100])
    made()  # continues where it was killed
    assert (tmp_path / "cache" / files[0]).read_bytes() == whole


def test_training_on_neighbors_of_regions(model, database):
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    embeddings = torch.randn(6, 4, 8)
    table = neighbor_table(Query(embeddings), database, 4, NearestNeighbors())
    data = TrainingSet(images, embeddings, table, database)
    batch, query, neighbors = data.batch(torch.tensor([1, 4]), 3)
    expected = database.search(query, 3)
    assert neighbors.indices.shape == (2, 4, 3)
    assert torch.equal(neighbors.indices, expected.indices)
    torch.testing.assert_close(neighbors.similarity, expected.similarity, rtol=0, atol=1e-3)
    losses = Objective(model)(batch, query, neighbors, torch.Generator().manual_seed(0))
    losses.sum().backward()
    assert all(p.grad is not None for p in model.denoiser.parameters())


def test_misfit_data_is_refused(database):
    with pytest.raises(ValueError, match=r"5 images, 4 embeddings and 5 rows"):
        TrainingSet(torch.zeros(5, 1, 8, 8), torch.zeros(4, 8), torch.zeros(5, 2), database)


def test_nan_stops_training_with_advice():
    module = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match=r"nan at step 0: lower the learning rate"):
        optimize(
            module,
            lambda step, generator: module.weight.sum() * math.nan,
            steps=2,
            lr=constant(1e-3),
            progress=False,
        )


def test_learning_rates():
    warm = constant(1.0, warmup=4)
    assert [warm(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    half = cosine(2.0, 10)
    assert half(0) == 2.0
    assert half(5) == pytest.approx(1.0)
    assert half(10) == pytest.approx(0.0)


def test_randomness_depends_on_seed_and_step_only():
    a, b = (torch.rand(3, generator=at_step(1, 5)) for _ in range(2))
    assert torch.equal(a, b)
    others = [at_step(1, 6), at_step(2, 5), at_step(0, 0)]
    assert all(not torch.equal(a, torch.rand(3, generator=g)) for g in others)


def test_the_objective_is_a_module_with_the_trained_parameters(model):
    objective = Objective(model)
    names = {name for name, _ in objective.named_parameters()}
    assert names == {f"denoiser.{name}" for name, _ in model.denoiser.named_parameters()}
    images = torch.rand(3, 1, 8, 8)
    query = Query(HashingEncoder().encode_image(images))
    neighbors = model.database.search(query, 4)
    loss = objective(images, query, neighbors, torch.Generator().manual_seed(0))
    assert loss.shape == (3,)
    loss.sum().backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_a_small_clip_learns_to_name_colors():
    from retrodiff.encoders import CLIPEncoder

    torch.manual_seed(0)
    encoder = CLIPEncoder.from_config(
        {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 8,
                "patch_size": 4,
                "width": 32,
                "head_width": 16,
                "layers": 1,
            },
            "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
        }
    )
    names = ["red", "green", "blue"]
    which = torch.arange(60) % 3
    images = torch.full((60, 3, 8, 8), -1.0)
    images[torch.arange(60), which] = 1.0
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    fit_clip(
        encoder,
        images,
        [names[i] for i in which.tolist()],
        steps=25,
        batch_size=16,
        lr=constant(3e-3),
        progress=False,
    )
    image, text = encoder.encode_image(images), encoder.encode_text(names)
    guess = torch.cosine_similarity(image[:, None], text[None], dim=-1).argmax(1)
    assert float((guess == which).float().mean()) == 1.0
    with pytest.raises(ValueError, match=r"60 images and 1 captions"):
        fit_clip(encoder, images, ["red"], steps=1, batch_size=2, lr=constant(1e-3))
