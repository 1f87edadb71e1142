"""Plugs components together: one slot each, filled by an object or by a recipe that runs last.

Immutable: every step returns a new builder, so a preset can be the start of many models. `build`
runs the recipes, then names all empty or disagreeing slots at once. Models do not share what is
trained: a recipe makes new networks each time, and a network that is handed in as a finished object
belongs to the first model that is built with it; later ones get copies.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, get_args

from torch import nn

from retrodiff.components import modules
from retrodiff.diffusion.autoencoder import Identity
from retrodiff.diffusion.guidance import Unguided
from retrodiff.diffusion.sampler import get_sampler
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Database,
    Denoiser,
    Encoder,
    Generator,
    Guidance,
    Prior,
    ProposalDistribution,
    Retriever,
    Sampler,
    Schedule,
)
from retrodiff.model import Model
from retrodiff.model.checks import check_components
from retrodiff.retrieval.retriever import NearestNeighbors

T = TypeVar("T")
P = ParamSpec("P")
Slot = T | Callable[[], T]
"""A finished component, or a function without arguments that makes it when `build` runs."""

SLOTS = tuple(f.name for f in dataclasses.fields(Model))

TRAINED = ("denoiser", "conditioner", "generator")
"""Slots whose weights training changes."""

_OWNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Networks that a built model has."""


@dataclasses.dataclass(frozen=True)
class Builder:
    """Collects components and builds a `Model` of them.

    Slots that a plain model can do without have a default: nearest neighbors, no guidance, pixel
    space, and the denoiser's own schedule and sampler DDIM.

    Args:
        slots: components by the name of their slot. Use the methods in its place.

    Examples:
        >>> from retrodiff import Builder
        >>> from retrodiff.diffusion import DDIM, ClassifierFree
        >>> recipe = Builder().sampler(DDIM()).guidance(ClassifierFree(2.0))
        >>> recipe.build()
        Traceback (most recent call last):
        ...
        ValueError: the components do not fit together:
          - denoiser is empty: set it with .denoiser(...)
          - conditioner is empty: set it with .conditioner(...)
    """

    slots: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def set(self, **slots: Any) -> Builder:
        """A copy of the recipe with these slots filled; None empties a slot.

        Raises:
            ValueError: there is no slot of that name.
        """
        unknown = sorted(set(slots) - set(SLOTS))
        if unknown:
            raise ValueError(f"no slot {', '.join(unknown)}: the slots are {', '.join(SLOTS)}")
        return Builder(MappingProxyType({**self.slots, **slots}))

    def encoder(self, encoder: Slot[Encoder] | str) -> Builder:
        """Sets the encoder: an object, a folder, ``open_clip:MODEL:TAG`` or ``timm:NAME``."""
        if isinstance(encoder, str):
            from retrodiff.encoders import encoder_from_string

            encoder = functools.partial(encoder_from_string, encoder)
        return self.set(encoder=encoder)

    def database(self, database: Slot[Database] | str | Path) -> Builder:
        """Sets the database: an object, or the folder of one."""
        if isinstance(database, (str, Path)):
            from retrodiff.databases import open_database

            database = functools.partial(open_database, database)
        return self.set(database=database)

    def retriever(self, retriever: Slot[Retriever]) -> Builder:
        """Sets what chooses rows for a query; `NearestNeighbors` unless set."""
        return self.set(retriever=retriever)

    def proposal(self, proposal: Slot[ProposalDistribution]) -> Builder:
        """Sets the distribution over rows used as queries in unconditional sampling (p_D)."""
        return self.set(proposal=proposal)

    def prior(self, prior: Slot[Prior]) -> Builder:
        """Sets what turns embeddings of prompts into embeddings of images; none unless set."""
        return self.set(prior=prior)

    def conditioner(self, conditioner: Slot[Conditioner]) -> Builder:
        """Sets what turns query and neighbors into tokens for the network."""
        return self.set(conditioner=conditioner)

    def denoiser(self, denoiser: Slot[Denoiser]) -> Builder:
        """Sets the network with its parametrization."""
        return self.set(denoiser=denoiser)

    def guidance(self, guidance: Slot[Guidance]) -> Builder:
        """Sets how condition and null are combined; `Unguided` unless set."""
        return self.set(guidance=guidance)

    def sampler(self, sampler: Slot[Sampler] | str) -> Builder:
        """Sets the sampler: an object or a name; `DDIM` unless set."""
        if isinstance(sampler, str):
            sampler = get_sampler(sampler)
        return self.set(sampler=sampler)

    def schedule(self, schedule: Slot[Schedule]) -> Builder:
        """Sets the noise levels to sample at; the denoiser's own unless set."""
        return self.set(schedule=schedule)

    def generator(self, generator: Slot[Generator]) -> Builder:
        """Sets a generator in place of denoiser, sampler, guidance and autoencoder."""
        return self.set(generator=generator)

    def autoencoder(self, autoencoder: Slot[Autoencoder]) -> Builder:
        """Sets the latent space; `Identity` (pixels) unless set."""
        return self.set(autoencoder=autoencoder)

    def defaults(self, **numbers: Any) -> Builder:
        """Sets the model's ``k``, ``steps``, ``prompt_template`` and ``class_top``."""
        return self.set(**numbers)

    def build(self) -> Model:
        """Builds the model, with networks of its own.

        Denoiser, conditioner or generator handed in as finished objects are used as they are the
        first time, and copied, with the weights that they have then, if a built model has them
        already. To share them knowingly, use `Model.replace`.

        Raises:
            ValueError: one line for every empty or disagreeing slot.
        """
        slots: dict[str, Any] = {"retriever": NearestNeighbors(), **self.slots}
        if slots.get("generator") is None:
            plain = {"guidance": Unguided(), "sampler": get_sampler("ddim")}
            slots = {**plain, "autoencoder": Identity(), **slots}
        parts: dict[str, Any] = {}
        for name, value in slots.items():
            if _is_recipe(value):
                parts[name] = value()
            elif name in TRAINED and any(module in _OWNED for module in _networks(value)):
                parts[name] = copy.deepcopy(value)
            else:
                parts[name] = value
        check_components(parts)
        for name in TRAINED:
            _OWNED.update(_networks(parts.get(name)))
        return Model(**parts)

    @classmethod
    def from_model(cls, model: Model) -> Builder:
        """The recipe of a built model, which shares all of its components, networks included."""
        parts = model.parts()
        shared = {
            name: functools.partial(_itself, parts[name])
            for name in TRAINED
            if parts[name] is not None
        }
        return cls().set(**{**parts, **shared})

    @classmethod
    def from_preset(cls, preset: Callable[..., Any], /, **arguments: Any) -> Builder:
        """The open recipe of a preset.

        Args:
            preset: a function of `retrodiff.presets`, such as ``presets.rdm_imagenet``, or any
                function of your own that returns a Builder or a Model.
            arguments: of that function.

        Raises:
            TypeError: it has no such argument.
            ValueError: it is no function, or returns something else.
        """
        if not callable(preset):
            raise ValueError(
                f"a preset is a function, not {preset!r}: from_preset(presets.rdm_small, ...)"
            )
        recipe = getattr(preset, "recipe", preset)
        _refuse_unknown(recipe, arguments)
        made = recipe(**arguments)
        if isinstance(made, Model):
            return cls.from_model(made)
        if not isinstance(made, Builder):
            raise ValueError(
                f"a preset returns a Builder or a Model, but {preset} returned "
                f"{type(made).__name__}"
            )
        return made


def preset(recipe: Callable[P, Builder]) -> Callable[P, Model]:
    """Turns a function that returns a Builder into one that returns the built model.

    The open recipe stays at hand for `Builder.from_preset`.
    """

    @functools.wraps(recipe)
    def build(*args: P.args, **kwargs: P.kwargs) -> Model:
        _refuse_unknown(recipe, kwargs)
        return recipe(*args, **kwargs).build()

    build.recipe = recipe  # type: ignore[attr-defined]
    build.__annotations__ = {**recipe.__annotations__, "return": "Model"}
    return build


def preset_arguments(preset: Callable[..., Any]) -> dict[str, str]:
    """Names of a preset's arguments, and their types in words; those of ``Unpack[...]`` one by one.

    Args:
        preset: a function of `retrodiff.presets`, or your own.
    """
    recipe = getattr(preset, "recipe", preset)
    parameters = inspect.signature(recipe).parameters.values()
    named = {p.name: str(p.annotation) for p in parameters if p.kind is not p.VAR_KEYWORD}
    return named | _unpacked(recipe)


def _unpacked(recipe: Callable[..., Any]) -> dict[str, str]:
    """Arguments that come in as ``**options: Unpack[Options]``; none where they may be any.

    A partial function is asked for nothing here: the preset inside of it refuses for itself.
    """
    for parameter in inspect.signature(recipe).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            hint = parameter.annotation
            if isinstance(hint, str):  # annotations are postponed in the recipe's module
                words = hint.removeprefix("Unpack[").removesuffix("]")
                options = getattr(inspect.unwrap(recipe), "__globals__", {}).get(words)
            else:
                options = next(iter(get_args(hint)), None)
            hints = getattr(options, "__annotations__", {})
            return {name: str(getattr(h, "__forward_arg__", h)) for name, h in hints.items()}
    return {}


def _refuse_unknown(recipe: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """One line for an argument that ``**options`` would swallow; Python refuses all others."""
    known = preset_arguments(recipe)
    if _unpacked(recipe) and (unknown := sorted(set(given) - set(known))):
        raise TypeError(
            f"{recipe.__name__} has no argument {', '.join(unknown)}: it takes {', '.join(known)}"
        )


def _networks(component: Any) -> list[nn.Module]:
    """Every torch module inside a component, those inside of modules, too."""
    return [inner for module in modules(component) for inner in module.modules()]


def _itself(component: T) -> T:
    return component


def _is_recipe(value: Any) -> bool:
    """Functions, lambdas, methods and partials; a network is callable too, but a component."""
    return inspect.isroutine(value) or isinstance(value, functools.partial)
