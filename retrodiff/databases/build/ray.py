"""Encodes pictures as a Ray Data job: tasks read them anywhere in the cluster, actors encode them.

Ray schedules, streams and retries; the rows come back in their order and are written as those of a
local build. A job is cut into runs of ``batch_size`` pictures, so that what the encoder sees
together depends on neither the cluster nor an interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrodiff.components import inside, modules
from retrodiff.databases.build.encoding import Batch, Reader, Row, encode_rows
from retrodiff.databases.sources.folders import Source
from retrodiff.interfaces import Encoder

RUNS_AT_MOST = 10_000
"""Blocks of one job: more than enough to balance any cluster, few enough for Ray to keep track."""


def encode_with_ray(
    source: Source,
    encoder: Encoder,
    settings: Mapping[str, Any],
    start: tuple[int, int],
    workers: int,
) -> Iterator[Batch]:
    """All rows of a source from ``start`` on, encoded by ``workers`` actors of a Ray cluster.

    The arguments are those of `encode_here`. The source's files must be where the workers are. An
    encoder on a CUDA device gets one GPU per actor.
    """
    ray = _started()
    size, side = settings["batch_size"], settings["thumbnails"]
    first, total = start[0] // size, -(-len(source) // size)
    if first >= total:
        return
    actors = max(workers, 1)
    # Handed over as references inside a list, which Ray leaves to us to resolve: once per process.
    reader = Reader(source, encoder, side, settings.get("thumbnail_quality"))
    there, model = [ray.put(reader)], [ray.put(encoder)]
    runs = ray.data.range(total - first, override_num_blocks=min(total - first, RUNS_AT_MOST))
    read = runs.map(_read, fn_args=(there, first, size))
    done = read.map(
        _Encode,
        fn_args=(model,),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        num_gpus=1 if _on_gpu(encoder) else None,
    )
    done.context.execution_options.preserve_order = True
    done.context.raise_original_map_exception = True
    done.context.enable_progress_bars = False
    done.context.print_on_execution_start = False
    rows = 0
    for encoded in done.iter_rows():
        for batch in _cut(encoded["run"], start, settings["shard_rows"], rows):
            rows += len(batch.records)
            yield batch


def _started() -> Any:
    """Ray, connected to the cluster that RAY_ADDRESS or this machine has, or to a new one."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("engine='ray' needs Ray: pip install 'retrodiff[ray]'") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return ray


def _on_gpu(encoder: Encoder) -> bool:
    """Whether an encoder's weights are on a GPU, or will be when they are loaded."""
    for part in inside(encoder):
        device = getattr(part, "device", None)
        if isinstance(device, torch.device) and device.type == "cuda":
            return True
    return any(p.is_cuda for module in modules(encoder) for p in module.parameters())


@lru_cache(2)
def _fetched(reference: Any) -> Any:
    import ray

    return ray.get(reference)


Picture = tuple[int, "list[Row] | str", str]
"""Number, rows or the reason why it cannot be read, and name."""


def _read(row: dict[str, Any], there: list[Any], first: int, size: int) -> dict[str, Any]:
    """The pictures of a run."""
    reader: Reader = _fetched(there[0])
    start = (first + int(row["id"])) * size
    numbers = range(start, min(start + size, len(reader.source)))
    run: list[Picture] = [(i, reader(i), reader.name(i)) for i in numbers]
    return {"size": size, "pictures": run}


class _Encode:
    """An actor; it holds the encoder once it has been asked to encode."""

    def __call__(self, row: dict[str, Any], model: list[Any]) -> dict[str, Any]:
        encoder: Encoder = _fetched(model[0])
        pictures: list[Picture] = row["pictures"]
        size = int(row["size"])
        rows = [row for _, read, _ in pictures if not isinstance(read, str) for row in read]
        parts = [
            encode_rows(encoder, rows[i : i + size]) for i in range(0, max(len(rows), 1), size)
        ]
        return {"run": _Run(_places(pictures), parts, pictures[-1][0] + 1)}


class _Run(NamedTuple):
    """The rows of consecutive pictures, encoded.

    Args:
        places: for each picture its number and how many rows it has, or name and reason.
        parts: embeddings, records and thumbnails, in the order of the rows.
        end: number of the picture behind the last one.
    """

    places: list[tuple[int, int | tuple[str, str]]]
    parts: list[tuple[Tensor, list[dict[str, Any]], list[bytes]]]
    end: int


def _places(pictures: list[Picture]) -> list[tuple[int, int | tuple[str, str]]]:
    return [(i, (name, r) if isinstance(r, str) else len(r)) for i, r, name in pictures]


def _cut(run: _Run, start: tuple[int, int], shard_rows: int, rows: int) -> Iterator[Batch]:
    """A run as batches that end where shards end, without the rows before ``start``."""
    embeddings = torch.cat([part[0] for part in run.parts])
    records = [record for part in run.parts for record in part[1]]
    thumbnails = [small for part in run.parts for small in part[2]]
    row = first = 0
    skipped: list[tuple[str, str]] = []

    def batch(at: tuple[int, int]) -> Batch:
        chosen = slice(first, row)
        return Batch(embeddings[chosen], records[chosen], thumbnails[chosen], at, skipped)

    for i, count in run.places:
        if isinstance(count, tuple):
            if i >= start[0]:
                skipped.append(count)
            continue
        for j in range(1, count + 1):
            row += 1
            if (i, j) <= start:  # was there before the interruption
                first = row
                continue
            if (rows + row - first) % shard_rows == 0:
                yield batch((i, j) if j < count else (i + 1, 0))
                rows += row - first
                first, skipped = row, []
    yield batch((run.end, 0))
