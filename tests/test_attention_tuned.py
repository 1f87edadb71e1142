"""Launch sizes are measured, kept whole, used on the next start, and ignored when damaged."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch
from test_attention_proof import right, right_back

from retrodiff.attention import KernelWarning, fused, kernel_calls, tune_attention, tuning
from retrodiff.attention.launches import Tile, launch
from retrodiff.attention.tuned import launches_file, tuned_launch, tuned_on
from retrodiff.cli import main

CPU = torch.device("cpu")
CLASS = dict(width=64, heads=4, k=4, positions=128, batch=2, dtype=torch.float32, device="cpu")
RULE = Tile(bn=32, bc=32, warps=8, stages=2)


@pytest.fixture(autouse=True)
def possible(monkeypatch, tmp_path):
    monkeypatch.setenv("RETRODIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fused, "INTERPRETED", True)
    monkeypatch.setattr(fused, "TRITON", True)
    monkeypatch.setattr(kernel_calls, "forward", right)
    monkeypatch.setattr(kernel_calls, "backward", right_back)
    tuned_on.cache_clear()
    yield
    tuned_on.cache_clear()


class Launcher:
    """A kernel whose time depends on its sizes, and which is wrong with some of them."""

    def __init__(self, seconds, wrong=()):
        self.seconds, self.wrong, self.last = seconds, wrong, None

    def __call__(self, *arguments):
        plan = arguments[-1]
        self.last = Tile(bn=plan.bn, bc=plan.bc, warps=plan.warps, stages=plan.stages)
        if self.last == Tile(bn=128, bc=64, warps=8, stages=4):
            raise RuntimeError("out of resource: shared memory")
        out = right(*arguments)
        return out * 1.01 if self.last in self.wrong else out

    def clock(self, run):
        run()
        return self.seconds(self.last)


def asked(**more):
    return tuned_launch(CPU, **(dict(size=128, width=64, heads=4, k=4, dtype=torch.float32) | more))


def test_the_fastest_right_size_is_kept_and_used(monkeypatch):
    fast, faster = Tile(bn=64, bc=64, warps=4, stages=3), Tile(bn=64, bc=32, warps=4, stages=3)
    times = {fast: 1e-5, faster: 5e-6}
    kernel = Launcher(lambda tile: times.get(tile, 1e-4), wrong=(faster,))
    monkeypatch.setattr(kernel_calls, "forward", kernel)
    state = torch.get_rng_state()
    found = tune_attention(**CLASS, clock=kernel.clock)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.tile, found.seconds, found.seconds_by_rule) == (fast, 1e-5, 1e-4)
    assert "10.0 µs with rows 64, channels 64, warps 4, stages 3" in tuning.told(found)
    plan = asked()
    assert (plan.bn, plan.bc, plan.warps, plan.stages) == (64, 64, 4, 3)
    rule = launch(size=128, heads=4, k=4, dtype=torch.float32)
    assert (plan.hg, plan.groups, plan.kp) == (rule.hg, rule.groups, rule.kp)
    assert asked(size=16).bn == 32 or asked(size=16).bn == 16
    assert asked(k=5) == launch(size=128, heads=4, k=5, dtype=torch.float32)
    assert asked(backward=True) == launch(
        size=128, heads=4, k=4, dtype=torch.float32, backward=True
    )


def test_sizes_of_several_classes_stand_in_one_file():
    for k, backward in itertools.product((2, 4), (False, True)):
        tune_attention(**(CLASS | {"k": k}), backward=backward, clock=lambda run: 1.0)
    kept = json.loads(launches_file(CPU).read_text())
    assert (kept["format"], kept["device"]) == (1, "cpu")
    assert len(kept["launches"]) == len(tuned_on(CPU)) == 4
    assert all(entry["tile"] != {} for entry in kept["launches"])
    assert [p.name for p in launches_file(CPU).parent.iterdir() if "partial" in p.name] == []


def test_no_gain_keeps_the_sizes_by_rule():
    found = tune_attention(**CLASS, clock=lambda run: 1e-3)
    assert found.tile == RULE
    assert asked() == launch(size=128, heads=4, k=4, dtype=torch.float32)


def damaged(edit):
    tune_attention(**CLASS, clock=lambda run: 1.0)
    path = launches_file(CPU)
    kept = json.loads(path.read_text())
    path.write_text(edit(kept))
    tuned_on.cache_clear()


def changed(*keys, to):
    def edit(kept):
        inner = kept
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return json.dumps(kept)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        lambda kept: "",
        lambda kept: json.dumps(kept)[:-40],
        lambda kept: "[" * 100_000,
        lambda kept: "null",
        lambda kept: json.dumps(kept) + " " * (1 << 20),
        changed("format", to=2),
        changed("triton", to="1.0"),
        changed("launches", to=3),
        changed("launches", 0, "tile", "bn", to=7),
        changed("launches", 0, "tile", "bn", to=True),
        changed("launches", 0, "tile", "warps", to="8"),
        changed("launches", 0, "tile", to=[]),
        changed("launches", 0, "width", to=[64]),
        changed("launches", 0, "more", to=1),
    ],
)
def test_a_damaged_file_is_ignored_with_one_line(edit):
    damaged(edit)
    with pytest.warns(KernelWarning, match="`retrodiff tune` writes it anew") as told:
        plan = asked()
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert plan == launch(size=128, heads=4, k=4, dtype=torch.float32)
    assert asked() == plan  # no second warning
    tune_attention(**CLASS, clock=lambda run: 1.0)
    assert len(tuned_on(CPU)) == 1


def test_no_file_and_a_folder_in_its_place():
    assert asked() == launch(size=128, heads=4, k=4, dtype=torch.float32)
    launches_file(CPU).mkdir(parents=True)
    tuned_on.cache_clear()
    with pytest.warns(KernelWarning):
        asked()


def test_the_command_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with warnings.catch_warnings():
        assert main(["tune", "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "no Triton kernels on device cpu, CUDA only" in told
        for wrong in (["--width", "64"], ["--heads", "4"], ["--network", "x"]):
            assert main(["tune", *wrong]) == 2


def test_the_command_tunes_a_network(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "candidates", lambda: iter([RULE]))
    monkeypatch.setattr(tuning, "gpu_seconds", lambda run, device: 2e-6)
    shapes = ["--width", "64", "--positions", "64", "--heads", "2"]
    with warnings.catch_warnings():
        assert main(["tune", *shapes, "--device", "cpu", "--batch", "1", "--backward"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["forward", "backward", "kept"]
    assert len(tuned_on(CPU)) == 2
