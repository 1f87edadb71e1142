"""Contract checks of encoders, databases, indexes, retrievers and proposal distributions."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from retrodiff.interfaces import (
    Database,
    Encoder,
    Fingerprint,
    Index,
    Neighbors,
    ProposalDistribution,
    Query,
    Randomness,
    Retriever,
    TextEncoder,
    unit,
)
from retrodiff.testing.promises import close, has_members, require


def small_database(rows: int = 32, dim: int = 8, seed: int = 0) -> Database:
    """Random embeddings in memory, with a record each.

    Args:
        rows: m.
        dim: width d of an embedding.
        seed: of the embeddings.
    """
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
    has_members("encoder", encoder)
    images = torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kept = images.clone()
    embeddings = encoder.encode_image(images)
    require(bool((images == kept).all()), "encode_image must not change its input")
    require(
        tuple(embeddings.shape) == (5, encoder.dim),
        f"encode_image returns (b, dim) = (5, {encoder.dim}), got {tuple(embeddings.shape)}",
    )
    require(embeddings.is_floating_point(), "embeddings are floating point")
    require(not embeddings.requires_grad, "encode_image returns no gradients")
    require(bool(embeddings.isfinite().all()), "embeddings are finite")
    close(encoder.encode_image(images), embeddings, "encode_image is deterministic", 0)
    alone = torch.cat([encoder.encode_image(image[None]) for image in images])
    close(alone, embeddings, "an image's embedding does not depend on its batch", 1e-3)
    require(encoder.fingerprint == encoder.fingerprint, "the fingerprint is stable")
    require(encoder.fingerprint.dim == encoder.dim, "fingerprint.dim is dim")
    require(not encoder.fingerprint.rows, "an encoder's fingerprint has no rows")
    if hasattr(encoder, "encode_text"):
        encoder = cast("TextEncoder", encoder)
        prompts = ["a photo of a dog", "a photo of a cat", "two cats"]
        text = encoder.encode_text(prompts)
        require(
            tuple(text.shape) == (3, encoder.dim),
            f"encode_text returns (b, dim) = (3, {encoder.dim}), got {tuple(text.shape)}",
        )
        one = encoder.encode_text(prompts[1:2])
        close(one, text[1:2], "a prompt's embedding does not depend on its batch", 1e-3)


def check_database(database: Database) -> None:
    """Search finds the rows themselves, is sorted, agrees with brute force; records line up."""
    require(isinstance(database, Database), "a database has the five members of the protocol")
    m, d = len(database), database.fingerprint.dim
    require(m >= 4, "this check needs a database of at least 4 rows")
    rows = torch.linspace(0, m - 1, 4).long()
    embeddings = database.embeddings(rows)
    require(tuple(embeddings.shape) == (4, d), "embeddings(indices (n,)) is (n, d)")
    nested = database.embeddings(rows.view(2, 2))
    close(nested, embeddings.view(2, 2, d), "embeddings keeps the shape of the indices", 0)
    k = min(3, m)
    found = database.search(Query(embeddings), k)
    _check_neighbors(found, 4, k, m, d)
    require(bool((found.similarity[:, 0] > 0.995).all()), "a row is its own nearest neighbor")
    require(bool((found.similarity.diff(dim=-1) <= 1e-5).all()), "neighbors come nearest first")
    close(
        database.embeddings(found.indices), found.embeddings, "neighbors carry the stored vectors"
    )
    cosine = torch.cosine_similarity(embeddings.unsqueeze(1), found.embeddings, dim=-1)
    close(cosine, found.similarity, "similarity is the cosine to the query", 5e-3)
    records = database.records(rows)
    require(len(records) == 4, "records gives one record per index")
    require(
        records[::-1] == database.records(rows.flip(0)), "records follow the order of the indices"
    )
    require(database.fingerprint == database.fingerprint, "the fingerprint is stable")
    require(bool(database.fingerprint.rows), "a database's fingerprint has a hash of its rows")
    for bad in (m, -m - 1):
        try:
            database.embeddings(torch.tensor([bad]))
        except (IndexError, ValueError):
            continue
        raise AssertionError(f"embeddings([{bad}]) of {m} rows must be refused")
    try:
        database.search(Query(embeddings), m + 1)
    except ValueError as error:
        require(str(m) in str(error), "the error for k > rows names the number of rows")
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
    require(
        tuple(indices.shape) == shape and tuple(similarity.shape) == shape,
        f"search returns (b, k) = {shape} similarities and indices",
    )
    require(bool((similarity.diff(dim=-1) <= 1e-5).all()), "results come nearest first")
    distinct = all(len(set(row)) == k for row in indices.tolist())
    require(distinct, "the k rows of a query are distinct")
    exact = (unit(queries) @ unit(embeddings.float()).T).topk(k).indices
    hits = (indices.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean()
    require(float(hits) >= recall, f"recall@{k} is {float(hits):.3f}, below {recall}")


def check_retriever(retriever: Retriever, database: Database | None = None, k: int = 3) -> None:
    """Some k rows per query that exist, with their own vectors, for each query on its own.

    Args:
        retriever: to be checked.
        database: where it looks; None: a small random one.
        k: rows to ask for.
    """
    require(isinstance(retriever, Retriever), "a retriever has retrieve(query, database, k)")
    database = database or small_database()
    d = database.fingerprint.dim
    queries = torch.randn(4, d, generator=torch.Generator().manual_seed(1))

    def ask(rows: slice) -> Neighbors:
        randomness = Randomness.of(2, range(4)[rows], "retrieval")
        query = Query(queries[rows], (), torch.tensor([-1, 0, 1, 2])[rows], randomness)
        return retriever.retrieve(query, database, k)

    found = ask(slice(None))
    _check_neighbors(found, 4, k, len(database), d)
    close(
        database.embeddings(found.indices), found.embeddings, "neighbors carry the stored vectors"
    )
    distinct = all(len(set(row)) == k for row in found.indices.tolist())
    require(distinct, "the k rows of a query are distinct")
    cosine = torch.cosine_similarity(queries.unsqueeze(1), found.embeddings, dim=-1)
    close(found.similarity, cosine, "similarity is the cosine to the row's own query", 5e-3)
    again = ask(slice(None))
    require(
        bool((again.indices == found.indices).all()),
        "the same query and generator give the same rows",
    )
    for row in range(4):
        alone = ask(slice(row, row + 1))
        require(
            bool((alone.indices == found.indices[row : row + 1]).all()),
            "a query's rows do not depend on the other queries of the batch: draw with "
            "retrodiff.randomness.uniform(query.generator, shape)",
        )


def check_proposal(proposal: ProposalDistribution, database: Database) -> None:
    """Draws existing rows of positive weight, reproducibly, in proportion to the weights.

    Args:
        proposal: to be checked.
        database: the one that it draws from.
    """
    require(isinstance(proposal, ProposalDistribution), "a proposal has support and propose")
    rows, weights = proposal.support(database)
    require(rows.shape == weights.shape and rows.ndim == 1, "support is two vectors (n,)")
    require(len(rows) > 0 and bool((weights > 0).all()), "all weights are positive")
    require(len(rows.unique()) == len(rows), "rows are distinct")
    require(bool(((rows >= 0) & (rows < len(database))).all()), "rows exist in the database")
    n = 4000
    query = proposal.propose(database, n, torch.Generator().manual_seed(0))
    again = proposal.propose(database, n, torch.Generator().manual_seed(0))
    require(
        query.ids is not None and again.ids is not None and bool((query.ids == again.ids).all()),
        "propose is a function of its generator, and says which rows it drew",
    )
    assert query.ids is not None
    drawn_of = [
        proposal.propose(database, count, Randomness.of(0, range(count), "proposal")).ids
        for count in (1, 3)
    ]
    require(
        all(ids is not None for ids in drawn_of) and bool((drawn_of[0] == drawn_of[1][:1]).all()),  # type: ignore[index]
        "the first query does not depend on how many are drawn: draw with "
        "retrodiff.randomness.uniform(generator, (n,))",
    )
    close(query.embedding, database.embeddings(query.ids), "a pseudo-query is the row it names", 0)
    expected = torch.zeros(len(database), dtype=torch.float64)
    expected[rows] = weights.double() / weights.sum()
    drawn = torch.bincount(query.ids, minlength=len(database)).double() / n
    # Six standard deviations of a binomial: one seed, so this cannot flake.
    bound = 6 * (expected * (1 - expected) / n).sqrt() + 1e-9
    require(
        bool(((drawn - expected).abs() <= bound).all()), "rows are drawn in proportion to weight"
    )


def _check_neighbors(found: Neighbors, b: int, k: int, rows: int, d: int) -> None:
    require(
        tuple(found.indices.shape) == (b, k) and tuple(found.similarity.shape) == (b, k),
        f"indices and similarity are (b, k) = {(b, k)}, got {tuple(found.indices.shape)}",
    )
    require(
        tuple(found.embeddings.shape) == (b, k, d),
        f"embeddings are (b, k, d) = {(b, k, d)}, got {tuple(found.embeddings.shape)}",
    )
    require(
        bool(((found.indices >= 0) & (found.indices < rows)).all()),
        f"indices lie within the database's {rows} rows",
    )
