"""Safetensors shards: written whole, read memory-mapped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from retrodiff.checkpoints.sharded import load_shards, save_sharded
from retrodiff.disk.tensors import write_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        **{str(d): torch.randint(0, 2, (3, 2)).to(d) for d in DTYPES},
        "transposed": torch.randn(4, 3).T,
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "weight": torch.nn.Parameter(torch.randn(5)),
    }


@pytest.mark.parametrize("max_bytes", [1, 100, 10**9])
def test_saved_tensors_come_back(max_bytes: int, tmp_path: Path) -> None:
    state = some_tensors()
    files = save_sharded(state, tmp_path, max_bytes=max_bytes)
    assert (len(files) == 1) == (max_bytes == 10**9)
    for source in (tmp_path, files[-1]):
        found = load_shards(source)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor.detach())


def test_files_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    state = some_tensors()
    write_tensors(tmp_path / "a.safetensors", state, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor.detach()) for name, tensor in state.items())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), max_bytes=st.integers(1, 300))
def test_shards_keep_to_their_size(
    sizes: list[int], max_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    save_sharded({str(i): torch.zeros(n) for i, n in enumerate(sizes)}, folder, max_bytes=max_bytes)
    seen: list[str] = []
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        seen += tensors
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_bytes
    assert sorted(seen, key=int) == [str(i) for i in range(len(sizes))]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sharded({"a": torch.ones(3)}, tmp_path)

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save_sharded({"a": torch.zeros(3)}, tmp_path)
    monkeypatch.undo()
    assert torch.equal(load_shards(tmp_path)["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_shards_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_shards(tmp_path)
    *shards, index = save_sharded({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path, max_bytes=36)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_shards(tmp_path)
    write_tensors(shards[1], {"c": torch.ones(1)})
    with pytest.raises(ValueError, match="promises 1 tensors that its files lack: b"):
        load_shards(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        load_shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="beside their index"):
        load_shards(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no index"):
        load_shards(tmp_path)
