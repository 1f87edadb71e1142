"""What a hostile file may hold in place of what belongs there."""

from __future__ import annotations

from typing import Any

WITNESS = "WITNESS"
"""Stands for the path that a payload's code would touch."""

OUTSIDE = "OUTSIDE"
"""Stands for a folder that holds a whole model, encoder, database and secrets."""

PAYLOADS: list[Any] = [
    # addresses
    "hf-hub:evil/model", "hf_hub:evil/model", "hf-hub:timm/resnet18.a1_in1k", "evil/model",
    "http://127.0.0.1:9/x.safetensors", "https://localhost:9/x", "ftp://127.0.0.1:9/x",
    "hf://datasets/evil/database", "hf://datasets/evil/database@main", "s3://bucket/x",
    "lance://127.0.0.1:9/x", "git+https://127.0.0.1:9/x", "data:text/plain,x", "//127.0.0.1/share",
    "\\\\127.0.0.1\\share\\x", {"url": "http://127.0.0.1:9/x"}, {"hf_hub_id": "evil/model"},
    {"file": "OUTSIDE/weights.safetensors"},
    # paths
    "local-dir:OUTSIDE", "local-dir:../outside", "OUTSIDE", "../outside", "OUTSIDE/encoder",
    "OUTSIDE/secret.json", "file://OUTSIDE/secret.json", "../outside/weights.safetensors",
    "./../outside", "~/.ssh/id_rsa", "/etc/passwd", "/dev/zero", "/proc/self/environ",
    "C:\\Windows\\win.ini", "nul\0byte", "%2e%2e/outside", "encoder/../../outside",
    # code
    "os.system", "subprocess.Popen", "builtins.eval", "posix.system", "evil.Evil", "evil:Evil",
    "retrodiff.disk.files.write_json", "retrodiff.cli.main", "retrodiff.model.Model",
    "torch.hub.load",
    "retrodiff.encoders.CLIPEncoder", "diffusion.sampler_named", "networks.Preconditioned",
    "__import__('os').system('touch WITNESS')", "$(touch WITNESS)", "`touch WITNESS`",
    "{0.__class__.__init__.__globals__}", "!!python/object/apply:os.system ['touch WITNESS']",
    {"class": "os.system", "config": {"command": "touch WITNESS"}},
    {"class": "retrodiff.disk.files.write_json", "config": {"path": "WITNESS", "value": 1}},
    {"class": "encoders.CLIPEncoder", "config": {"name": "hf-hub:evil/model"}},
    {"trust_remote_code": True}, {"custom": "os.system"}, {"tensor": "denoiser.network.embed.bias"},
    # sizes and kinds
    10**30, -1, 2**62, 0, 1e308, {"float": "nan"}, True, None, [], {}, [[[[]]]], ["x"] * 5000,
]  # fmt: skip


EACH, OF_NUMBERS = 40, 10
"""Payloads for each place, and for each place of a number; the next place begins with others."""
