"""Training: it learns, resumes exactly, averages as torch-ema does, and says what is wrong."""

import copy
import math

import pytest
import torch
from parts import HashingEncoder
from torch import nn
from trainings import run, same, small_data, weights

from retrodiff.interfaces import Query
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, neighbor_table
from retrodiff.testing import small_database
from retrodiff.training import NamedEMA, Objective, TrainingSet, constant, cosine, fit, optimize
from retrodiff.training.contrastive import fit_clip
from retrodiff.training.seeds import derived


@pytest.fixture
def data(encoder, database):
    return small_data(database, encoder)


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
    images = torch.rand(5, 1, 8, 8) * 2 - 1
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
    assert images.read == 20  # some are looked at, to see that they are the same; none is encoded
    rows = torch.tensor([3, 7])
    assert torch.equal(first.batch(rows)[1].embedding, again.batch(rows)[1].embedding)
    assert torch.equal(first.batch(rows)[2].indices, again.batch(rows)[2].indices)
    for change, message in (
        ({"encoder": HashingEncoder(seed=1)}, "weights='1' against weights='0'"),
        ({"images": CountingImages(-images.images)}, "images"),
        ({"database": database.subset(torch.arange(39))}, "database"),
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


def test_randomness_depends_on_seed_use_and_number_only():
    a, b = (torch.rand(3, generator=derived(1, "step", 5)) for _ in range(2))
    assert torch.equal(a, b)
    others = [derived(1, "step", 6), derived(2, "step", 5), derived(1, "epoch", 5)]
    assert all(not torch.equal(a, torch.rand(3, generator=g)) for g in others)


def test_neighboring_seeds_share_no_randomness(data):
    """Seed 1's first epoch was seed 0's second one."""
    drawn = {derived(seed, "epoch", n).initial_seed() for seed in range(64) for n in range(64)}
    assert len(drawn) == 64 * 64
    first = data.rows_at(0, 20, seed=1).tolist()
    assert all(first != data.rows_at(step, 20, seed=0).tolist() for step in range(4))


def test_the_objective_is_a_module_with_the_trained_parameters(model):
    objective = Objective(model)
    names = {name for name, _ in objective.named_parameters()}
    assert names == {f"denoiser.{name}" for name, _ in model.denoiser.named_parameters()}
    images = torch.rand(3, 1, 8, 8) * 2 - 1
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
    images = images.clamp(-1, 1)  # pixels further out are refused
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


def test_the_model_that_is_given_stays_as_it_is(recipe, data):
    model = recipe.build()
    before, mode = copy.deepcopy(weights(model)), model.denoiser.training
    fitted = fit(model, data, steps=3, batch_size=8, lr=0.01, ema=0.5, progress=False)
    assert same(weights(model), before)
    assert model.denoiser.training == mode
    assert all(p.grad is None for p in model.denoiser.parameters())
    assert not same(weights(fitted.model), before)
    assert fitted.model.denoiser is not model.denoiser
    assert fitted.model.encoder is model.encoder
    assert fitted.model.database is model.database


def test_four_models_of_one_recipe_learn_the_same(recipe, data):
    losses = [
        fit(recipe.build(), data, steps=4, batch_size=8, lr=0.01, progress=False).losses
        for _ in range(4)
    ]
    assert all(torch.equal(losses[0], other) for other in losses[1:])


def test_snapshots_do_not_change_the_training(recipe, data):
    plain, watched = run(recipe, data), run(recipe, data, snapshots=[1, 2, 3, 7])
    assert torch.equal(plain.losses, watched.losses)
    assert same(weights(plain.model), weights(watched.model))


def test_numpy_numbers_are_taken(recipe, data):
    import numpy as np

    numbers = {"steps": np.int64(12), "batch_size": np.int32(8), "seed": np.uint8(0)}
    numbers |= {"ema": np.float32(0.9), "weight_decay": np.float64(0), "lr": np.float64(1e-2)}
    other = run(recipe, data, **numbers, snapshots=[np.int64(2)])
    assert torch.allclose(run(recipe, data).losses, other.losses, atol=1e-5)
    assert list(other.snapshots) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": True}, "steps=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"seed": -1}, "seed=-1"),
        ({"ema": 1.5}, "ema=1.5"),
        ({"ema": math.nan}, "ema=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": math.inf}, "weight_decay=inf"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": -1e-3}, "lr=-0.001"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"lr": lambda step: math.nan if step == 2 else 1e-3}, "lr at step 2=nan"),
        ({"snapshots": [0]}, "snapshots=0"),
        ({"snapshots": [99]}, "snapshots=99 comes after the last step, steps=12"),
    ],
)
def test_wrong_numbers_are_refused_by_name(recipe, data, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as refused:
        run(recipe, data, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(math.nan),
        lambda: constant(1e-3, warmup=-1),
        lambda: cosine(1e-3, 0),
        lambda: cosine(math.inf, 10),
    ],
)
def test_wrong_learning_rates_are_refused_where_they_are_made(make):
    with pytest.raises(ValueError, match=r"give a"):
        make()


def test_a_cosine_does_not_rise_again_after_its_end():
    assert cosine(1.0, 10)(15) == cosine(1.0, 10)(10) == pytest.approx(0)


def test_a_gradient_that_is_not_finite_stops_before_it_is_taken():
    module = nn.Linear(1, 1)
    before = module.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"gradient is nan at step 0"):
        optimize(
            module,
            lambda step, generator: (module.weight * 0).abs().sum().sqrt(),
            steps=2,
            lr=1e-3,
            progress=False,
        )
    assert torch.equal(module.weight, before)


def test_more_neighbors_than_were_found_are_refused(recipe, data):
    import dataclasses

    with pytest.raises(ValueError, match=r"model's k=9, but the training set keeps 4 .*k=9"):
        fit(
            dataclasses.replace(recipe.build(), k=9),
            data,
            steps=1,
            batch_size=2,
            lr=0.1,
            progress=False,
        )


def test_data_of_another_encoder_than_the_models_are_refused(recipe, encoder):
    other = small_database(rows=40, dim=8, seed=1)
    with pytest.raises(ValueError, match=r"weights='0' against weights='1'"):
        run(recipe, small_data(other, HashingEncoder(seed=1)))


def test_targets_and_latents_are_exact_under_autocast(recipe, data):
    """Autocast may change what the network computes, not what it is asked for."""
    model = recipe.build()
    batch, query, neighbors = data.batch(torch.arange(4))
    sigma = torch.full((4,), 0.002)
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))
    fixed = {"sigma": sigma, "noise": noise, "drop": False}
    exact = model.loss(batch, query, neighbors, **fixed)
    with torch.autocast("cpu", torch.bfloat16):
        loose = model.loss(batch, query, neighbors, **fixed)
    assert loose.dtype == torch.float32
    torch.testing.assert_close(loose, exact, rtol=0.02, atol=0)
