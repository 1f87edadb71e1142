"""The built model: every component in its place, frozen; sample, train, swap, save.

``model.replace(database=art)`` is the paper's test-time swap and leaves the old model as it was.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.card import model_card
from retrodiff.checkpoints.database_place import shared_address
from retrodiff.checkpoints.hub import SAVED, fetch, publish
from retrodiff.checkpoints.native import load_components, save_components
from retrodiff.checks import check_components, encoder_disagreement
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.diffusion.guidance import ClassifierFree
from retrodiff.diffusion.sampler import sampler_named
from retrodiff.generation import Generation, gathered, origins
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Database,
    Denoiser,
    Encoder,
    Guidance,
    Mode,
    Neighbors,
    ProposalDistribution,
    Query,
    Retriever,
    Sampler,
    Schedule,
    TrainableDenoiser,
)
from retrodiff.progress import progress_bar
from retrodiff.request import encoded, read_request
from retrodiff.retrieval.retriever import RandomOfTop


@dataclass(frozen=True, kw_only=True)
class Model:
    """A retrieval-augmented diffusion model. Make one with `Builder` or a preset.

    Args:
        encoder: places images and prompts; None where nothing is ever encoded.
        database: what is retrieved from; None: only modes without a search work.
        retriever: which rows.
        proposal: what unconditional sampling asks; None: it is refused.
        conditioner: how they enter the network.
        denoiser: the network, as ``(x, sigma) -> denoised``.
        guidance: how strongly the condition acts.
        sampler: how noise becomes data.
        autoencoder: in which space.
        schedule: at which noise levels; None: the denoiser's own.
        k: tokens that condition an image, unless asked otherwise.
        prompt_template: turns a class name into a prompt.
        class_top: l, the nearest rows of a class prompt that k are drawn from.
        steps: of the sampler, unless asked otherwise.
    """

    denoiser: Denoiser
    conditioner: Conditioner
    retriever: Retriever
    guidance: Guidance
    sampler: Sampler
    autoencoder: Autoencoder
    schedule: Schedule | None = None
    encoder: Encoder | None = None
    database: Database | None = None
    proposal: ProposalDistribution | None = None
    k: int = 4
    prompt_template: str = "A photo of {}"
    class_top: int = 20
    steps: int = 50

    # --- sampling ------------------------------------------------------------------------------

    def sample(
        self,
        *,
        prompts: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        images: Tensor | None = None,
        query: Query | None = None,
        n: int | None = None,
        mode: Mode | Sequence[Mode] | None = None,
        k: int | None = None,
        guidance: Guidance | float | None = None,
        sampler: Sampler | str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        progress: bool = True,
    ) -> Generation:
        """Generates images. Give one of prompts, classes, images, query, or n alone.

        Args:
            prompts: texts, one image each (repeat a prompt for more).
            classes: class names, put into the prompt template.
            images: (b, c, h, w) in [-1, 1], whose neighbors condition.
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
            seed: of everything random. The same seed gives the same images.
            batch_size: images per network call (twice that under guidance).
            progress: show a bar.

        Raises:
            ValueError: what was given does not fit together, or a part is missing; says which.
        """
        generator = torch.Generator().manual_seed(seed)
        k = self.k if k is None else k
        modes, asked = read_request(prompts, classes, images, query, n, mode)
        total = len(modes)
        noise = torch.randn(total, *self.denoiser.shape, generator=generator)
        guidance = self._guidance(guidance)
        steps = self.steps if steps is None else steps
        chosen = dataclasses.replace(self.generator(sampler), guidance=guidance)

        parts: list[tuple[Tensor, Tensor, Query, Neighbors]] = []
        order: list[int] = []
        with progress_bar(total * steps, "sampling", progress) as bar:
            for word in dict.fromkeys(modes):
                rows = [i for i, other in enumerate(modes) if other == word]
                order += rows
                asking = self._query(word, asked, rows, generator)
                neighbors = self.neighbors(asking, word, k)
                for start in range(0, len(rows), batch_size):
                    part = slice(start, min(start + batch_size, len(rows)))
                    context = self.conditioner.condition(asking.rows(part), neighbors.rows(part))
                    if not _tokens(context) and self.denoiser.widths:
                        raise ValueError(
                            f"k={k} leaves mode {word!r} without a single token, but the denoiser "
                            "takes a condition: use k of 1 or more, or mode='text'"
                        )
                    null = self.conditioner.null(context)
                    latents = self._run(
                        chosen, context, null, noise[rows[part]], steps, generator, bar.update
                    )
                    images_ = chosen.decode(latents).cpu()
                    parts.append((images_, latents.cpu(), asking.rows(part), neighbors.rows(part)))
        settings = {
            "mode": list(modes) if len(set(modes)) > 1 else modes[0],
            "k": k,
            "steps": steps,
            "seed": seed,
            "guidance": repr(guidance),
            "sampler": repr(chosen.sampler),
            "schedule": repr(chosen.schedule),
            "batch_size": batch_size,
            "database": None if self.database is None else vars(self.database.fingerprint),
        }
        return gathered(parts, order, settings)

    def neighbors(self, query: Query, mode: Mode, k: int) -> Neighbors:
        """The k tokens that condition each query in a mode, with their records.

        ``text`` touches no database, and neither does k = 0.
        """
        itself = Neighbors.of_query(query)
        if not self.conditioner.uses_neighbors:
            found = itself
        elif mode == "text":
            found = itself
        elif mode == "text+neighbors":
            found = itself
            if k > 1:
                rest = self._retrieve(query, mode, k - 1)
                if rest.indices.ndim != itself.indices.ndim:
                    raise ValueError(
                        f"{type(self.retriever).__name__} merges the several queries of an image, "
                        "so they cannot be tokens beside its neighbors: use mode='neighbors'"
                    )
                found = Neighbors.cat([itself, rest])
        elif k == 0:
            found = itself.take(torch.zeros(0, dtype=torch.int64))
        else:
            found = self._retrieve(query, mode, k)
        return dataclasses.replace(found, records=origins(query, found, self.database))

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
        """Latents (b, c, h, w) in the denoiser's own space, from tokens that you hold.

        Args:
            context: a Context, or tokens (b, k, d).
            null: the unconditional branch's; None: the conditioner's null.
            noise: standard normal (b, c, h, w).
            sampler: a Sampler or its name; None: the model's.
            steps: of the sampler; None: the model's.
            guidance: a scale or a Guidance; None: the model's.
            generator: randomness of stochastic samplers.
        """
        (stream,) = list(self.denoiser.widths) or ["neighbors"]
        if isinstance(context, Tensor):
            context = Context.of(context, stream)
        if isinstance(null, Tensor):
            null = Context.of(null, stream)
        chosen = dataclasses.replace(self.generator(sampler), guidance=self._guidance(guidance))
        null = self.conditioner.null(context) if null is None else null
        return self._run(chosen, context, null, noise, steps, generator)

    def generator(self, sampler: Sampler | str | None = None) -> DiffusionGenerator:
        """The diffusion half of the model."""
        if isinstance(sampler, str):
            sampler = sampler_named(sampler)
        return DiffusionGenerator(
            denoiser=self.denoiser,
            guidance=self.guidance,
            sampler=sampler or self.sampler,
            schedule=self.schedule or self.denoiser.schedule,
            autoencoder=self.autoencoder,
        )

    # --- training ------------------------------------------------------------------------------

    def loss(
        self,
        images: Tensor,
        query: Query,
        neighbors: Neighbors,
        generator: torch.Generator | None = None,
        *,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
        drop: bool = True,
    ) -> Tensor:
        """The training objective of each image (b,).

        Args:
            images: (b, c, h, w) in [-1, 1].
            query: the images' own embeddings.
            neighbors: theirs.
            generator: of noise levels, noise and conditioning dropout, in that order.
            sigma: (b,) noise levels; None: drawn from the training distribution.
            noise: standard normal; None: drawn.
            drop: apply conditioning dropout.
        """
        denoiser = self.denoiser
        if not isinstance(denoiser, TrainableDenoiser):
            raise ValueError(
                f"{type(denoiser).__name__} has no loss and no draw_sigmas, so it cannot be "
                "trained: use one of retrodiff.diffusion's denoisers, or add the two methods"
            )
        with torch.no_grad():
            x0 = self.autoencoder.encode(images.to(getattr(denoiser, "device", images.device)))
        if tuple(x0.shape[1:]) != tuple(denoiser.shape):
            raise ValueError(
                f"images {tuple(images.shape[1:])} have latents {tuple(x0.shape[1:])}, which do "
                f"not match the denoiser's shape={tuple(denoiser.shape)}: resize the images or "
                "build the network for them"
            )
        if sigma is None:
            sigma = denoiser.draw_sigmas(x0.shape[0], generator)
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator)
        context = self.conditioner.condition(query, neighbors)
        if drop:
            context = self.conditioner.drop(context, generator)
        return denoiser.loss(x0, sigma.to(x0.device), noise.to(x0), context.to(x0.device))

    # --- change and keep -----------------------------------------------------------------------

    def replace(self, **components: Any) -> Model:
        """A model with other components; this one stays as it was.

        A new database leaves a fitted proposal behind: unconditional sampling then asks for
        ``Uniform()`` or ``NeighborCounts.fit(queries, database, k)``. Everything is checked again.
        """
        if "database" in components and "proposal" not in components:
            proposal = self.proposal
            if proposal is not None and not _fits(proposal, components["database"]):
                components["proposal"] = None
        unknown = set(components) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ValueError(
                f"a model has no {', '.join(sorted(unknown))}: its parts are "
                f"{', '.join(f.name for f in dataclasses.fields(self))}"
            )
        model = dataclasses.replace(self, **components)
        check_components({f.name: getattr(model, f.name) for f in dataclasses.fields(model)})
        return model

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """A folder of safetensors and JSON; see `retrodiff.checkpoints.native`.

        Of the database, the place and the fingerprint are kept. One that has no folder and is not
        on the Hub has to be handed in again: ``Model.load(folder, database=...)``.
        """
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        save_components(parts, Path(folder), overwrite=overwrite)
        return Path(folder).expanduser()

    @classmethod
    def load(cls, folder: str | Path, *, trust_database: bool = False, **components: Any) -> Model:
        """What `save` wrote; components given here take the place of the saved ones.

        The folder may be a stranger's: nothing in it can run code, fetch an address or lead to a
        file outside of it (see `retrodiff.checkpoints.native`).

        Args:
            folder: of a saved model.
            trust_database: open the database wherever the folder says that it is. Without that,
                only inside of the folder, or where you saved the model on this machine yourself.
            components: take the place of the saved ones, ``database=...`` for example.
        """
        parts = load_components(
            Path(folder).expanduser(), components, cls, trust_database=trust_database
        )
        return cls._of(parts)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache: str | Path | None = None,
        token: str | None = None,
        trust_database: bool = False,
        **components: Any,
    ) -> Model:
        """What `push_to_hub` uploaded or `save` wrote: safetensors and JSON, nothing else is read.

        Args:
            repo_or_folder: ``owner/name`` on the Hugging Face Hub, or a folder.
            revision: branch, tag or commit.
            cache: folder of the cache; None: the usual one.
            token: for private repositories, the database's too; None: the one of ``hf auth login``.
            trust_database: fetch the database from wherever the model says that it is, with your
                token. Without that it is refused, unless you uploaded the model from this machine.
            components: take the place of the saved ones; a database is among those only if it is
                on the Hub itself.
        """
        folder = fetch(
            str(repo_or_folder), revision=revision, cache=cache, token=token, patterns=SAVED
        )
        parts = load_components(folder, components, cls, token=token, trust_database=trust_database)
        return cls._of(parts)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        token: str | None = None,
        message: str = "Upload a retrodiff model",
    ) -> str:
        """Uploads the model with a card that says what it is; returns the commit's address.

        A database that is on the Hub itself comes with the model by its address. Any other stays
        here: the card names its fingerprint, not its path. Weights of an earlier upload are
        replaced; a card that is there already stays.

        Args:
            repo: ``owner/name``; made where it does not exist.
            private: hide a new repository from others, and refuse one that everyone can see.
            token: None: the one of ``hf auth login``.
            message: of the commit.
        """
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        with TemporaryDirectory() as place:
            folder = Path(place) / "model"
            kept = self.database if shared_address(self.database) else None
            save_components({**parts, "database": kept}, folder)
            (folder / "README.md").write_text(model_card(parts, repo), "utf-8")
            return publish(folder, repo, private=private, token=token, message=message)

    def to(self, device: torch.device | str) -> Model:
        """Moves the weights of denoiser and autoencoder; returns the model itself."""
        for part in (self.denoiser, self.autoencoder):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    @classmethod
    def _of(cls, parts: dict[str, Any]) -> Model:
        check_components(parts)
        return cls(**parts)

    # --- how sample does it --------------------------------------------------------------------

    def _query(
        self, mode: Mode, asked: dict[str, Any], rows: list[int], generator: torch.Generator
    ) -> Query:
        name, value = next(iter(asked.items()))
        if name == "query":
            return dataclasses.replace(value.rows(rows), generator=generator)
        if name == "n" and not self.conditioner.uses_neighbors:
            return Query(torch.zeros(len(rows), 0), tuple("" for _ in rows), None, generator)
        if name == "n":
            database = self._database(mode)
            if self.proposal is None:
                raise ValueError(
                    "unconditional sampling needs a proposal distribution and this model has "
                    "none: set proposal=Uniform(), or fit one to its database with "
                    "NeighborCounts.fit(queries, database, k)"
                )
            return self.proposal.propose(database, len(rows), generator)
        query = encoded(name, value, rows, self.encoder, self.prompt_template)
        return dataclasses.replace(query, generator=generator)

    def _retrieve(self, query: Query, mode: Mode, k: int) -> Neighbors:
        database = self._database(mode)
        if self.encoder is not None and mode != "unconditional":
            # An encoder that fetched its weights just now can be compared only from here on.
            difference = encoder_disagreement(self.encoder, database)
            if difference is not None:
                raise ValueError(difference)
        retriever = self.retriever
        if mode == "class":
            retriever = RandomOfTop(retriever, min(max(self.class_top, k), len(database)))
        return retriever.retrieve(query, database, k)

    def _database(self, mode: Mode) -> Database:
        if self.database is None:
            raise ValueError(
                f"mode {mode!r} retrieves, but this model has no database: set "
                "database=open_database(path), or use mode='text', which needs none"
            )
        return self.database

    def _guidance(self, guidance: Guidance | float | None) -> Guidance:
        if guidance is None:
            return self.guidance
        if isinstance(guidance, (int, float)):
            return ClassifierFree(float(guidance))
        return guidance

    def _run(
        self,
        chosen: DiffusionGenerator,
        context: Context,
        null: Context,
        noise: Tensor,
        steps: int | None,
        generator: torch.Generator | None,
        done: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """The generator on the denoiser's device, in evaluation mode."""
        if getattr(self.denoiser, "untrained", False):
            warnings.warn(
                "sampling from fresh weights gives noise: load a checkpoint, or train first",
                stacklevel=3,
            )
        device = getattr(self.denoiser, "device", noise.device)
        module = self.denoiser if isinstance(self.denoiser, nn.Module) else None
        training = module is not None and module.training
        if module is not None:
            module.eval()
        try:
            return chosen.latents(
                context.to(device),
                null.to(device),
                noise.to(device),
                self.steps if steps is None else steps,
                generator,
                None if done is None else lambda step, denoised: done(len(noise)),
            )
        finally:
            if module is not None:
                module.train(training)


def _tokens(context: Context) -> int:
    return sum(tokens.values.shape[-2] for tokens in context.streams.values())


def _fits(proposal: ProposalDistribution, database: Database | None) -> bool:
    if database is None:
        return False
    try:
        proposal.support(database)
    except ValueError:
        return False
    return True
