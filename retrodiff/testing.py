"""Contract checks for components of your own: each raises AssertionError with the broken promise.

Every component that this library ships passes them in its own tests. Call one in yours::

    from retrodiff.testing import check_retriever
    check_retriever(MyRetriever())

Checks make their own small data where none is handed in, are deterministic and take well under a
second for a small component.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from retrodiff.components import modules
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Database,
    Denoiser,
    Encoder,
    Fingerprint,
    Generator,
    Guidance,
    Index,
    Neighbors,
    ProposalDistribution,
    Query,
    Randomness,
    Retriever,
    Sampler,
    Schedule,
    TextEncoder,
    Tokens,
    TrainableDenoiser,
    TrainableGenerator,
    member,
    unit,
)
from retrodiff.model.checks import missing_members


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(promise)


def _close(a: Tensor, b: Tensor, promise: str, tolerance: float = 1e-4) -> None:
    _require(a.shape == b.shape, f"{promise}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    worst = float((a - b).abs().max()) if a.numel() else 0.0
    scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
    _require(worst <= tolerance * scale, f"{promise}: off by {worst:.2g}")


def small_database(rows: int = 32, dim: int = 8, seed: int = 0) -> Database:
    """Random embeddings in memory, with a record each."""
    from retrodiff.databases import ArrayDatabase

    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, dim, generator=generator)
    fingerprint = Fingerprint(encoder="random", weights=str(seed), preprocessing="none", dim=dim)
    records = [{"file": f"{i}.png", "label": str(i % 4)} for i in range(rows)]
    return ArrayDatabase(embeddings, fingerprint, records)


def check_encoder(encoder: Encoder, channels: int = 3, size: int = 32) -> None:
    """Widths, batch invariance, determinism, no gradients, a stable fingerprint; text if it has it.

    Args:
        encoder: to be checked.
        channels: of the images it takes.
        size: of the images it is shown.
    """
    _has_members("encoder", encoder)
    images = torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kept = images.clone()
    embeddings = encoder.encode_image(images)
    _require(bool((images == kept).all()), "encode_image must not change its input")
    _require(
        tuple(embeddings.shape) == (5, encoder.dim),
        f"encode_image returns (b, dim) = (5, {encoder.dim}), got {tuple(embeddings.shape)}",
    )
    _require(embeddings.is_floating_point(), "embeddings are floating point")
    _require(not embeddings.requires_grad, "encode_image returns no gradients")
    _require(bool(embeddings.isfinite().all()), "embeddings are finite")
    _close(encoder.encode_image(images), embeddings, "encode_image is deterministic", 0)
    alone = torch.cat([encoder.encode_image(image[None]) for image in images])
    _close(alone, embeddings, "an image's embedding does not depend on its batch", 1e-3)
    _require(encoder.fingerprint == encoder.fingerprint, "the fingerprint is stable")
    _require(encoder.fingerprint.dim == encoder.dim, "fingerprint.dim is dim")
    _require(not encoder.fingerprint.rows, "an encoder's fingerprint has no rows")
    if hasattr(encoder, "encode_text"):
        encoder = cast("TextEncoder", encoder)
        prompts = ["a photo of a dog", "a photo of a cat", "two cats"]
        text = encoder.encode_text(prompts)
        _require(
            tuple(text.shape) == (3, encoder.dim),
            f"encode_text returns (b, dim) = (3, {encoder.dim}), got {tuple(text.shape)}",
        )
        one = encoder.encode_text(prompts[1:2])
        _close(one, text[1:2], "a prompt's embedding does not depend on its batch", 1e-3)


def check_database(database: Database) -> None:
    """Search finds the rows themselves, is sorted, agrees with brute force; records line up."""
    _require(isinstance(database, Database), "a database has the five members of the protocol")
    m, d = len(database), database.fingerprint.dim
    _require(m >= 4, "this check needs a database of at least 4 rows")
    rows = torch.linspace(0, m - 1, 4).long()
    embeddings = database.embeddings(rows)
    _require(tuple(embeddings.shape) == (4, d), "embeddings(indices (n,)) is (n, d)")
    nested = database.embeddings(rows.view(2, 2))
    _close(nested, embeddings.view(2, 2, d), "embeddings keeps the shape of the indices", 0)
    k = min(3, m)
    found = database.search(Query(embeddings), k)
    _check_neighbors(found, 4, k, m, d)
    _require(bool((found.similarity[:, 0] > 0.995).all()), "a row is its own nearest neighbor")
    _require(bool((found.similarity.diff(dim=-1) <= 1e-5).all()), "neighbors come nearest first")
    _close(
        database.embeddings(found.indices), found.embeddings, "neighbors carry the stored vectors"
    )
    cosine = torch.cosine_similarity(embeddings.unsqueeze(1), found.embeddings, dim=-1)
    _close(cosine, found.similarity, "similarity is the cosine to the query", 5e-3)
    records = database.records(rows)
    _require(len(records) == 4, "records gives one record per index")
    _require(
        records[::-1] == database.records(rows.flip(0)), "records follow the order of the indices"
    )
    _require(database.fingerprint == database.fingerprint, "the fingerprint is stable")
    _require(bool(database.fingerprint.rows), "a database's fingerprint has a hash of its rows")
    for bad in (m, -m - 1):
        try:
            database.embeddings(torch.tensor([bad]))
        except (IndexError, ValueError):
            continue
        raise AssertionError(f"embeddings([{bad}]) of {m} rows must be refused")
    try:
        database.search(Query(embeddings), m + 1)
    except ValueError as error:
        _require(str(m) in str(error), "the error for k > rows names the number of rows")
    else:
        raise AssertionError("k larger than the database must be refused")


def check_index(index: Index, embeddings: Tensor, recall: float = 0.9) -> None:
    """Shapes, order, distinct rows, and recall against brute force.

    Args:
        index: built from ``embeddings``.
        embeddings: (m, d).
        recall: the least share of true neighbors among the first ten.
    """
    k = min(10, len(embeddings))
    queries = embeddings[:: max(1, len(embeddings) // 16)][:16].float()
    similarity, indices = index.search(queries, k)
    shape = (len(queries), k)
    _require(
        tuple(indices.shape) == shape and tuple(similarity.shape) == shape,
        f"search returns (b, k) = {shape} similarities and indices",
    )
    _require(bool((similarity.diff(dim=-1) <= 1e-5).all()), "results come nearest first")
    distinct = all(len(set(row)) == k for row in indices.tolist())
    _require(distinct, "the k rows of a query are distinct")
    exact = (unit(queries) @ unit(embeddings.float()).T).topk(k).indices
    hits = (indices.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean()
    _require(float(hits) >= recall, f"recall@{k} is {float(hits):.3f}, below {recall}")


def check_retriever(retriever: Retriever, database: Database | None = None, k: int = 3) -> None:
    """Some k rows per query that exist, with their own vectors, for each query on its own.

    Args:
        retriever: to be checked.
        database: where it looks; None: a small random one.
        k: rows to ask for.
    """
    _require(isinstance(retriever, Retriever), "a retriever has retrieve(query, database, k)")
    database = database or small_database()
    d = database.fingerprint.dim
    queries = torch.randn(4, d, generator=torch.Generator().manual_seed(1))

    def ask(rows: slice) -> Neighbors:
        randomness = Randomness.of(2, range(4)[rows], "retrieval")
        query = Query(queries[rows], (), torch.tensor([-1, 0, 1, 2])[rows], randomness)
        return retriever.retrieve(query, database, k)

    found = ask(slice(None))
    _check_neighbors(found, 4, k, len(database), d)
    _close(
        database.embeddings(found.indices), found.embeddings, "neighbors carry the stored vectors"
    )
    distinct = all(len(set(row)) == k for row in found.indices.tolist())
    _require(distinct, "the k rows of a query are distinct")
    cosine = torch.cosine_similarity(queries.unsqueeze(1), found.embeddings, dim=-1)
    _close(found.similarity, cosine, "similarity is the cosine to the row's own query", 5e-3)
    again = ask(slice(None))
    _require(
        bool((again.indices == found.indices).all()),
        "the same query and generator give the same rows",
    )
    for row in range(4):
        alone = ask(slice(row, row + 1))
        _require(
            bool((alone.indices == found.indices[row : row + 1]).all()),
            "a query's rows do not depend on the other queries of the batch: draw with "
            "retrodiff.randomness.uniform(query.generator, shape)",
        )


def check_proposal(proposal: ProposalDistribution, database: Database) -> None:
    """Draws existing rows of positive weight, reproducibly, in proportion to the weights."""
    _require(isinstance(proposal, ProposalDistribution), "a proposal has support and propose")
    rows, weights = proposal.support(database)
    _require(rows.shape == weights.shape and rows.ndim == 1, "support is two vectors (n,)")
    _require(len(rows) > 0 and bool((weights > 0).all()), "all weights are positive")
    _require(len(rows.unique()) == len(rows), "rows are distinct")
    _require(bool(((rows >= 0) & (rows < len(database))).all()), "rows exist in the database")
    n = 4000
    query = proposal.propose(database, n, torch.Generator().manual_seed(0))
    again = proposal.propose(database, n, torch.Generator().manual_seed(0))
    _require(
        query.ids is not None and again.ids is not None and bool((query.ids == again.ids).all()),
        "propose is a function of its generator, and says which rows it drew",
    )
    assert query.ids is not None
    drawn_of = [
        proposal.propose(database, count, Randomness.of(0, range(count), "proposal")).ids
        for count in (1, 3)
    ]
    _require(
        all(ids is not None for ids in drawn_of) and bool((drawn_of[0] == drawn_of[1][:1]).all()),  # type: ignore[index]
        "the first query does not depend on how many are drawn: draw with "
        "retrodiff.randomness.uniform(generator, (n,))",
    )
    _close(query.embedding, database.embeddings(query.ids), "a pseudo-query is the row it names", 0)
    expected = torch.zeros(len(database), dtype=torch.float64)
    expected[rows] = weights.double() / weights.sum()
    drawn = torch.bincount(query.ids, minlength=len(database)).double() / n
    # Six standard deviations of a binomial: one seed, so this cannot flake.
    bound = 6 * (expected * (1 - expected) / n).sqrt() + 1e-9
    _require(
        bool(((drawn - expected).abs() <= bound).all()), "rows are drawn in proportion to weight"
    )


def check_conditioner(conditioner: Conditioner, dim: int = 8, k: int = 3) -> None:
    """Streams of the promised widths, determinism, a null of the same shape, drop in place.

    Where it has weights, gradients must reach all of them, and a copy must work on ``meta``.

    Args:
        conditioner: to be checked.
        dim: width of the embeddings it is given.
        k: neighbors it is given.
    """
    _has_members("conditioner", conditioner)
    generator = torch.Generator().manual_seed(0)
    query = Query(torch.randn(5, dim, generator=generator))
    embeddings = torch.randn(5, k, dim, generator=generator)
    neighbors = Neighbors(torch.arange(5 * k).view(5, k), torch.ones(5, k), embeddings)
    with torch.no_grad():
        context = conditioner.condition(query, neighbors)
        again = conditioner.condition(query, neighbors)
        part = conditioner.condition(query.rows(slice(0, 2)), neighbors.rows(slice(0, 2)))
        null = conditioner.null(context)
        dropped = conditioner.drop(context, torch.Generator().manual_seed(0))
    widths = {name: tokens.values.shape[-1] for name, tokens in context.streams.items()}
    _require(
        widths == conditioner.widths(dim),
        f"condition gives streams {widths}, but widths({dim}) says {conditioner.widths(dim)}",
    )
    _require(len(context) == 5, "the context has as many rows as the query")
    for name, tokens in context.streams.items():
        _close(again.streams[name].values, tokens.values, "condition is deterministic", 0)
        _close(
            part.streams[name].values,
            tokens.values[:2],
            "a row's tokens do not depend on the batch",
            1e-5,
        )
        for other, what in ((null, "null"), (dropped, "drop")):
            _require(
                other.streams[name].values.shape == tokens.values.shape,
                f"{what} keeps the shape of every stream",
            )
    width = member(conditioner, Conditioner, "vector_width")(dim)
    given = None if context.vector is None else context.vector.shape[-1]
    _require(given == width, f"condition gives a vector {given} wide, vector_width says {width}")
    _check_weights(conditioner, query, neighbors)
    for name, tokens in null.streams.items():
        if tokens.is_null:
            _require(
                not bool(tokens.values.any()), f"stream {name} is marked null, so it is all zero"
            )


def check_denoiser(denoiser: Denoiser, k: int = 3) -> None:
    """Shapes, batch invariance, branches of guidance, prepare, and the identity at no noise.

    Args:
        denoiser: to be checked.
        k: tokens per stream.
    """
    _has_members("denoiser", denoiser)
    generator = torch.Generator().manual_seed(0)
    shape = tuple(denoiser.shape)
    x = torch.randn(2, *shape, generator=generator)
    sigma = torch.tensor([0.5, 2.0])
    streams = {
        name: torch.randn(2, k, w, generator=generator) for name, w in denoiser.widths.items()
    }
    context = _context(streams)
    if isinstance(denoiser, nn.Module):
        denoiser.eval()
    with torch.no_grad():
        out = denoiser.denoise(x, sigma, context)
        _require(out.shape == x.shape, f"denoise returns {tuple(x.shape)}, got {tuple(out.shape)}")
        _require(bool(out.isfinite().all()), "denoise returns finite values")
        prepared = denoiser.prepare(context)
        _close(denoiser.denoise(x, sigma, prepared), out, "prepare changes no result", 1e-5)
        again = denoiser.denoise(x, sigma, prepared)
        _close(again, out, "a prepared context can be used again", 1e-5)
        one = _context({name: values[1:] for name, values in streams.items()})
        alone = denoiser.denoise(x[1:], sigma[1:], one)
        _close(alone, out[1:], "a sample does not depend on its batch", 1e-4)
        if streams:
            both = Context.cat([context, context.zeros()])
            branches = denoiser.denoise(x, sigma, denoiser.prepare(both))
            null = denoiser.denoise(x, sigma, context.zeros())
            _close(
                branches, torch.cat([out, null]), "branches of guidance equal separate calls", 1e-4
            )
        quiet = denoiser.denoise(x, torch.full((2,), 1e-4), context)
        _close(quiet, x, "without noise there is nothing to remove", 5e-2)
    if hasattr(denoiser, "loss") and hasattr(denoiser, "draw_sigmas"):
        denoiser = cast("TrainableDenoiser", denoiser)
        sigmas = denoiser.draw_sigmas(64, torch.Generator().manual_seed(0))
        _require(tuple(sigmas.shape) == (64,), "draw_sigmas returns (n,)")
        _require(bool((sigmas > 0).all()), "training noise levels are positive")
        loss = denoiser.loss(x, sigma, torch.randn(x.shape, generator=generator), context)
        _require(tuple(loss.shape) == (2,), "loss returns one value per sample")
        _require(bool((loss >= 0).all()), "a squared error is not negative")
    check_schedule(denoiser.schedule)


def check_schedule(schedule: Schedule) -> None:
    """Decreasing levels for any step count, and noise of the right size at the start."""
    for steps in (1, 2, 7, 50):
        sigmas = schedule.sigmas(steps)
        _require(tuple(sigmas.shape) == (steps + 1,), "sigmas(steps) is (steps + 1,)")
        _require(bool((sigmas.diff() < 0).all()), "noise levels decrease strictly")
        _require(float(sigmas[-1]) >= 0, "the last level is 0 or more")
        noise = torch.ones(1, 1, 2, 2)
        start = float(schedule.start(noise, sigmas)[0, 0, 0, 0])
        first = float(sigmas[0])
        _require(
            abs(start - first) < 1e-3 * first or abs(start**2 - first**2 - 1) < 1e-3 * start**2,
            "start gives noise of sigmas[0], with or without unit data",
        )
        finished = schedule.finish(noise, sigmas)
        _require(finished.shape == noise.shape, "finish keeps the shape")


def check_guidance(guidance: Guidance) -> None:
    """Equals the conditional branch where both branches agree; keeps shapes."""
    _has_members("guidance", guidance)
    from retrodiff.diffusion.schedule import Karras

    class Shifted(Denoiser):
        @property
        def shape(self) -> tuple[int, int, int]:
            return (1, 2, 2)

        @property
        def widths(self) -> dict[str, int]:
            return {"neighbors": 1}

        @property
        def schedule(self) -> Schedule:
            return Karras()

        def denoise(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
            shift = context.streams["neighbors"].values.mean((1, 2))
            x = x.repeat(len(shift) // len(x), 1, 1, 1)
            return x + shift.view(-1, 1, 1, 1)

    x, sigma = torch.zeros(2, 1, 2, 2), torch.ones(2)
    same = Context.of(torch.ones(2, 3, 1))
    out = guidance.guide(Shifted(), {"cond": same, "null": same})(x, sigma)
    _close(out, x + 1, "equal branches guide to that branch")


def check_sampler(sampler: Sampler, steps: int = 200) -> None:
    """From noise to the right Gaussian, by the closed-form denoiser of one; reports every step.

    Args:
        sampler: to be checked.
        steps: enough for its order.
    """
    _has_members("sampler", sampler)
    from retrodiff.diffusion.schedule import Karras

    mean, std = 0.7, 0.5

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + s2 * mean) / (std**2 + s2)

    sigmas = Karras(0.01, 50.0).sigmas(steps)
    noise = torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = noise * float(sigmas[0])
    seen: list[int] = []
    kept = x.clone()
    seeded = torch.Generator().manual_seed(1)
    out = sampler.sample(denoise, x, sigmas, seeded, lambda step, denoised: seen.append(step))
    _require(out.shape == x.shape, "sample keeps the shape")
    _require(bool((x == kept).all()), "sample must not change its input")
    _require(seen == list(range(steps)), "the callback is told every step in order")
    _require(
        abs(float(out.mean()) - mean) < 0.03, f"the mean is {mean}, got {float(out.mean()):.3f}"
    )
    _require(abs(float(out.std()) - std) < 0.03, f"the std is {std}, got {float(out.std()):.3f}")
    few = Karras(0.01, 50.0).sigmas(5)
    whole, alone = (
        sampler.sample(denoise, x[rows], few, Randomness.of(1, rows, "sampler"))
        for rows in ([0, 1, 2], [2])
    )
    _close(
        alone,
        whole[2:],
        "an image does not depend on the others of its batch: draw with "
        "retrodiff.randomness.normal_like(x, generator)",
    )
    for bad in ([1.0, 2.0], [1.0, 1.0], [float("nan"), 0.0], [1.0, -1.0]):
        try:
            sampler.sample(denoise, x[:2], torch.tensor(bad))
        except ValueError:
            continue
        raise AssertionError(f"sigmas {bad} must be refused")


def check_generator(generator: Generator, k: int = 3, steps: int = 2) -> None:
    """Shapes, determinism, an image that depends on its own row only; a loss where it has one.

    Args:
        generator: to be checked.
        k: tokens per stream.
        steps: to generate with.
    """
    _has_members("generator", generator)
    shape, seeded = tuple(generator.shape), torch.Generator().manual_seed(0)
    width = member(generator, Generator, "vector_width")
    context = Context(
        {
            name: Tokens(torch.randn(3, k, w, generator=seeded))
            for name, w in generator.widths.items()
        },
        None if width is None else torch.randn(3, width, generator=seeded),
    )
    noise = torch.randn(3, *shape, generator=seeded)

    def make(rows: list[int]) -> Tensor:
        part = Context(
            {name: Tokens(t.values[rows]) for name, t in context.streams.items()},
            None if context.vector is None else context.vector[rows],
        )
        randomness = Randomness.of(0, rows, "sampler")
        return generator.generate(
            part, part.zeros(), noise[rows], steps=steps, generator=randomness
        )

    with torch.no_grad():
        latents = make([0, 1, 2])
        _require(tuple(latents.shape) == (3, *shape), f"generate returns (b, {shape})")
        _require(bool(latents.isfinite().all()), "latents are finite")
        _close(make([0, 1, 2]), latents, "generate is a function of its arguments", 0)
        _close(make([2]), latents[2:], "an image does not depend on the others of its batch", 1e-3)
        images = generator.decode(latents)
        _require(len(images) == 3 and images.ndim == 4, "decode returns (b, c, h, w)")
    if hasattr(generator, "loss"):
        loss = cast("TrainableGenerator", generator).loss(images, context)
        _require(tuple(loss.shape) == (3,), "loss returns one value per image")


def check_autoencoder(autoencoder: Autoencoder, shape: tuple[int, int, int]) -> None:
    """Latents keep the batch, decode returns the image's shape, both deterministic; dtype, device.

    Args:
        autoencoder: to be checked.
        shape: (c, h, w) of an image.
    """
    _require(
        isinstance(autoencoder.dtype, torch.dtype) and isinstance(autoencoder.device, torch.device),
        "an autoencoder has dtype and device; subclassing Autoencoder gives the defaults",
    )
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(autoencoder.device)
    with torch.no_grad():
        latents = autoencoder.encode(images)
        decoded = autoencoder.decode(latents)
        _require(len(latents) == 2 and latents.ndim == 4, "encode returns (b, c, h, w)")
        _require(decoded.shape == images.shape, "decode returns the shape of the images")
        _close(autoencoder.encode(images), latents, "encode is deterministic", 0)
        _close(autoencoder.encode(images[1:]), latents[1:], "encode is per image", 1e-4)


def _has_members(role: str, part: object) -> None:
    missing = missing_members(role, part)
    _require(not missing, f"a {role} has {', '.join(missing)}")


def _check_weights(conditioner: Conditioner, query: Query, neighbors: Neighbors) -> None:
    """Gradients reach every weight through condition and null; all of them move."""
    found = modules(conditioner)
    weights = [p for module in found for p in module.parameters() if p.requires_grad]
    if not weights:
        return
    context = conditioner.condition(query, neighbors)
    null = conditioner.null(context)
    parts = [*context.streams.values(), *null.streams.values()]
    total = torch.stack([t.values.sum() for t in parts]).sum()
    for vector in (context.vector, null.vector):
        total = total if vector is None else total + vector.sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    _require(all(g is not None for g in gradients), "every weight takes part in condition or null")
    moved = copy.deepcopy(conditioner)
    for module in modules(moved):
        module.to("meta")
    there = moved.condition(Query(query.embedding.to("meta")), neighbors.to("meta"))
    _require(
        all(t.values.device.type == "meta" for t in there.streams.values()),
        "a conditioner that was moved gives contexts on its new device",
    )


def _context(streams: dict[str, Tensor]) -> Context:
    return Context({name: Tokens(values) for name, values in streams.items()})


def _check_neighbors(found: Neighbors, b: int, k: int, rows: int, d: int) -> None:
    _require(
        tuple(found.indices.shape) == (b, k) and tuple(found.similarity.shape) == (b, k),
        f"indices and similarity are (b, k) = {(b, k)}, got {tuple(found.indices.shape)}",
    )
    _require(
        tuple(found.embeddings.shape) == (b, k, d),
        f"embeddings are (b, k, d) = {(b, k, d)}, got {tuple(found.embeddings.shape)}",
    )
    _require(
        bool(((found.indices >= 0) & (found.indices < rows)).all()),
        f"indices lie within the database's {rows} rows",
    )
