"""The restricted reader: junk that training leaves behind, code, and damage of every kind."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_files import configuration, published_state, write_checkpoint
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import load_compvis
from retrodiff.checkpoints.foreign.torch_files import read_pickled
from retrodiff.disk.unpickling import read_plain_pickle


@pytest.fixture
def config() -> dict[str, Any]:
    return configuration()


@pytest.fixture
def state(config: dict[str, Any]) -> dict[str, Tensor]:
    return published_state(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_checkpoint, tmp_path / "model.ckpt")


class Callback:
    """Stands for a class that the reader cannot import."""


def forged(path: Path, module: str, name: str, arguments: tuple[Any, ...]) -> Path:
    """A checkpoint whose pickle calls ``module.name(*arguments)``."""
    called = pickle.dumps(arguments, protocol=2)[2:-1]  # without header and STOP
    code = b"\x80\x02" + f"c{module}\n{name}\n".encode() + called + b"R."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", code)
    return path


def test_trainer_state_is_passed_over(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    import argparse

    callback = Callback()
    callback.__dict__["best"] = torch.tensor(1.0)
    path = save(
        OrderedDict(state),
        callbacks={Callback: {"best_model_score": torch.tensor(0.3)}, "object": callback},
        optimizer_states=[{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}],
        hyper_parameters=argparse.Namespace(path=Path("runs"), kind=torch.float32),
        lr_schedulers=[],
        device=torch.device("cpu"),
        seen={1, 2},
        blob=b"\x00\xff",
    )
    load_compvis(path, config)
    content = read_pickled(path)
    assert content["seen"] == {1, 2}
    assert content["blob"] == b"\x00\xff"
    (key, value), _ = content["callbacks"].items()
    assert key is not Callback
    assert value["best_model_score"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("torch.hub", "load"),
        ("torch.utils._config_module", "load_config"),
        ("numpy.testing._private.utils", "runstring"),
        ("retrodiff.checkpoints.foreign.torch_files", "read_pickled"),
    ],
)
def test_a_checkpoint_that_carries_code_is_refused(module: str, name: str, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = forged(tmp_path / "evil.ckpt", module, name, (f"touch {witness}",))
    with pytest.raises(ValueError, match=rf"wants to call {module}\.{name} .*nothing was run"):
        load_compvis(path, preset="rdm_imagenet")
    assert not witness.exists()


def test_code_hidden_among_the_weights_is_refused(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {witness}",)

    with pytest.raises(ValueError, match=r"wants to call (posix|nt)\.system"):
        load_compvis(save(state, callbacks=[Trap()]), config)
    assert not witness.exists()


def test_reading_imports_nothing(tmp_path: Path) -> None:
    path = forged(tmp_path / "m.ckpt", "pytorch_lightning.callbacks", "ModelCheckpoint", ())
    (tmp_path / "pytorch_lightning.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from pathlib import Path;"
        "from retrodiff.checkpoints.foreign.torch_files import read_pickled;"
        f"read_pickled(Path({str(path)!r})); assert 'pytorch_lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_agrees_with_torch_load(state: dict[str, Tensor], save: Callable[..., Path]) -> None:
    odd = {
        "transposed": torch.randn(4, 6).T,
        "slice": torch.randn(10)[2:7],
        "shared": state["betas"],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{str(d): torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.float64, torch.bool)},
    }
    path = save({**state, **odd})
    expected = torch.load(path, weights_only=True)["state_dict"]
    found = read_pickled(path)["state_dict"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_says_so(
    keep: float, config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save(state)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="is truncated"):
        load_compvis(path, config)


def test_a_damaged_pickle_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    for number, code in enumerate([b"", b"\x80\x02", b"\x80\x02}q\x00X\xff\xff", b"\x80\x02Nb."]):
        path = tmp_path / f"{number}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", code)
        with pytest.raises(ValueError, match=r"(damaged|no tensors|not tensors)"):
            load_compvis(path, config)


def test_a_tensor_cannot_reach_out_of_its_data(tmp_path: Path) -> None:
    from retrodiff.checkpoints.foreign.torch_files import CALLS

    rebuild = CALLS["torch._utils", "_rebuild_tensor_v2"]
    storage = torch.arange(6)
    assert rebuild(storage, 2, (2, 2), (2, 1), False, None).tolist() == [[2, 3], [4, 5]]
    for offset, size, stride in [(3, (2, 2), (2, 1)), (0, (7,), (1,)), (-1, (2,), (1,))]:
        with pytest.raises(ValueError, match="reaches out"):
            rebuild(storage, offset, size, stride)


def test_flipped_bytes_are_read_or_refused_in_one_line(
    state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    """Nothing but a ValueError comes out, whatever byte of pickle or directory is wrong."""
    kept = {k: v for k, v in state.items() if v.numel() < 50}
    path = save(kept, epoch=3, callbacks={"best": {"path": Path("x"), "score": 0.5}})
    content = path.read_bytes()
    dice = random.Random(0)
    lines: list[str] = []
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 1, 4))):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            read_pickled(path)
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert all("\n" not in line and len(line) < 1000 for line in lines)


# --- what a pickle may not do -------------------------------------------------------------------


def plain(code: bytes) -> Any:
    return read_plain_pickle(io.BytesIO(code), "the file")


CHANGES = [
    ("collections", "Counter"), ("collections", "OrderedDict"), ("builtins", "dict"),
    ("_codecs", "encode"), ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"),
    ("torch", "float32"), ("numpy", "ndarray"), ("pytorch_lightning", "Trainer"), ("os", "environ"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), CHANGES)
def test_nothing_outside_of_the_file_is_changed(module: str, name: str, tmp_path: Path) -> None:
    """Sixty bytes replaced ``Counter.most_common`` in the whole process."""
    before = Counter.most_common, dict(vars(OrderedDict)), dict(os.environ)
    code = f"\x80\x02c{module}\n{name}\nN}}X\x0b\x00\x00\x00most_commonX\x04\x00\x00\x00gones\x86b."
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", code.encode("latin1"))
    with pytest.raises(ValueError, match=r"wants to call a change of .*nothing was run"):
        read_pickled(path)
    with pytest.raises(ValueError, match=r"refused, nothing was run"):
        plain(code.encode("latin1"))
    assert before == (Counter.most_common, dict(vars(OrderedDict)), dict(os.environ))
    assert Counter("aab").most_common(1) == [("a", 2)]


def test_attributes_of_a_state_dict_are_dropped(save: Callable[..., Path]) -> None:
    """``torch.nn.Module.state_dict`` hangs ``_metadata`` on its dictionary."""
    state = torch.nn.Linear(2, 2).state_dict()
    assert hasattr(state, "_metadata")
    found = read_pickled(save(state))["state_dict"]
    assert isinstance(found, OrderedDict)
    assert not vars(found)
    assert torch.equal(found["weight"], state["weight"])


@pytest.mark.parametrize(
    "kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.complex64]
)
def test_types_without_a_storage_of_their_own(kind: torch.dtype, save: Callable[..., Path]) -> None:
    tensor = torch.arange(6).to(kind).view(2, 3)
    found = read_pickled(save({"a": tensor, "b": tensor[1:]}))["state_dict"]
    assert found["a"].dtype == kind
    assert torch.equal(found["a"].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(found["b"].view(torch.uint8), tensor[1:].view(torch.uint8))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, {3, 4}, frozenset([1]), b"x" * 300, "é", 2**70, (1, (2, 3))]},
        Counter("aab"), OrderedDict(a=1), defaultdict(list, a=[1]), bytearray(b"abc"), 1 + 2j,
        {(1, "a"): 3},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    assert plain(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype=">i4"), np.array(["a", "bc"]), np.array([b"a"]), np.float32(3),
        np.array(["a", 1, None], object), np.zeros((0, 3)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)  # fmt: skip
def test_arrays_come_back(array: Any, protocol: int) -> None:
    found = np.asarray(plain(pickle.dumps(array, protocol)))
    assert found.shape == array.shape
    assert np.array_equal(found, array)


def test_damaged_pickles_end_in_one_line() -> None:
    """Flipped bytes and random operations; each must be read or refused at once."""
    dice = random.Random(1)
    value = {"a": np.arange(5), "b": [1, "x", (2.5, None)], "c": Counter("aab"), "d": {1, 2}}
    good = [pickle.dumps(value, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    codes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    lines: list[str] = []
    for number in range(3000):
        if number % 3:
            code = bytearray(dice.choice(good))
            for _ in range(dice.choice((1, 2, 5))):
                code[dice.randrange(len(code))] = dice.randrange(256)
        else:
            parts = (dice.choice(codes) + dice.randbytes(dice.randrange(3)) for _ in range(30))
            code = b"\x80\x04}]" + b"".join(parts) + b"."
        try:
            plain(bytes(code))
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 1500
    assert all("\n" not in line and len(line) < 600 for line in lines)


@pytest.mark.parametrize("kind", ["parameters", "scalars", "views of one storage"])
def test_tensors_cost_nothing_to_rebuild(kind, tmp_path):
    """Trainers save parameters, counters without a shape, and many views of one flat tensor."""
    flat = torch.arange(3_000_000, dtype=torch.float32)
    state = {
        "parameters": {"a": torch.nn.Parameter(torch.ones(3, 4)), "b": torch.nn.Parameter(flat)},
        "scalars": {"step": torch.tensor(7), "scale": torch.nn.Parameter(torch.tensor(0.5))},
        "views of one storage": {f"p{i}": flat[i * 1000 : (i + 1) * 1000] for i in range(500)},
    }[kind]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    read = read_pickled(tmp_path / "x.ckpt")["state_dict"]
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())
