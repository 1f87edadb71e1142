"""Every check and benchmark of a GPU, in stages of at most eight minutes that can be continued.

    make gpu                                       # all of them; what is done already is skipped
    make gpu STAGE=attention                       # one; again, until it says that it is done
    make gpu STAGE=report                          # tables and plots of what there is
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --small --device cpu  # does it run: toy sizes that say nothing

Needs the checkout, torch from 2.6 with triton, numpy and einops. What is compared with diffusers
needs diffusers, the stage `tests` needs pytest, plots need matplotlib: each is left out with a line
where that is missing. Every stage runs in a process of its own and consists of units; a unit's
result is a file, so that a stage goes on where it stopped, and a unit that broke the device or took
too long is recorded as failed and passed over (--again tries the failed ones once more).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 480.0
"""Seconds that a stage may take; what runs then is ended and recorded."""
LAST_START = 330.0
"""Seconds after which no further unit of a stage is begun."""
NEEDED = ("torch", "triton", "numpy", "einops")

Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Args:
        device: ``cuda`` or ``cpu``.
        small: toy sizes.
        folder: of the results.
    """

    device: str
    small: bool
    folder: Path

    @property
    def alone(self) -> bool:
        """Whether there is no diffusers to compare with."""
        return self.small or importlib.util.find_spec("diffusers") is None


@dataclass(frozen=True)
class Stage:
    """Units that belong together.

    Args:
        about: what is measured, in words.
        units: (name, what to run) of each; a unit returns what JSON can hold.
        interpreted: in small mode the kernels run in Triton's interpreter.
    """

    about: str
    units: Callable[[Setting], Iterator[tuple[str, Run]]]
    interpreted: bool = False


# --- stages -------------------------------------------------------------------------------------


def machine(setting: Setting) -> Iterator[tuple[str, Run]]:
    def run() -> dict[str, Any]:
        import neighbor_attention as bench
        import torch

        clock = bench.Clock(setting.device, 1 if setting.small else 25)
        found = about(setting) | {"copy": bench.copy_bandwidth(clock, setting.device)}
        names = ["fp32"] if setting.small else list(bench.DTYPES)
        found["peaks"] = {
            name: bench.product_peak(clock, setting.device, bench.DTYPES[name]) for name in names
        }
        if setting.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found["memory_gb"] = properties.total_memory / 1e9
            found["capability"] = f"{properties.major}.{properties.minor}"
        return found

    yield "machine", run


def kernels(setting: Setting) -> Iterator[tuple[str, Run]]:
    import kernel_checks

    yield from kernel_checks.units(setting.device, setting.small)


def tests(setting: Setting) -> Iterator[tuple[str, Run]]:
    """Files that have a test marked gpu, found by reading them."""
    marked = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    for path in marked[:1] if setting.small else marked:
        yield path.stem, lambda path=path: tested(path)


def tested(path: Path) -> dict[str, Any]:
    """How many tests of a file passed, failed and were skipped."""
    if importlib.util.find_spec("pytest") is None:
        return {"file": path.name, "left_out": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(path)], cwd=ROOT, capture_output=True, text=True, env=plain
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if done.returncode not in (0, 5):
        tail = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{path.name} ended with {done.returncode}:\n{tail}")
    return {"file": path.name, "passed": 0, "skipped": 0, **counts}


def attention(setting: Setting, more: bool = False) -> Iterator[tuple[str, Run]]:
    import neighbor_attention as bench

    if setting.small:
        cases = [bench.Case("small", 2, 64, 64, 32, 4, "fp32", way) for way in (False, True)]
        cases = cases[:1] if more else cases
    else:
        cases = [
            bench.Case(preset, 64, n, c, 32, k, dtype, way)
            for preset, shapes in bench.SHAPES.items()
            for (n, c), k, dtype, way in itertools.product(
                shapes, (1, 4, 10, 20), bench.DTYPES, (False, True)
            )
            if ((k, dtype) != (4, "bf16")) == more
        ]

    def run(case: Any) -> dict[str, Any]:
        clock = bench.Clock(setting.device, 1 if setting.small else 25)
        compiled = "none" if setting.small else "few"
        return bench.measure(case, setting.device, clock, compiled, copy_of(setting))

    for case in cases:
        way = "backward" if case.backward else "forward"
        name = f"{case.preset}-{case.n}x{case.c}-k{case.k}-{case.dtype}-{way}"
        yield name, lambda case=case: run(case)


def network(setting: Setting) -> Iterator[tuple[str, Run]]:
    def run() -> list[dict[str, Any]]:
        import neighbor_attention as bench
        import torch

        clock = bench.Clock(setting.device, 1 if setting.small else 25)
        dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
        size = 16 if setting.small else 64
        return bench.network(setting.device, dtype, clock, setting.small, size)

    yield "guided-step", run


def search(setting: Setting) -> Iterator[tuple[str, Run]]:
    for storage in ("float16", "int8"):
        options = ["--device", setting.device, "--storage", storage]
        options += (
            ["--quick", "--rows", "500", "--dim", "64", "--queries", "4"] if setting.small else []
        )
        yield storage, lambda o=options, s=storage: {"storage": s, **script("gpu_search", o)}


def throughput(setting: Setting) -> Iterator[tuple[str, Run]]:
    modes = ["eager"] if setting.device == "cpu" else ["eager", "compile", "CUDA graphs"]
    for batch, mode in itertools.product([1] if setting.small else [16, 64], modes):
        options = ["--device", setting.device, "--batches", str(batch), "--modes", mode]
        options += ["--quick", "--rounds", "1"] if setting.small else []
        options += ["--alone"] if setting.alone else []
        name = f"{mode.replace(' ', '-')}-{batch}"
        yield name, lambda o=options: script("gpu_throughput", o, "--json")


def unet(setting: Setting) -> Iterator[tuple[str, Run]]:
    shared = ["--device", setting.device] + (["--alone"] if setting.alone else [])
    if setting.small:
        small = [*shared, "--tiny", "--rounds", "1", "--no-parts"]
        yield "step", lambda: script("unet_step", small)
        return
    for batch in (1, 16):
        for name, extra in (("eager", []), ("compiled", ["--compile", "--no-parts"])):
            options = [*shared, "--dtype", "bfloat16", "--batch", str(batch), *extra]
            yield f"{name}-{batch}", lambda o=options: script("unet_step", o)


def rarm(setting: Setting) -> Iterator[tuple[str, Run]]:
    if setting.small:
        options = ["--small", "--device", setting.device, "--repeats", "1"]
        yield "small", lambda: script("rarm", options)
        return
    for batch in (1, 8, 32):
        options = ["--device", setting.device, "--batch", str(batch)]
        yield f"batch-{batch}", lambda o=options: script("rarm", o)


def tune(setting: Setting) -> Iterator[tuple[str, Run]]:
    import torch

    from retrodiff.attention import tune_attention, tuning
    from retrodiff.attention.launches import Tile

    def run(n: int, c: int, k: int, dtype: torch.dtype, backward: bool, batch: int) -> Any:
        from dataclasses import asdict

        small = {}
        if setting.small:
            small = {"tiles": iter([Tile(bn=16, bc=32, warps=4, stages=2)]), "clock": seconds}
        found = tune_attention(
            width=c, heads=c // 32, k=k, positions=n, batch=batch, dtype=dtype,
            device=setting.device, backward=backward, **small,
        )  # fmt: skip
        print(tuning.told(found), flush=True)
        return asdict(found)

    if setting.small:
        if importlib.util.find_spec("triton") is None:
            return
        for way in (False, True):
            yield f"small-{way}", lambda way=way: run(32, 64, 4, torch.float32, way, 1)
        return
    import neighbor_attention as bench

    for preset, shapes in bench.SHAPES.items():
        for (n, c), k, way in itertools.product(shapes, (4, 20), (False, True)):
            name = f"{preset}-{n}x{c}-k{k}-{'backward' if way else 'forward'}"
            sizes = (n, c, k, torch.bfloat16, way, 64)
            yield name, lambda sizes=sizes: run(*sizes)


STAGES = {
    "machine": Stage("the device, its copy bandwidth and its product peaks", machine),
    "kernels": Stage("every kernel against the formula in float64", kernels, interpreted=True),
    "tests": Stage("pytest -m gpu", tests),
    "attention": Stage("attention at the presets' shapes, bfloat16, k = 4", attention),
    "network": Stage("a guided step of a whole UNet, by attention path", network),
    "search": Stage("20 million rows, 128 queries", search, interpreted=True),
    "throughput": Stage("whole images per second, against diffusers", throughput),
    "unet": Stage("one guided step, against diffusers", unet),
    "rarm": Stage("the autoregressive transformer, with a cache and without", rarm),
    "tune": Stage("launch sizes, kept in the user's cache folder", tune, interpreted=True),
    "attention-more": Stage(
        "attention with other k and types", lambda setting: attention(setting, more=True)
    ),
}
"""In the order in which they run; `report` follows each."""


# --- running ------------------------------------------------------------------------------------


def script(name: str, options: Sequence[str], out: str = "--out") -> Any:
    """What a benchmark writes when it is run with these options, in this process."""
    import importlib
    import tempfile
    from unittest.mock import patch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        with patch.object(sys, "argv", [name, *options, out, str(file)]):
            code = importlib.import_module(name).main()
        if code:
            raise RuntimeError(f"{name} ended with {code}")
        return json.loads(file.read_text())


def seconds(run: Run) -> float:
    """Of one call, by the clock of the CPU."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def copy_of(setting: Setting) -> float:
    """Bytes per second of a copy, as the stage `machine` measured them."""
    found = done_units(setting, "machine").get("machine", {})
    if "result" in found:
        return found["result"]["copy"]
    import neighbor_attention as bench

    return bench.copy_bandwidth(bench.Clock(setting.device, 5), setting.device)


def about(setting: Setting) -> dict[str, Any]:
    """Device, versions and date."""
    import importlib.metadata

    import torch

    versions = {}
    for name in ("torch", "triton", "diffusers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = f"{platform.machine()} CPU"
    if setting.device == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "versions": versions,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "small": setting.small,
    }


def same(found: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a result belongs to this device and these versions."""
    return all(found.get("about", {}).get(key) == here[key] for key in ("device", "versions"))


def done_units(setting: Setting, stage: str) -> dict[str, dict[str, Any]]:
    """Results by unit; a unit that has begun and has no result counts as failed."""
    found = {}
    for path in sorted((setting.folder / stage).glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError:
            continue
    return found


def plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def write(path: Path, value: Any) -> None:
    """JSON that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(partial, path)


def work(setting: Setting, stage: str, again: bool) -> int:
    """Runs the units of a stage that are not done; 0: all are, 3: time is up."""
    began, here = time.perf_counter(), about(setting)
    units = [(plain_name(name), run) for name, run in STAGES[stage].units(setting)]
    known = done_units(setting, stage)
    retry = again and not os.environ.get("RETRODIFF_GPU_CONTINUED")
    for number, (name, run) in enumerate(units, 1):
        file = setting.folder / stage / f"{name}.json"
        before = known.get(name)
        if before and same(before, here) and not (retry and "error" in before):
            continue
        if time.perf_counter() - began > LAST_START:
            print(f"{stage}: {number - 1} of {len(units)} units are done", flush=True)
            return 3
        print(f"{stage} {number}/{len(units)}: {name}", flush=True)
        started = time.perf_counter()
        # Left behind by a process that was ended, this says what it was doing.
        write(file, {"about": here, "error": f"did not end (or took over {LIMIT:.0f} s)"})
        found: dict[str, Any] = {"about": here}
        try:
            found["result"] = run()
        except KeyboardInterrupt:
            file.unlink()
            raise
        except (Exception, SystemExit) as error:
            found["error"] = f"{type(error).__name__}: {error}"
            print(f"  failed: {found['error'][:300]}", flush=True)
        found["seconds"] = time.perf_counter() - started
        write(file, found)
        if "illegal memory access" in found.get("error", ""):
            return 3  # the device is of no more use to this process
    return 0


def run_stage(setting: Setting, names: Sequence[str], again: bool, whole: bool) -> int:
    """Stages in one process of their own; with ``whole`` as often as it takes."""
    command = [sys.executable, str(HERE / "gpu.py"), "--worker", "--device", setting.device]
    command += ["--folder", str(setting.folder)] + (["--small"] if setting.small else [])
    command += ["--again"] if again else []
    for name in names:
        command += ["--stage", name]
    environment = dict(os.environ)
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if setting.small and any(STAGES[name].interpreted for name in names):
        environment["TRITON_INTERPRET"] = "1"
    if setting.small:  # toy sizes are kept beside toy figures
        environment["RETRODIFF_CACHE"] = str(setting.folder / "cache")
    while True:
        try:
            code = subprocess.run(command, env=environment, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = 3
        if code == 3 and whole:
            environment["RETRODIFF_GPU_CONTINUED"] = "1"
            continue
        return code


def missing(device: str) -> str | None:
    """What this machine lacks, in one line; None: nothing."""
    for name in NEEDED[:1] + NEEDED[2:] if device == "cpu" else NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: python -m pip install {name}"
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 6):
        return f"torch {torch.__version__} is older than 2.6"
    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA device here: run this where one is, or try "
            "the scripts with python benchmarks/gpu.py --small --device cpu"
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", action="append", choices=[*STAGES, "report"], help="one alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: figures say nothing")
    parser.add_argument("--again", action="store_true", help="failed units once more")
    parser.add_argument("--folder", type=Path, help="of the results; runs/gpu/DEVICE if left out")
    parser.add_argument("--docs", type=Path, help="page that gets the tables; docs/gpu.md on a GPU")
    parser.add_argument("--list", action="store_true", help="the stages")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        for name, stage in STAGES.items():
            print(f"{name:15} {stage.about}")
        print(f"{'report':15} tables, csv, plots and the page of the documentation")
        return 0
    if options.device == "cpu" and not options.small:
        print("gpu: --device cpu goes with --small: it tries the scripts", file=sys.stderr)
        return 2
    if lacking := missing(options.device):
        print(f"gpu: {lacking}", file=sys.stderr)
        return 2
    folder = options.folder
    if folder is None:
        name = plain_name(about(Setting(options.device, options.small, Path()))["device"])
        folder = ROOT / "runs" / "gpu" / (name + ("-small" if options.small else ""))
    setting = Setting(options.device, options.small, folder.resolve())
    stages = options.stage or [*STAGES, "report"]
    if options.worker:
        codes = [work(setting, stage, options.again) for stage in stages]
        return max(codes)
    return conduct(setting, stages, options)


def conduct(setting: Setting, stages: Sequence[str], options: argparse.Namespace) -> int:
    """Stages one after the other, then the report."""
    from gpu_report import report

    work_on = [stage for stage in stages if stage != "report"]
    groups: list[list[str]] = [[stage] for stage in work_on]
    if setting.small:  # two processes are enough
        groups = [
            some
            for way in (False, True)
            if (some := [name for name in work_on if STAGES[name].interpreted == way])
        ]
    code = 0
    for group in groups:
        code = max(code, run_stage(setting, group, options.again, whole=len(work_on) > 1))
    docs = options.docs
    if docs is None and setting.device == "cuda" and not setting.small:
        docs = ROOT / "docs" / "gpu.md"
    results = {name: done_units(setting, name) for name in STAGES}
    failed = report(results, setting.folder, docs, about(setting))
    if code == 3:
        print(f"not done: run the same again (results so far: {setting.folder})")
        return 3
    return 1 if failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
