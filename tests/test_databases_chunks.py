"""Pictures that come from other processes in chunks are those that are read here."""

import numpy as np
import torch
from PIL import Image
from test_databases import Pooled
from test_databases_encoding import Prepared

from retrodiff.databases import ImageFolder, Patchify, build_database
from retrodiff.databases.build import encoding
from retrodiff.databases.build.encoding import Memory, Reader, pictures_of
from retrodiff.encoders.preprocessing import openai
from retrodiff.pictures.decoding import read_image


def folder(path, n):
    path.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i % 3, 48, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    (path / f"{n // 2}.png").write_text("no picture")
    return ImageFolder(path)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_builds_with_workers_have_the_same_bytes(tmp_path, recwarn):
    source = Patchify(size=32, n=3).over(folder(tmp_path / "p", 23))
    made = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        encoder = Prepared(openai(24))
        options = {"batch_size": 5, "shard_rows": 13, "thumbnails": 16, "workers": workers}
        database = build_database(out, source, encoder, progress=False, **options)
        assert len(database) == 22 * 3
        made.append({k: v for k, v in content(out).items() if k != "manifest.json"})
    assert made[0] == made[1]


def test_pictures_arrive_in_the_order_that_was_asked(tmp_path, monkeypatch):
    source = folder(tmp_path / "p", 12)
    reader = Reader(source, Prepared(openai(24)), small=0)
    numbers = [7, 0, 6, 3, 3, 11]
    for room in (2**28, 0):  # no shared memory to speak of: one picture at a time
        monkeypatch.setattr(encoding, "AHEAD", room)
        found = list(pictures_of(reader, numbers, 1))
        assert [i for i, _ in found] == numbers
        for i, rows in found:
            here = reader(i)
            assert isinstance(rows, str) == isinstance(here, str) == (i == 6)
            if not isinstance(rows, str):
                assert torch.equal(rows[0].pixels, here[0].pixels)
                assert rows[0].record == here[0].record


def test_chunks_fit_the_memory():
    chunks = encoding._Chunks(100, 16, room=1000)
    sizes, all_places = [], []
    for places in chunks:
        sizes.append(len(places))
        all_places += places
        chunks.tell(100 if places[-1] < 50 else 600)
    assert all_places == list(range(100))
    assert max(sizes) == 10
    assert sizes[-1] == 1


def test_memory_is_taken_again_and_never_mixed_up():
    memory = Memory()
    first = memory.joined([torch.ones(2, 3), torch.zeros(1, 3)])
    assert first.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    again = memory.joined([torch.full((2, 3), 5.0)])
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [[5, 5, 5], [5, 5, 5]]
    assert memory.joined([torch.ones(4, 2)]).shape == (4, 2)
    assert memory.joined([torch.ones(1, 2, dtype=torch.float64)]).dtype == torch.float64


def test_encoders_without_a_preparation(tmp_path):
    source = folder(tmp_path / "p", 5)
    found = dict(pictures_of(Reader(source, Pooled()), range(5), 1))
    rows = found[3]
    assert not isinstance(rows, str)
    assert torch.equal(rows[0].pixels, read_image(tmp_path / "p/3.png"))
