"""A block for diffusers' modular pipelines that puts references before the blocks that use them.

The path of this module is part of the interface: saved pipelines name it, and those of its
components.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from retrodiff.bridges.chosen import Chosen
from retrodiff.bridges.reference_calls import as_retriever
from retrodiff.bridges.reference_database import ReferenceDatabase
from retrodiff.bridges.reference_retriever import ReferenceRetriever
from retrodiff.disk.files import write_folder

HUB = Path(__file__).parent / "hub"
"""The block in the layout of the Hugging Face Hub."""

OUTPUTS = ("image", "ip_adapter_image")


class RetrieveReferences(ModularPipelineBlocks):
    """Chooses the references of a prompt and hands them to the blocks behind it.

    Insert it at the front, ``blocks.sub_blocks.insert("retrieve", RetrieveReferences(), 0)``. Its
    components are ``database`` and ``retriever``; both load by `from_pretrained`, or are handed in
    by ``pipeline.update_components(database=..., retriever=...)``.

    Args:
        output: what the next blocks call it: ``image`` for FLUX.2 and Qwen-Image-Edit-Plus, a list
            of pictures; ``ip_adapter_image`` for SDXL, that list as the images of one adapter.

    Raises:
        ValueError: ``output`` is none of the two names.

    Examples:
        >>> from retrodiff.bridges import RetrieveReferences
        >>> [component.name for component in RetrieveReferences().expected_components]
        ['database', 'retriever']
    """

    model_name = None
    _requirements = {"retrodiff": ">=0.1.0"}  # noqa: RUF012 (diffusers reads it from the class)

    def __init__(self, output: str = "image"):
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r}: give one of {', '.join(OUTPUTS)}")
        super().__init__()
        self.output = output

    @property
    def description(self) -> str:
        """What the block does."""
        return "Chooses reference images for the prompt from a retrodiff database."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The database, and what chooses from it."""
        return [
            ComponentSpec("database", ReferenceDatabase),
            ComponentSpec("retriever", ReferenceRetriever),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        """Prompt, number of references, and filter."""
        return [
            InputParam.template("prompt"),
            InputParam("k", type_hint=int, default=3, description="How many references."),
            InputParam(
                "where",
                type_hint=str,
                description="Condition on the database's columns, such as \"license == 'CC0'\".",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The pictures, and where they come from."""
        return [
            OutputParam(self.output, type_hint=list, description="The pictures of the references."),
            OutputParam(
                "references",
                type_hint=Chosen,
                description="The references with records and similarities, for credit.",
            ),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Chooses references for the prompt in the state."""
        block: Any = self.get_block_state(state)
        for name in ("database", "retriever"):
            if getattr(components, name, None) is None:
                raise ValueError(
                    f"{name} is empty: hand it in, pipeline.update_components({name}=...)"
                )
        prompts = [block.prompt] if isinstance(block.prompt, str) else list(block.prompt)
        if len(prompts) != 1:
            raise ValueError(
                f"{len(prompts)} prompts in one call would share one list of references: call the "
                "pipeline once for each prompt"
            )
        [chosen] = as_retriever(components.retriever).choose(
            components.database, prompts, block.k, where=block.where
        )
        images = chosen.images
        setattr(block, self.output, [images] if self.output == "ip_adapter_image" else images)
        block.references = chosen
        self.set_block_state(state, block)
        return components, state


def hub_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the block into a folder as the Hugging Face Hub holds it.

    ``ModularPipelineBlocks.from_pretrained(path, trust_remote_code=True)`` loads it from there, or
    from the repository that the folder was uploaded to.

    Args:
        path: appears whole or not at all.
        overwrite: replace an earlier one.
    """
    names = {file.name for file in HUB.iterdir() if file.is_file()}

    def write(folder: Path) -> None:
        for name in names:
            shutil.copyfile(HUB / name, folder / name)

    marker = ModularPipelineBlocks.config_name
    assert marker is not None
    return write_folder(path, write, marker=marker, own=lambda _: names, overwrite=overwrite)
