"""Checkpoints as files: never other weights, never another's file, whole whatever happens."""

import errno
import os
import random

import pytest
import torch
from trainings import linear, run, same, small_data, weights

from retrodiff.training import checkpoint as checkpoints
from retrodiff.training import optimize
from retrodiff.training.checkpoint import State, read_state, write_state


@pytest.fixture
def data(encoder, database):
    return small_data(database, encoder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def test_a_checkpoint_that_is_there_is_replaced_only_on_request(recipe, data, path):
    run(recipe, data, steps=2, checkpoint=path)
    with pytest.raises(FileExistsError, match=r"continue it \(resume=True\).*overwrite=True"):
        run(recipe, data, steps=3, checkpoint=path)
    run(recipe, data, steps=3, checkpoint=path, overwrite=True)
    assert read_state(path).done == 3


@pytest.mark.parametrize("content", [b"my notes", b"", b"\x00" * 64])
def test_other_files_are_never_replaced(recipe, data, path, content):
    path.write_bytes(content)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is no training checkpoint"):
            run(recipe, data, checkpoint=path, **options)
    assert path.read_bytes() == content


def test_weights_of_a_model_are_no_checkpoint(recipe, data, path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    kept = path.read_bytes()
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises((FileExistsError, ValueError), match="is no training checkpoint"):
            run(recipe, data, checkpoint=path, **options)
    assert path.read_bytes() == kept


def test_places_that_are_no_files(recipe, data, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="is no regular file"):
        run(recipe, data, checkpoint=tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is no regular file"):
            run(recipe, data, checkpoint=tmp_path / "pipe", **options)
    monkeypatch.setenv("HOME", str(tmp_path))
    run(recipe, data, steps=1, checkpoint="~/a/b/state")
    assert (tmp_path / "a/b/state").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into"):
        run(recipe, data, steps=1, checkpoint=tmp_path / "file" / "state")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_training(recipe, data, path, monkeypatch):
    from safetensors import SafetensorError

    whole = run(recipe, data)
    real, saved = checkpoints.write_tensors, []

    def full(file, tensors, header):
        saved.append(header["done"])
        if len(saved) == 2:
            file.with_name(file.name + ".partial").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        if len(saved) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(file, tensors, header)
        monkeypatch.setattr(checkpoints, "_last_good", file.read_bytes(), raising=False)

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left on device") as warned:
        fitted = run(recipe, data, checkpoint=path, checkpoint_every=4)
    assert [str(w.message).split(" could")[0] for w in warned] == [
        "the state of step 8",
        "the state of step 12",
    ]
    assert saved == ["4", "8", "12"]
    assert path.read_bytes() == checkpoints._last_good
    assert read_state(path).done == 4
    assert same(weights(fitted.model), weights(whole.model))  # what was trained is not lost
    monkeypatch.setattr(checkpoints, "write_tensors", real)
    resumed = run(recipe, data, checkpoint=path, resume=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_two_trainings_do_not_take_turns_in_one_file(recipe, data, path, tmp_path):
    other = tmp_path / "other"
    run(recipe, data, steps=2, seed=5, checkpoint=other)

    def rate(step):
        if step == 5:
            os.replace(other, path)
        return 1e-2

    with pytest.warns(UserWarning, match="written by another training meanwhile"):
        run(recipe, data, steps=8, lr=rate, checkpoint=path, checkpoint_every=4)
    assert read_state(path).run["seed"] == 5


def test_a_checkpoint_that_was_deleted_is_written_anew(recipe, data, tmp_path):
    path = tmp_path / "folder" / "state"

    def rate(step):
        if step == 5:
            path.unlink()
            path.parent.rmdir()
        return 1e-2

    run(recipe, data, steps=8, lr=rate, checkpoint=path, checkpoint_every=4)
    assert read_state(path).done == 8


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(path):
    module, loss, options = linear(path)

    def break_weights(done, loss, lr):
        if done == 6:
            module.weight.data[0, 1] = torch.inf

    with pytest.raises(FloatingPointError, match=r"weight is not finite after step 6.*4 steps"):
        optimize(module, loss, after=break_weights, **options)
    assert read_state(path).done == 4
    assert bool(read_state(path).tensors["parameter.weight"].isfinite().all())


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(path):
    module, loss, options = linear(path)

    def broken(module, part):
        return loss(module, part) * (torch.nan if part.step == 5 else 1)

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5.*keeps .* 4 steps"):
        optimize(module, broken, **options)
    kept = path.read_bytes()
    with pytest.raises(FloatingPointError, match=r"nan at step 5"):
        optimize(module, broken, **options, resume=True)
    assert path.read_bytes() == kept


def damaged(content, draw):
    """Some bytes flipped, zeroed, cut off, repeated or added."""
    data = bytearray(content)
    kind = draw.choice(["flip", "flip", "byte", "zero", "cut", "grow", "header"])
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[at] = draw.randrange(256)
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += bytes(draw.randrange(1, 100))
    else:
        data[draw.randrange(min(800, len(data)))] = draw.randrange(256)
    return bytes(data)


def test_damaged_checkpoints_are_one_line_and_never_other_weights(path):
    """The committed fuzzer of this format: 1,000 tries with a seed."""
    torch.manual_seed(0)
    tensors = {"parameter.a": torch.randn(4, 5), "ema.updates": torch.tensor(7)}
    tensors |= {"losses": torch.rand(7), "rates": torch.rand(7, dtype=torch.float64)}
    good = State(7, {"seed": 0, "batch_size": 4, "model": {"denoiser": {"width": 16}}}, tensors)
    write_state(path, good)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1000):
        changed = damaged(content, draw)
        path.write_bytes(changed)
        lines, state = [], None
        try:
            state = read_state(path)
        except ValueError as error:
            lines.append(str(error))
        if state is None:
            refused += 1
            assert "\n" not in lines[0]
            assert str(path) in lines[0]
            continue
        assert state.done == good.done
        assert state.run == good.run
        assert state.tensors.keys() == tensors.keys()
        assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)
    assert refused > 900


def test_a_header_that_promises_much_takes_no_memory(path):
    for length in (2**40, 2**63, 99_999_999):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}')
        with pytest.raises(ValueError, match="is damaged"):
            read_state(path)
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match="is damaged"):
        read_state(path)


def test_a_checkpoint_of_another_format_says_so(path):
    from safetensors.torch import save_file

    about = {"format": "1", "done": "3", "steps": "8", "seed": "0"}
    save_file({"losses": torch.zeros(8)}, path, about)
    with pytest.raises(ValueError, match="of format '1', but this version reads format 2"):
        read_state(path)
