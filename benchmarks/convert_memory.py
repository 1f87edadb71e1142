"""How much memory does the conversion of a published checkpoint take?

Writes a checkpoint of the size and layout of the ImageNet model's (raw and averaged weights, first
stage, optimizer state; zeros, in a sparse file), converts it in a fresh process, and samples that
process's anonymous memory (RssAnon) from after ``import torch`` on. Linux only.

    python benchmarks/convert_memory.py            # 6.6 GB, sparse
    python benchmarks/convert_memory.py --quick    # an eighth of the width
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BOUND = 3e9


def rss_anon() -> int:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def write_checkpoint(path: Path, unet: Mapping[str, Any]) -> None:
    """A Lightning checkpoint with all that training leaves in it, its numbers zero."""
    from retrodiff.checkpoints.compvis import ema_name
    from retrodiff.checkpoints.names import published_autoencoder, published_unet
    from retrodiff.checkpoints.published import PUBLISHED
    from retrodiff.checkpoints.transfer import their_names
    from retrodiff.networks import UNet, VQAutoencoder

    with torch.device("meta"):
        network = UNet(**unet)
        first_stage = VQAutoencoder(**PUBLISHED["rdm_imagenet"].autoencoder)
    # Untouched memory and an unwritten file take no room.
    names = their_names(network, published_unet(network.config()))
    shapes = {names[k]: p.shape for k, p in network.state_dict().items()}
    state = {f"model.diffusion_model.{k}": torch.empty(s) for k, s in shapes.items()}
    state |= {ema_name(k): torch.empty(s) for k, s in shapes.items()}
    names = their_names(first_stage, published_autoencoder(first_stage.config()))
    for key, tensor in first_stage.state_dict().items():
        state[f"first_stage_model.{names[key]}"] = torch.empty(tensor.shape)
    moments = {
        i: {"step": 1, "exp_avg": torch.empty(s), "exp_avg_sq": torch.empty(s)}
        for i, s in enumerate(shapes.values())
    }
    with torch.serialization.skip_data():
        torch.save({"state_dict": state, "optimizer_states": [{"state": moments}]}, path)


def convert(path: Path, out: Path, config: Mapping[str, Any] | None, results: Any) -> None:
    """Loads and saves in this process; puts growth and peak of RssAnon into ``results``."""
    before, peak, done = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()

    from retrodiff.checkpoints import load_compvis
    from retrodiff.checkpoints.shards import save_sharded

    model = load_compvis(path, config, preset=None if config else "rdm_imagenet")
    loaded = time.perf_counter()
    save_sharded(model.unet.state_dict(), out / "unet")
    save_sharded(model.autoencoder.state_dict(), out / "autoencoder")
    saved = time.perf_counter()
    done.set()
    watcher.join()
    results.put(
        {
            "file_bytes": path.stat().st_size,
            "grown_bytes": max(peak, rss_anon()) - before,
            "load_s": round(loaded - start, 1),
            "save_s": round(saved - loaded, 1),
        }
    )


def yaml_of(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The published form of the configuration, for a UNet of another width."""
    numbers = {
        "image_size": unet["size"],
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": unet["channels"],
        "attention_resolutions": unet["attention_factors"],
        "num_res_blocks": unet["blocks_per_level"],
        "channel_mult": unet["multipliers"],
        "num_head_channels": unet["channels_per_head"],
        "use_spatial_transformer": True,
        "context_dim": unet["context_width"],
    }
    graph = {
        "z_channels": 3,
        "resolution": 256,
        "in_channels": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
    }
    first_stage = {"embed_dim": 3, "n_embed": 8192, "ddconfig": graph}
    return {
        "model": {
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0195,
                "unet_config": {"target": "UNetModel", "params": numbers},
                "first_stage_config": {"target": "VQModelInterface", "params": first_stage},
            }
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a narrow UNet, under a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    arguments = parser.parse_args()
    from retrodiff.checkpoints.published import PUBLISHED

    unet = dict(PUBLISHED["rdm_imagenet"].unet)
    if arguments.quick:
        unet["channels"] = 32
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        write_checkpoint(path, unet)
        # A new interpreter: nothing that wrote the file counts.
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        config = yaml_of(unet) if arguments.quick else None
        child = context.Process(target=convert, args=(path, Path(folder), config, results))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit("the conversion failed, see above")
        found = results.get()
    found["bound_bytes"] = BOUND
    found["holds"] = found["grown_bytes"] <= BOUND
    print(f"file {found['file_bytes'] / 1e9:.2f} GB, torch {torch.__version__}")
    print(f"anonymous memory grew by {found['grown_bytes'] / 1e9:.2f} GB (bound {BOUND / 1e9} GB)")
    print(f"loaded in {found['load_s']} s, saved in {found['save_s']} s")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
