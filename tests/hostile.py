"""Runs hostile files in a process that notes whatever is run, fetched or read because of them.

``python hostile.py FOLDER`` prints JSON: for each case its place, its payload, how it ended, and
what Python's audit hook saw. `test_hostile_files` looks at the result.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import sys
import threading
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_payloads import EACH, OF_NUMBERS, OUTSIDE, PAYLOADS, WITNESS
from hostile_pickles import pickles
from parts import HashingEncoder, small_network

from retrodiff.checkpoints.foreign.torch_files import read_pickled
from retrodiff.checkpoints.sharded import load_shards
from retrodiff.databases import Images, build_database, open_database
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    Interval,
    NeighborEmbeddings,
)
from retrodiff.disk.files import check_free
from retrodiff.disk.seal import state_folder
from retrodiff.disk.unpickling import read_plain_pickle
from retrodiff.encoders import CLIPEncoder, TimmEncoder, load_encoder, save_encoder
from retrodiff.indexes import Annoy
from retrodiff.interfaces import Fingerprint, Query
from retrodiff.model import Model
from retrodiff.model.generated import MARKER as GENERATION
from retrodiff.model.generated import own_files as own_samples
from retrodiff.networks import PrincipalPatches
from retrodiff.retrieval import (
    ExcludeGroup,
    NearestNeighbors,
    NeighborCounts,
    neighbor_table,
    open_neighbor_table,
)
from retrodiff.testing import small_database

# --- watching ------------------------------------------------------------------------------------


class Pooled(HashingEncoder):
    """Mean colors: an encoder of width 3."""

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(encoder="pooled", weights="0", preprocessing="none", dim=3)

    @property
    def dim(self) -> int:
        return 3

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


class Watch:
    """What happens while a case runs."""

    def __init__(self, root: Path, outside: Path):
        self.root, self.outside = root, str(outside)
        self.armed = False
        self.seen: list[str] = []
        prefixes = {sys.prefix, sys.base_prefix, *(p for p in sys.path if p), str(root)}
        prefixes.add(str(state_folder()))
        self.code = tuple({str(Path(p).resolve()) for p in prefixes} | prefixes)
        self.open = (*self.code, "/usr/lib", "/lib", "/sys/", "/proc/cpuinfo", "/proc/self/maps")
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or threading.current_thread() is not threading.main_thread():
            return
        if event in ("open", "os.listdir", "os.scandir", "glob.glob"):
            path = args[0]
            if isinstance(path, int) or path is None:
                return
            path = str(Path(os.fsdecode(path)).absolute())
            real = str(Path(path).resolve())
            if real.startswith(self.outside) or not real.startswith(self.open):
                self.seen.append(f"{event} {path}")
        elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn",
                               "os.fork", "os.spawn", "urllib.", "http.", "pty.", "ctypes.dlopen",
                               "os.remove", "os.rename", "os.symlink", "os.truncate", "os.putenv",
                               "shutil.", "webbrowser.", "os.startfile")):  # fmt: skip
            if event in ("socket.__new__", "socket.gethostname"):
                return
            self.seen.append(f"{event} {args!r:.200}")
            raise PermissionError(f"{event} is blocked here")
        elif event == "exec":
            name = getattr(args[0], "co_filename", "")
            if name.startswith("/") and not name.startswith(self.code):
                self.seen.append(f"exec {name}")
        elif event == "import" and str(args[0]).startswith(("evil", "transformers")):
            self.seen.append(f"import {args[0]}")


# --- files to begin with -------------------------------------------------------------------------


def originals(folder: Path) -> None:
    """A model, an encoder of each kind, a database and a generation, all sound."""
    database = small_database(rows=40, dim=8, seed=0)
    torch.manual_seed(0)
    model = Model(
        encoder=HashingEncoder(),
        database=database,
        conditioner=Dropped(NeighborEmbeddings("raw"), 0.1),
        denoiser=EDMDenoiser(small_network()),
        sampler=DPMpp2M(),
        guidance=Interval(ClassifierFree(2.0), 0.0, float("inf")),
        autoencoder=PrincipalPatches(channels=1, patch=1, components=1),
        retriever=ExcludeGroup(NearestNeighbors(), "label"),
        proposal=NeighborCounts(torch.tensor([1, 5]), torch.tensor([3, 1]), database.fingerprint),
        steps=2,
    )
    model.save(folder / "model")
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
    tiny = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    save_encoder(CLIPEncoder.from_config(tiny), folder / "clip")
    save_encoder(TimmEncoder("test_resnet", image_size=32), folder / "timm")
    pictures = Images([torch.rand(3, 8, 8) * 2 - 1 for _ in range(12)])
    build_database(folder / "database", pictures, Pooled(), progress=False)
    opened = open_database(folder / "database")
    opened.build_index(Annoy(trees=2))
    query = Query(opened.embeddings(torch.arange(3)), ("a", "b", "c"))
    (folder / "table").mkdir()
    neighbor_table(
        query,
        opened,
        2,
        NearestNeighbors(),
        path=folder / "table/table.safetensors",
        progress=False,
    )
    opened_counts = NeighborCounts(torch.tensor([1]), torch.tensor([3]), opened.fingerprint)
    opened_counts.save(folder / "table/counts.safetensors")
    model.sample(prompts=["a"], progress=False).save(folder / "samples")
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    shutil.copytree(folder / "model", folder / "sharded")
    from safetensors.torch import load_file

    names = load_file(folder / "model/weights.safetensors")
    (folder / "sharded/weights.safetensors").rename(
        folder / "sharded/weights-00001-of-00001.safetensors"
    )
    index["weight_map"] = dict.fromkeys(names, "weights-00001-of-00001.safetensors")
    (folder / "sharded/weights.safetensors.index.json").write_text(json.dumps(index))


# --- cases ---------------------------------------------------------------------------------------

Run = Callable[[], Any]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of a JSON value: every entry, inner ones too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 2)):
            yield from leaves(value[i], (*path, i))


def changed(value: Any, path: tuple[Any, ...], payload: Any) -> Any:
    """A copy with a payload in one place."""
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = payload
    return made


def chosen(value: Any, path: tuple[Any, ...], number: int) -> list[Any]:
    """The payloads for a place."""
    for key in path:
        value = value[key]
    many = EACH if value is None or isinstance(value, (str, dict, list)) else OF_NUMBERS
    return (PAYLOADS * 2)[number * 7 % len(PAYLOADS) :][:many]


def filled(payload: Any, folder: Path) -> Any:
    """A payload with the paths of this run."""
    text = json.dumps(payload)
    text = text.replace(OUTSIDE, str(folder / "outside")).replace(WITNESS, str(folder / "ran"))
    return json.loads(text)


def json_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """Every payload in every place of every JSON file of ours."""
    own = {"encoder": HashingEncoder(), "database": None}
    bare = HashingEncoder()
    readers: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
        "model": ("model", "model.json", lambda at: Model.load(at, **own)),
        "database": ("model", "model.json", lambda at: Model.load(at, encoder=bare)),
        "clip": ("clip", "encoder.json", lambda at: load_encoder(at).encode_text(["a"])),
        "timm": ("timm", "encoder.json", load_encoder),
        "manifest": ("database", "manifest.json", _searched),
        "saved index": (
            "database",
            "indexes/annoy/index.json",
            lambda at: open_database(at, "annoy").search(Query(torch.ones(1, 3), ("a",)), 2),
        ),
        "generation": (
            "samples",
            "generation.json",
            lambda at: check_free(at, GENERATION, True, own_samples),
        ),
        "index": ("sharded", "weights.safetensors.index.json", lambda at: Model.load(at, **own)),
    }
    made = {"path": "/x", "relative": "../x", "fingerprint": vars(bare.fingerprint), "seal": "0"}
    hub = {"address": "hf://datasets/a/b", "fingerprint": vars(bare.fingerprint), "seal": "0"}
    named = {"kind": "open_clip", "name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    for place, (base, name, read) in readers.items():
        at = folder / "work" / place
        shutil.copytree(folder / "original" / base, at)
        sound = json.loads((at / name).read_text())
        places = list(leaves(sound))
        if place == "database":
            places = []
            for value in (made, hub):
                inside = changed(sound, ("components", "database"), value)
                for path in leaves(value):
                    places.append((("components", "database", *path), inside))
            inside = changed(sound, ("components", "encoder"), {"name": named})
            places += [(("components", "encoder", *p), inside) for p in leaves({"name": named})]
            inside = changed(sound, ("components", "encoder"), {"folder": "encoder"})
            places.append((("components", "encoder", "folder"), inside))
            read = Model.load
        elif place == "index":
            places = [
                ("metadata",),
                ("weight_map",),
                ("weight_map", next(iter(sound["weight_map"]))),
            ]
        for number, path in enumerate(places):
            path, value = path if place == "database" else (path, sound)
            for payload in chosen(value, path, number):
                payload = filled(payload, folder)

                def run(path=path, value=value, payload=payload, at=at, name=name, read=read):
                    (at / name).write_text(json.dumps(changed(value, path, payload)))
                    return read(at)

                yield f"{place}: {'.'.join(map(str, path))}", payload, run
        for extra in ARGUMENTS.get(place, []):
            where, payload = extra[:-1], filled(extra[-1], folder)

            def add(where=where, payload=payload, at=at, name=name, read=read, sound=sound):
                (at / name).write_text(json.dumps(changed(sound, where, payload)))
                return read(at)

            yield f"{place}: {'.'.join(map(str, where))}", payload, add


_URL = "http://127.0.0.1:9/x"
_NET = ("components", "denoiser", "config", "network", "config")
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "timm": [
        ("pretrained_cfg", {"url": _URL}), ("pretrained_cfg", {"file": "OUTSIDE/secret.pt"}),
        ("pretrained_cfg_overlay", {"url": _URL}), ("checkpoint_path", "OUTSIDE/secret.pt"),
        ("cache_dir", "OUTSIDE"), ("pretrained", True), ("scriptable", True),
        ("features_only", True), ("device", "cuda:99"), ("in_chans", 10**7), ("image_size", 10**9),
        ("kind", "open_clip"), ("embed_dim", 2**40), ("act_layer", "os.system"),
    ],
    "clip": [
        ("config", "text_cfg", "hf_model_name", "evil/model"),
        ("config", "text_cfg", "hf_tokenizer_name", "evil/model"),
        ("config", "text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
        ("config", "vision_cfg", "timm_model_name", "hf-hub:evil/model"),
        ("config", "vision_cfg", "timm_model_name", "local-dir:OUTSIDE"),
        ("config", "vision_cfg", "timm_model_pretrained", True),
        ("config", "cast_dtype", "float16"), ("config", "multimodal_cfg", {"width": 8}),
        ("name", "hf-hub:evil/model"), ("pretrained", "OUTSIDE/secret.pt"), ("kind", "timm"),
        ("config", "embed_dim", 2**40), ("config", "text_cfg", "vocab_size", 2**23),
        ("config", "text_cfg", "layers", 255), ("config", "vision_cfg", "width", 2**19),
    ],
    "model": [
        (*_NET, "depth", 65000), (*_NET, "width", 2**38), (*_NET, "widths", {"neighbors": 2**38}),
        (*_NET, "shape", [2**20, 2**10, 2**10]), (*_NET, "patch", 1),
        ("components", "schedule", {"class": "diffusion.ScaledLinear", "config": {"length": 9**9}}),
        ("components", "evil", "evil.Evil"), ("components", "encoder", {"folder": "../outside"}),
    ],
}  # fmt: skip


def _searched(at: Path) -> Any:
    database = open_database(at)
    rows = torch.arange(2)
    database.verify()
    return database.search(Query(torch.ones(1, 3), ("a",)), 2), database.records(rows)


def header_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """Every payload in every entry of the header of every safetensors file of ours."""
    opened = open_database(folder / "original/database")
    files: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
        "table": ("table", "table.safetensors", lambda file: open_neighbor_table(file, opened)),
        "counts": ("table", "counts.safetensors", NeighborCounts.load),
        "weights": ("model", "weights.safetensors", lambda file: load_shards(file)),
    }
    for place, (base, name, read) in files.items():
        at = folder / "work" / f"header-{place}"
        shutil.copytree(folder / "original" / base, at)
        data = (at / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        kept = dict(list(header.items())[:3])
        for number, path in enumerate(leaves(kept)):
            for payload in chosen(kept, path, number):
                payload = filled(payload, folder)
                payload = json.dumps(payload) if path[0] == "__metadata__" else payload

                made = json.dumps(changed(header, path, payload)).encode()
                made = len(made).to_bytes(8, "little") + made + data[end:]

                def run(made=made, file=at / name, read=read):
                    file.write_bytes(made)
                    return read(file)

                yield f"header of a {place}: {'.'.join(path[:1])}", payload, run


def link_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """Links out of a folder, in the place of each of its files."""
    outside = folder / "outside"
    targets = [outside / "secret.json", outside, Path("/etc/passwd"), Path("/dev/zero"),
               Path("loop")]  # fmt: skip
    own = {"encoder": HashingEncoder(), "database": None}
    files = [("model", f, lambda at: Model.load(at, **own)) for f in
             ("model.json", "weights.safetensors")]  # fmt: skip
    files += [("sharded", "weights-00001-of-00001.safetensors", lambda at: Model.load(at, **own))]
    files += [("sharded", "weights.safetensors.index.json", lambda at: Model.load(at, **own))]
    files += [("clip", f, load_encoder) for f in ("encoder.json", "encoder.safetensors")]
    for base, name, read in files:
        for number, target in enumerate([*targets, outside / name]):
            at = folder / "work" / f"link-{base}-{name}-{number}"
            shutil.copytree(folder / "original" / base, at)
            (at / name).unlink()
            (at / name).symlink_to(name if target.name == "loop" else target)
            yield f"link: {base}/{name}", str(target), lambda at=at, read=read: read(at)


def pickle_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """Pickles as a checkpoint and as a file of data."""
    for name, data in pickles(folder).items():
        path = folder / "work" / "pickle.ckpt"

        def checkpoint(data=data, path=path):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("model/data.pkl", data)
            return read_pickled(path)

        yield "checkpoint", name, checkpoint
        yield (
            "plain pickle",
            name,
            lambda data=data: np.asarray(read_plain_pickle(io.BytesIO(data), "it"), dtype=object),
        )

    def bomb() -> Any:
        path = folder / "work" / "bomb.ckpt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model/data.pkl", b"0" * (1 << 20))
        data = path.read_bytes()  # the directory's word for the size is what a reader believes
        claimed = (1 << 20).to_bytes(4, "little")
        path.write_bytes(data.replace(claimed, (1 << 31).to_bytes(4, "little")))
        return read_pickled(path)

    yield "checkpoint", "compressed bomb", bomb

    def spread() -> Any:
        path = folder / "work" / "spread.ckpt"
        torch.save({"a": torch.zeros(1).expand(2**40)}, path)
        return read_pickled(path)["a"].clone()

    yield "checkpoint", "one number expanded to 2^40", spread


def control_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """What the watch must see, or it proves nothing."""
    yield "control", "read", lambda: (folder / "outside/secret.json").read_text()
    yield "control", "list", lambda: list((folder / "outside").iterdir())
    yield "control", "run", lambda: os.system("true")
    yield "control", "fetch", lambda: urllib.request.urlopen("http://127.0.0.1:9/x")
    yield "control", "import", lambda: __import__("evil_twin")


def text_cases(folder: Path) -> Iterator[tuple[str, Any, Run]]:
    """JSON that is damaged, deep, double or too large."""
    own = {"encoder": HashingEncoder(), "database": None}
    contents = {
        "deep list": "[" * 100_000,
        "deep object": '{"a":' * 100_000,
        "twice": '{"format": 1, "format": 2}',
        "NaN": '{"format": NaN}',
        "huge number": '{"format": 1' + "0" * 5000 + "}",
        "infinite": '{"format": 1e999}',
        "not UTF-8": b"\xff\xfe{}",
        "empty": "",
        "null": "null",
        "surrogate": '{"format": 2, "components": {"\\ud800": 1}}',
        "large": " " * (1 << 26) + " {}",
        "escape": '{"format": "\\u001b[2J\\u001b]0;evil\\u0007"}',
        "text": '"text"',
        "list": "[]",
        "true format": '{"format": true, "components": {}}',
        "format 3": '{"format": 3}',
    }
    for base, name, read in (
        ("model", "model.json", lambda at: Model.load(at, **own)),
        ("clip", "encoder.json", load_encoder),
        ("sharded", "weights.safetensors.index.json", lambda at: Model.load(at, **own)),
    ):
        at = folder / "work" / f"text-{base}"
        shutil.copytree(folder / "original" / base, at)
        for what, content in contents.items():

            def run(at=at, name=name, read=read, content=content):
                data = content if isinstance(content, bytes) else content.encode()
                (at / name).write_bytes(data)
                return read(at)

            yield f"text: {name}", what, run


def main(folder: Path) -> None:
    """Runs all cases and prints what was seen."""
    (folder / "work").mkdir(parents=True)
    originals(folder / "original")
    outside = folder / "outside"
    shutil.copytree(folder / "original/model", outside)
    shutil.copytree(folder / "original/clip", outside / "encoder")
    shutil.copy(outside / "encoder/encoder.safetensors", outside)
    shutil.copy(outside / "encoder/encoder.json", outside)
    (outside / "secret.json").write_text('{"password": "secret"}')
    (outside / "open_clip_config.json").write_text("{}")
    torch.save({"a": torch.zeros(2)}, outside / "secret.pt")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nEvil = 1\n")
    sys.path.insert(0, str(folder))
    (folder / "evil_twin.py").write_text("")
    import open_clip
    import timm

    timm.is_model("resnet18")
    open_clip.list_models()
    load_encoder(folder / "original/clip").encode_text(["warm"])  # what is loaded lazily, once
    load_encoder(folder / "original/timm")
    Model.load(folder / "original/model", encoder=HashingEncoder(), database=None)
    open_database(folder / "original/database", "annoy").search(Query(torch.ones(1, 3), ("a",)), 2)
    watch = Watch(folder / "work", outside)
    results = []
    for group in (control_cases, json_cases, header_cases, link_cases, pickle_cases, text_cases):
        for place, payload, run in group(folder):
            watch.seen = []
            end, line = "loaded", ""
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                watch.armed = True
                try:
                    run()
                except (ValueError, OSError) as error:
                    end, line = "refused", f"{type(error).__name__}: {error}"
                except BaseException as error:
                    end, line = type(error).__name__, str(error)
                finally:
                    watch.armed = False
            shown = payload if isinstance(payload, str) else json.dumps(payload)
            results.append(
                {"place": place, "payload": shown[:80], "end": end, "line": line[:2000],
                 "seen": sorted(set(watch.seen))[:5]}
            )  # fmt: skip
    ran = (folder / "ran").exists() or "evil" in sys.modules
    print(json.dumps({"ran": ran, "results": results, "peak": _peak()}))


def _peak() -> float:
    """Gigabytes of this program at its largest; ``ru_maxrss`` would count the parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


if __name__ == "__main__":
    main(Path(sys.argv[1]))
