"""Builds on a local Ray cluster of two workers give the database that a local build gives."""

import os
import sys
import time

import pytest
import torch
from test_databases import Pooled, pictures

from retrodiff.databases import (
    Images,
    Patchify,
    UnreadableImage,
    build_database,
    open_database,
)
from retrodiff.databases.build.ray import _on_gpu
from retrodiff.databases.build.work import Work
from retrodiff.databases.sources.folders import Source
from retrodiff.encoders import Cached

ray = pytest.importorskip("ray", reason="the extra retrodiff[ray] is not installed")
# Starting Ray takes a dozen seconds; it warns of its own deprecations and leaves sockets to be
# collected.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = {"batch_size": 4, "shard_rows": 16, "thumbnails": 8, "progress": False}


class Spied(Source):
    """Pictures that say which process read them, once two have begun; some cannot be read."""

    def __init__(self, images, meeting=None, bad=()):
        self.images, self.meeting, self.bad = Images(images), meeting, bad

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"p{i}"

    def read(self, i):
        if self.meeting is not None:
            (self.meeting / str(os.getpid())).touch()
            until = time.monotonic() + 30
            while len(os.listdir(self.meeting)) < 2 and time.monotonic() < until:
                time.sleep(0.05)
        if i in self.bad:
            raise UnreadableImage("not an image")
        [(image, record)] = self.images.read(i)
        return [(image, {**record, "process": os.getpid()})]

    def describe(self):
        return self.images.describe()


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # which would ask the network
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for module in (sys.modules[__name__], sys.modules["test_databases"]):
        ray.cloudpickle.register_pickle_by_value(module)  # the workers have no tests to import
    yield
    ray.shutdown()


def same(ours, theirs, *but):
    """Manifests and records agree, embeddings to the tolerance of float16."""
    mine, other = ours.manifest, theirs.manifest
    assert [(s.rows, s.next, s.source) for s in mine.shards] == [
        (s.rows, s.next, s.source) for s in other.shards
    ]
    assert mine.skipped == other.skipped
    assert (mine.settings, mine.sources) == (other.settings, other.sources)
    for a, b in zip(mine.shards, other.shards, strict=True):
        for name in a.files:
            if not name.startswith("vectors") and not (but and name.startswith("records")):
                assert a.files[name] == b.files[name]
    rows = torch.arange(len(ours))
    torch.testing.assert_close(ours.embeddings(rows), theirs.embeddings(rows), rtol=2e-3, atol=1e-3)
    names = [n for n in ours.columns if n not in but]
    assert ours.table(names).equals(theirs.table(names))
    assert ours.verify() == []


def test_ray_builds_what_a_local_build_builds(cluster, tmp_path):
    (tmp_path / "meeting").mkdir()
    built = {}
    for engine, meeting in (("local", None), ("ray", tmp_path / "meeting")):
        source = Patchify(size=6, n=3).over(Spied(pictures(25, 9), meeting, bad=(0, 7, 24)))
        with pytest.warns(UserWarning, match="3 skipped: p0"):
            built[engine] = build_database(
                tmp_path / engine, source, Pooled(), engine=engine, workers=2, **OPTIONS
            )
    assert len(built["ray"]) == 66
    same(built["ray"], built["local"], "process")
    processes = set(built["ray"].column("process").tolist())
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert torch.equal(built["ray"].image(40), built["local"].image(40))


def test_an_interrupted_build_goes_on_with_ray(cluster, tmp_path, monkeypatch):
    source = Patchify(size=6, n=3).over(Images(pictures(25, 9)))
    whole = build_database(tmp_path / "whole", source, Pooled(), **OPTIONS)
    record, calls = Work.record, []

    def interrupted(self, *arguments):
        record(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Work, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_database(tmp_path / "d", source, Pooled(), **OPTIONS)
    monkeypatch.undo()
    build_database(tmp_path / "d", source, Pooled(), engine="ray", resume=True, **OPTIONS)
    same(open_database(tmp_path / "d"), whole)


def test_an_error_of_the_encoder_keeps_its_line(cluster, tmp_path):
    class Broken(Pooled):
        def encode_image(self, images):
            raise ValueError("the encoder is broken")

    source = Images(pictures(3))
    with pytest.raises(ValueError, match="the encoder is broken"):
        build_database(tmp_path / "d", source, Broken(), engine="ray", progress=False)
    with pytest.raises(ValueError, match="engine='dask': give one of local, ray"):
        build_database(tmp_path / "d", source, Pooled(), engine="dask", progress=False)


def test_an_encoder_inside_a_cache_gets_its_gpu():
    class Loaded(Pooled):
        device = torch.device("cuda")  # where its weights are, or will be when they are loaded

    assert not _on_gpu(Pooled())
    assert not _on_gpu(Cached(Pooled()))
    assert _on_gpu(Loaded())
    assert _on_gpu(Cached(Cached(Loaded())))
