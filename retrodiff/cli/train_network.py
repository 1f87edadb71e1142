"""Which network ``retrodiff train`` trains: a preset with its arguments, or a trained model."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrodiff.cli.train_data import Parts
    from retrodiff.model import Model
    from retrodiff.training.images import Images

NUMBERS = ("size", "channels", "k")
"""Options that are arguments of a preset, where it has them."""
PARTS = ("encoder", "database")
"""Arguments of presets that are options of their own."""
PLAIN = re.compile(r"\b(int|float|str|bool|Path|Checkpoint)\b")
"""Types of arguments that a file can hold."""
LARGEST_CONFIG = 1 << 20
LOOKED_AT = 2000
"""Images from which the first stage is computed, evenly spaced."""


@dataclass(frozen=True)
class Network:
    """What a command line says of the network.

    Args:
        preset: name of a function in `retrodiff.presets`.
        arguments: of it, all plain values.
        init: folder of a trained model, which then takes the place of the preset; None: there is
            none.
        first_stage: folder of a trained one; None: it is computed from the images.
    """

    preset: str = "rdm_small"
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    init: str | None = None
    first_stage: str | None = None

    def settings(self) -> dict[str, Any]:
        """What must be the same for two models to be the same."""
        if self.init is not None:
            return {"init": str(Path(self.init).resolve()), "k": self.arguments.get("k")}
        stage = self.first_stage and str(Path(self.first_stage).resolve())
        return {
            "preset": self.preset,
            **self.arguments,
            **({"first_stage": stage} if stage else {}),
        }


def read_network(options: argparse.Namespace) -> Network:
    """Reads and checks ``--preset``, ``--config``, ``--init`` and the numbers, before any work.

    Raises:
        ValueError: they disagree, or name what there is not; says which.
    """
    from retrodiff import presets

    given = {name: value for name in NUMBERS if (value := getattr(options, name)) is not None}
    if options.init is not None:
        for name in ("preset", "config", "channels", "first_stage"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"{name}={value} and init={options.init} disagree: the network comes from the "
                    "trained model; leave it out"
                )
        return Network(arguments=given, init=options.init)
    config = {} if options.config is None else _read(Path(options.config))
    named = config.pop("preset", None)
    if options.preset is not None and named not in (None, options.preset):
        raise ValueError(
            f"preset={options.preset} and preset: {named} of {options.config} disagree: give one "
            "of them"
        )
    preset = options.preset or named or "rdm_small"
    if preset not in presets.__all__:
        raise ValueError(f"no preset {str(preset)!r}: there are {', '.join(presets.__all__)}")
    known = arguments_of(getattr(presets, preset))
    for name, value in config.items():
        if name in PARTS:
            raise ValueError(
                f"{options.config} gives {name}, which is an option: take it out there, and give "
                f"{name}=..."
            )
        if name not in known:
            raise ValueError(
                f"{options.config} gives {name}, which {preset} does not have: its arguments are "
                f"{', '.join(known)}"
            )
        if known[name] == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{options.config}: {name} is {value!r}, expected a whole number")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}={value} has no effect on preset={preset}: leave it out")
        if name in config and config[name] != value:
            raise ValueError(
                f"{name}={value} and {name}: {config[name]} of {options.config} disagree: give one "
                "of them"
            )
    if options.first_stage is not None and "first_stage" not in _parameters(preset):
        raise ValueError(f"first_stage={options.first_stage} has no effect on preset={preset}")
    return Network(preset, {**config, **given}, first_stage=options.first_stage)


def _parameters(preset: str) -> Mapping[str, inspect.Parameter]:
    from retrodiff import presets

    found = getattr(presets, preset)
    return inspect.signature(getattr(found, "recipe", found)).parameters


def arguments_of(preset: Callable[..., Any]) -> dict[str, str]:
    """Arguments of a preset that can be said in plain values, with their types in words."""
    from retrodiff.builder import preset_arguments

    found = preset_arguments(preset)
    return {n: hint for n, hint in found.items() if n not in PARTS and PLAIN.search(hint)}


def build_network(
    network: Network, parts: Parts, images_of: Callable[[int], Images], device: str
) -> tuple[Model, Images]:
    """The model before training, and the images in its size.

    Args:
        network: what `read_network` returned.
        parts: encoder, database, and the model to start from, if there is one.
        images_of: reads the images in a size.
        device: where the network goes.
    """
    import torch

    from retrodiff import presets
    from retrodiff.checkpoints.first_stages import load_autoencoder
    from retrodiff.networks.principal import PrincipalPatches

    if parts.start is not None:
        k = network.arguments.get("k", parts.start.k)
        model = parts.start.replace(encoder=parts.encoder, database=parts.database, k=k)
        size = size_of(model)
        if network.arguments.get("size", size) != size:
            raise ValueError(
                f"size={network.arguments['size']} and init={network.init} disagree: that model "
                f"makes images of {size} pixels; leave it out"
            )
        return model.to(device), images_of(size)
    preset, parameters = getattr(presets, network.preset), _parameters(network.preset)
    arguments = {**network.arguments, "encoder": parts.encoder, "database": parts.database}
    images = None
    if "size" in parameters:
        images = images_of(arguments.get("size", parameters["size"].default))
    if network.first_stage is not None:
        arguments["first_stage"] = load_autoencoder(network.first_stage)
    elif "first_stage" in parameters and images is not None:
        n = len(images)
        some = images[torch.linspace(0, n - 1, min(n, LOOKED_AT)).long()]
        arguments["first_stage"] = PrincipalPatches.fit(some, patch=4, components=16)
    taken = {name: value for name, value in arguments.items() if _takes(parameters, name)}
    model: Model = preset(**taken)
    return model.to(device), images_of(size_of(model)) if images is None else images


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether a preset has an argument; one with keywords of any name has all of them."""
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or free


def size_of(model: Model) -> int:
    """Side of the images that a model makes."""
    import torch

    generating = model.generating()
    latents = torch.zeros(1, *generating.shape)
    return generating.decode(latents).shape[-1]


def _read(file: Path) -> dict[str, Any]:
    """A yaml or json file that holds arguments by name."""
    import yaml

    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"{file} is larger than a configuration is: give preset arguments")
        text = file.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text: give a yaml or json file") from None
    try:
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} cannot be read as {file.suffix or 'yaml'}: {why}") from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{file} holds no arguments by name, such as `channels: 96`")
    return value
