"""The `Model`: a frozen set of components that samples, trains, saves and swaps parts.

``model.replace(database=art)`` is the paper's test-time swap and leaves the old model as it was.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.attention.recording import Measure
from retrodiff.components import inside, summary
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.diffusion.guidance import ClassifierFree
from retrodiff.diffusion.sampler import get_sampler
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Database,
    Denoiser,
    Encoder,
    Generator,
    Guidance,
    Mode,
    Neighbors,
    Prior,
    ProposalDistribution,
    Query,
    Retriever,
    Sampler,
    Schedule,
    member,
)
from retrodiff.model.asking import Asker, conditioned
from retrodiff.model.checks import check_components, check_context, check_role, missing_members
from retrodiff.model.estimates import OnStep
from retrodiff.model.generated import Generation
from retrodiff.model.neighbor_latents import seen
from retrodiff.model.placing import Placed
from retrodiff.model.request import read_request, refuse_unknown
from retrodiff.model.reretrieving import ReRetrieving, read_reretrieving
from retrodiff.model.sampling import generate
from retrodiff.model.sampling import sample as run
from retrodiff.model.saving import Saved
from retrodiff.numbers import is_real, real, whole


@dataclass(frozen=True, kw_only=True, repr=False)
class Model(Saved, Placed):
    """A retrieval-augmented generative model. Make one with `Builder` or a preset.

    Args:
        conditioner: how query and neighbors enter the network.
        retriever: which rows.
        denoiser: the network, as ``(x, sigma) -> denoised``.
        guidance: how strongly the condition acts.
        sampler: how noise becomes data.
        autoencoder: in which space.
        schedule: at which noise levels; None: the denoiser's own.
        generator: what generates in place of the five above, for models that are no diffusion
            models; None: a `DiffusionGenerator` of them.
        encoder: places images and prompts; None where nothing is ever encoded.
        database: what is retrieved from; None: only modes without a search work.
        proposal: distribution of the queries of unconditional sampling; None: it is refused.
        prior: turns embeddings of prompts into embeddings of images, before anything is retrieved
            for them; None: prompts are asked as they are encoded.
        k: tokens that condition an image, unless asked otherwise.
        prompt_template: turns a class name into a prompt.
        class_top: l, the nearest rows of a class prompt that k are drawn from.
        steps: of the sampler, unless asked otherwise.

    Examples:
        >>> from retrodiff import presets
        >>> model = presets.ldm()
        >>> out = model.sample(n=2, steps=2, seed=0)
        >>> out.images.shape
        torch.Size([2, 1, 8, 8])
        >>> again = model.replace(sampler=model.sampler).sample(n=2, steps=2, seed=0)
        >>> bool((again.images == out.images).all())
        True
    """

    conditioner: Conditioner
    retriever: Retriever
    denoiser: Denoiser | None = None
    guidance: Guidance | None = None
    sampler: Sampler | None = None
    autoencoder: Autoencoder | None = None
    schedule: Schedule | None = None
    generator: Generator | None = None
    encoder: Encoder | None = None
    database: Database | None = None
    proposal: ProposalDistribution | None = None
    prior: Prior | None = None
    k: int = 4
    prompt_template: str = "A photo of {}"
    class_top: int = 20
    steps: int = 50

    def __repr__(self) -> str:
        """One line for each slot that is filled."""
        lines = [
            f"  {name}={summary(part)}" for name, part in self.parts().items() if part is not None
        ]
        return "\n".join(["Model(", *lines, ")"])

    def parts(self) -> dict[str, Any]:
        """The components and numbers by slot."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    # --- sampling ------------------------------------------------------------------------------

    def sample(
        self,
        *,
        prompts: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        images: Any = None,
        query: Query | None = None,
        n: int | None = None,
        mode: Mode | Sequence[Mode] | None = None,
        k: int | None = None,
        guidance: Guidance | float | None = None,
        sampler: Sampler | str | None = None,
        steps: int | None = None,
        seed: int = 0,
        start: Any = None,
        strength: float | None = None,
        databases: Mapping[str, Database] | None = None,
        reretrieve: ReRetrieving | Sequence[int] | None = None,
        batch_size: int = 64,
        progress: bool = False,
        attribution: bool | Measure = False,
        on_step: OnStep | None = None,
        **unknown: Any,
    ) -> Generation:
        """Generates images. Give one of prompts, classes, images, query, or n alone.

        Args:
            prompts: texts, one image each (repeat a prompt for more).
            classes: class names, put into the prompt template.
            images: pictures whose neighbors condition: whatever `retrodiff.pictures.to_images`
                takes, such as a tensor (b, c, h, w) in [-1, 1], PIL images or paths. They are taken
                for new ones: `ExcludeSelf` leaves nothing out for them.
            query: embeddings of your own.
            n: number of unconditional images.
            mode: ``text`` the prompt's embedding alone, no search; ``text+neighbors`` it and its
                k - 1 neighbors; ``neighbors`` k neighbors of it; ``class`` k drawn from the
                class prompt's top rows; ``image`` k neighbors of the image; ``unconditional``
                k neighbors of a row drawn from the proposal. One word, or one per row. By default
                ``text+neighbors``, ``class``, ``image``, ``neighbors`` or ``unconditional``, by
                what was given.
            k: tokens that condition an image; ``text`` always has one.
            guidance: a classifier-free scale or a Guidance; None: the model's.
            sampler: a Sampler or its name; None: the model's.
            steps: of the sampler; None: the model's.
            seed: of everything random, 0 to 2⁶⁴ - 1. Image i of a seed has randomness of its own:
                it is the same whatever the batch size, the number of images and the modes of the
                others (to rounding).
            start: pictures to edit in place of beginning with noise (SDEdit, Meng et al. 2022): one
                for all images, or one for each, of the size that the model makes; whatever
                ``images`` takes.
            strength: how much of ``start`` is redone, with any sampler: of the steps the last
                ceil(strength * steps) are made, from the noise level before them. 0 gives it back,
                1 is sampling without it.
            databases: others than the model's own, by names that the guidance weighs: the same
                queries are asked of each, such as ``databases={"negative": watermarked},
                guidance=Mixture({"cond": 2.0, "negative": -1.0})``.
            reretrieve: steps at which neighbors are looked for again, for the image as it is
                estimated so far; recorded in ``Generation.renewed``. See `ReRetrieving`.
            batch_size: images per network call (twice that under guidance).
            progress: show a bar.
            attribution: fill in ``Generation.attribution``, which neighbor has which part where;
                True, or a measure of `retrodiff.attention.Recorder`. Images stay the same.
            on_step: told an `retrodiff.model.Estimate` after each step, to watch images form; what
                it raises ends the sampling.
            unknown: refused, with the name that the argument has here.

        Raises:
            ValueError: what was given does not fit together, or a part is missing; says which.
            FloatingPointError: no image is finite.
        """
        refuse_unknown(unknown, [*_SAMPLE])
        given = {"prompts": prompts, "classes": classes, "images": images, "query": query, "n": n}
        request = read_request(
            given,
            mode,
            k=self.k if k is None else k,
            steps=self.steps if steps is None else steps,
            seed=seed,
            batch_size=batch_size,
            start=start,
            strength=strength,
        )
        generator = self.generating(sampler, guidance)
        self._check_others(databases or {}, generator)
        return run(
            request,
            self.asker(),
            generator,
            progress=progress,
            attribution=attribution,
            others=databases,
            reretrieve=read_reretrieving(reretrieve),
            on_step=on_step,
        )

    def sample_latents(
        self,
        *,
        context: Context | Tensor,
        null: Context | Tensor | None = None,
        noise: Tensor,
        sampler: Sampler | str | None = None,
        steps: int | None = None,
        guidance: Guidance | float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents (b, c, h, w) in the generator's own space, from precomputed conditioning tokens.

        Args:
            context: a Context, or tokens (b, k, d).
            null: the unconditional branch's; None: the conditioner's null.
            noise: standard normal (b, c, h, w).
            sampler: a Sampler or its name; None: the model's.
            steps: of the sampler; None: the model's.
            guidance: a scale or a Guidance; None: the model's.
            generator: randomness of stochastic samplers: a `Randomness` of b rows, or one torch
                generator for the whole batch; None: torch's global one.

        Raises:
            ValueError: the context does not fit the network or the noise.
        """
        chosen = self.generating(sampler, guidance)
        held, empty = self._context(context), None if null is None else self._context(null)
        empty = self.conditioner.null(held) if empty is None else empty
        if noise.ndim != 4 or noise.shape[1] != chosen.shape[0]:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, expected (b, {chosen.shape[0]}, h, w)"
            )
        check_context(chosen, held, empty, len(noise))
        steps = whole("steps", self.steps if steps is None else steps)
        return generate(chosen, held, empty, noise, steps=steps, randomness=generator)

    def generating(
        self, sampler: Sampler | str | None = None, guidance: Guidance | float | None = None
    ) -> Generator:
        """The model's generator; of a diffusion model with another sampler or guidance, if given.

        Raises:
            ValueError: the model's generator has no sampler or guidance.
        """
        if self.generator is not None:
            guided: Any = getattr(self.generator, "guided", None)
            for name, value in (("sampler", sampler), ("guidance", guidance)):
                if value is not None and (name == "sampler" or guided is None):
                    raise ValueError(
                        f"{name}={value!r} has no effect: this model generates with "
                        f"{type(self.generator).__name__}, which has no {name}; leave it out"
                    )
            return self.generator if guidance is None else guided(guidance)
        chosen = self.diffusion()
        if sampler is not None:
            sampler = get_sampler(sampler) if isinstance(sampler, str) else sampler
            check_role("sampler", sampler)
            chosen = dataclasses.replace(chosen, sampler=sampler)
        if guidance is not None:
            if is_real(guidance):
                guidance = ClassifierFree(real("guidance", guidance))
            check_role("guidance", guidance)
            chosen = dataclasses.replace(chosen, guidance=cast("Guidance", guidance))
        return chosen

    def diffusion(self) -> DiffusionGenerator:
        """The diffusion half of the model.

        Raises:
            ValueError: the model generates with something else.
        """
        denoiser, guidance, sampler = self.denoiser, self.guidance, self.sampler
        if denoiser is None or guidance is None or sampler is None or self.autoencoder is None:
            raise ValueError(
                f"this model generates with {type(self.generator).__name__} and has no denoiser"
            )
        schedule = denoiser.schedule if self.schedule is None else self.schedule
        return DiffusionGenerator(
            denoiser=denoiser,
            guidance=guidance,
            sampler=sampler,
            schedule=schedule,
            autoencoder=self.autoencoder,
        )

    def asker(self) -> Asker:
        """The half of the model that retrieves and conditions."""
        names = (f.name for f in dataclasses.fields(Asker))
        return Asker(**{name: getattr(self, name) for name in names})

    def neighbors(self, query: Query, mode: Mode, k: int) -> Neighbors:
        """The k tokens that condition each query in a mode, with their records."""
        return self.asker().neighbors(query, mode, k)

    # --- training ------------------------------------------------------------------------------

    def loss(
        self,
        images: Tensor,
        query: Query,
        neighbors: Neighbors,
        generator: torch.Generator | None = None,
        *,
        drop: bool = True,
        **chosen: Tensor | None,
    ) -> Tensor:
        """The training objective of each image (b,).

        Args:
            images: (b, c, h, w) in [-1, 1].
            query: the images' own embeddings.
            neighbors: neighbors of the images.
            generator: of conditioning dropout, noise levels and noise, in that order.
            drop: apply conditioning dropout.
            chosen: ``sigma`` (b,) and ``noise`` (b, c, h, w) of a diffusion model, where they are
                not to be drawn.

        Raises:
            ValueError: what generates has no loss, so it cannot be trained.
        """
        trained: Any = self.generating()
        if missing_members("generator", trained) or not hasattr(trained, "loss"):
            raise ValueError(
                f"{type(trained).__name__} has no loss, so it cannot be trained: add loss(images, "
                "context, generator), as retrodiff.interfaces.TrainableGenerator says"
            )
        neighbors = seen(neighbors, self.conditioner, self.database, self.autoencoder)
        context = conditioned(self.conditioner, query, neighbors)
        if drop:
            context = self.conditioner.drop(context, generator)
        context = context.to(member(trained, Generator, "device"))
        return trained.loss(images, context, generator, **chosen)

    # --- change and keep -----------------------------------------------------------------------

    def replace(self, **components: Any) -> Model:
        """A model with other components; this one stays as it was.

        A new database leaves a fitted proposal behind: unconditional sampling then asks for
        ``Uniform()`` or ``NeighborCounts.fit(queries, database, k)``. Everything is checked again.

        Raises:
            ValueError: there is no part of that name, or the parts do not fit together.
        """
        if "database" in components and "proposal" not in components:
            proposal = self.proposal
            if proposal is not None and not _fits(proposal, components["database"]):
                components["proposal"] = None
        unknown = sorted(set(components) - set(self.parts()))
        if unknown:
            raise ValueError(
                f"a model has no {', '.join(unknown)}: its parts are {', '.join(self.parts())}"
            )
        model = dataclasses.replace(self, **components)
        check_components(model.parts())
        return model

    def _check_others(self, databases: Mapping[str, Database], generator: Generator) -> None:
        """Refuses databases that do not fit the model, or that nothing weighs."""
        guidance = getattr(generator, "guidance", None)
        weighed = list(inside(guidance))
        for name, database in databases.items():
            if not any(name in getattr(part, "weights", ()) for part in weighed):
                raise ValueError(
                    f"databases names {name!r}, but {guidance!r} does not weigh it: give "
                    f"guidance=Mixture({{'cond': 2.0, {name!r}: -1.0}})"
                )
            check_role("database", database)
            check_components({**self.parts(), "database": database, "proposal": None})

    def _context(self, context: Context | Tensor) -> Context:
        if isinstance(context, Context):
            return context
        streams = list(self.generating().widths) or ["neighbors"]
        if context.ndim not in (3, 4) or len(streams) != 1:
            raise ValueError(
                f"tokens of shape {tuple(context.shape)} make no context of the streams "
                f"{', '.join(streams)}: give (b, k, d) for one stream, or a Context"
            )
        return Context.of(context, streams[0])


_SAMPLE = {
    name: hint
    for name, hint in Model.sample.__annotations__.items()
    if name not in ("return", "unknown")
}


def _fits(proposal: ProposalDistribution, database: Database | None) -> bool:
    if database is None:
        return False
    try:
        proposal.support(database)
    except ValueError:
        return False
    return True
