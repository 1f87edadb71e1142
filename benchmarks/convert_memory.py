"""How much memory does ``retrodiff convert`` take on a published checkpoint?

Writes a checkpoint of the size and layout of the ImageNet model's (raw and averaged weights, first
stage, optimizer state; zeros, in a sparse file), runs the command line on it in a process of its
own, and samples that process's anonymous memory (RssAnon) from outside. The figure is its peak over
what a process has after ``import torch``. Linux only.

    python benchmarks/convert_memory.py            # 6.6 GB, sparse
    python benchmarks/convert_memory.py --quick    # a sixth of the width
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

BOUND = 3e9


def rss_anon(status: str) -> int:
    """Anonymous memory in bytes, from what /proc/PID/status says; 0 for a process that ended."""
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_of(command: list[str]) -> int:
    """The most anonymous memory that a command has while it runs."""
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        peak = max(peak, rss_anon(Path(f"/proc/{process.pid}/status").read_text()))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see above")
    return peak


def write_checkpoint(path: Path, unet: Mapping[str, Any]) -> None:
    """A Lightning checkpoint with all that training leaves in it, its numbers zero."""
    from retrodiff.checkpoints.foreign.compvis import ema_name
    from retrodiff.checkpoints.foreign.published import PUBLISHED
    from retrodiff.checkpoints.foreign.tensor_names import published_autoencoder, published_unet
    from retrodiff.checkpoints.foreign.transfer import their_names
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
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a narrow UNet, under a minute")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    arguments = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        raise SystemExit("convert_memory: there is no /proc here, this benchmark needs Linux")
    from retrodiff.checkpoints.foreign.published import PUBLISHED

    unet = dict(PUBLISHED["rdm_imagenet"].unet)
    if arguments.quick:
        unet["channels"] = 32
    code = "import torch; print(open('/proc/self/status').read())"
    status = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    before = rss_anon(status.stdout)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.ckpt", Path(folder) / "out"
        write_checkpoint(path, unet)
        command = [sys.executable, "-m", "retrodiff", "convert", str(path), str(out)]
        if arguments.quick:
            config = Path(folder) / "config.yaml"
            config.write_text(yaml.safe_dump(yaml_of(unet)))
            command += ["--config", str(config), "--scale", "raw"]
        else:
            command += ["--preset", "rdm_imagenet"]
        start = time.perf_counter()
        peak = peak_of(command)
        found = {
            "file_bytes": path.stat().st_size,
            "written_bytes": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
            "peak_bytes": peak,
            "torch_bytes": before,
            "grown_bytes": peak - before,
            "seconds": round(time.perf_counter() - start, 1),
            "bound_bytes": BOUND,
            "holds": peak - before <= BOUND,
        }
    print(f"file {found['file_bytes'] / 1e9:.2f} GB, torch {torch.__version__}")
    print(f"written {found['written_bytes'] / 1e9:.2f} GB in {found['seconds']} s")
    print(
        f"anonymous memory at most {peak / 1e9:.2f} GB, {found['grown_bytes'] / 1e9:.2f} GB more "
        f"than after import torch (bound {BOUND / 1e9} GB)"
    )
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
