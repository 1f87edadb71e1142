"""What the bridges to diffusers give is what its pipelines give when they are called by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from parts import HashingEncoder

from retrodiff.databases import ArrayDatabase

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import tiny_pipelines as tiny
from diffusers.modular_pipelines import ComponentSpec, ModularPipelineBlocks

from retrodiff.bridges import (
    ReferenceDatabase,
    ReferenceRetriever,
    RetrieveReferences,
    hub_folder,
    ip_adapter,
    references,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FLUX = {
    "height": 32, "width": 32, "num_inference_steps": 2, "text_encoder_out_layers": (1, 2, 3),
    "max_sequence_length": 16,
}  # fmt: skip
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}


def pictures_database(encoder, rows=8, seed=0):
    """Pictures of 64 x 80 pixels, embedded by the encoder."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(rows, 3, 64, 80, generator=generator) * 2 - 1
    records = [{"file": f"{i}.png", "license": "CC0" if i % 2 else "none"} for i in range(rows)]
    embeddings = encoder.encode_image(images)
    return ArrayDatabase(embeddings, encoder.fingerprint, records, images=images)


@pytest.fixture(scope="module")
def encoder():
    return HashingEncoder()


@pytest.fixture(scope="module")
def database(encoder):
    return pictures_database(encoder)


@pytest.fixture(scope="module")
def retriever(encoder):
    return ReferenceRetriever(encoder)


@pytest.fixture(scope="module")
def flux2():
    return tiny.flux2()


@pytest.fixture(scope="module")
def sdxl():
    return tiny.sdxl()


@pytest.fixture(scope="module")
def adapted(sdxl):
    """The encoder of the tiny adapter, and a database that it embedded."""
    encoder = tiny.AdapterEncoder(sdxl)
    return encoder, pictures_database(encoder)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)
    )


# --- pipelines that take pictures ----------------------------------------------------------------


def test_flux2_is_called_once_for_each_prompt(flux2, database, retriever):
    prompts = ["a door", "a boat"]
    generators = [seeded(1), seeded(2)]
    out = references(flux2, database, prompts, 2, retriever=retriever, generator=generators, **FLUX)
    by_hand = [
        flux2(
            prompt=prompt,
            image=retriever.choose(database, prompt, 2)[0].images,
            generator=seeded(seed),
            **FLUX,
        ).images[0]
        for seed, prompt in enumerate(prompts, 1)
    ]
    assert same(out.images, by_hand)
    alone = flux2(prompt="a door", generator=seeded(1), **FLUX).images
    assert not same(out.images[:1], alone)
    assert out.made_by["name"] == "Flux2Pipeline"
    assert out.made_by["num_inference_steps"] == 2


def test_qwen_image_edit_plus(database, retriever, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", 56 * 56)
    pipeline = tiny.qwen()
    options = {**SMALL, "true_cfg_scale": 1.0}
    out = references(
        pipeline, database, "a door", 2, retriever=retriever, generator=seeded(), **options
    )
    pictures = retriever.choose(database, "a door", 2)[0].images
    by_hand = pipeline(prompt="a door", image=pictures, generator=seeded(), **options).images
    assert same(out.images, by_hand)
    other = pipeline(prompt="a door", image=pictures[::-1], generator=seeded(), **options).images
    assert not same(out.images, other)


def test_sdxl_takes_no_references_as_image(sdxl, database, retriever):
    with pytest.raises(ValueError, match=r"takes no image=\[...\].*or ip_adapter"):
        references(sdxl, database, "a", 1, retriever=retriever)


def test_a_picture_to_start_from_is_no_reference(sdxl, database, retriever):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline(**sdxl.components, add_watermarker=False)
    with pytest.raises(ValueError, match=r"picture to start from \(it has strength=\)"):
        references(pipeline, database, "a", 1, retriever=retriever)


# --- the block -----------------------------------------------------------------------------------


def with_block(blocks, block, parts, **components):
    blocks.sub_blocks.insert("retrieve", block, 0)
    pipeline = tiny.quiet(blocks.init_pipeline())
    pipeline.register_components(**parts)
    pipeline.update_components(**components)
    return pipeline


def without_block(blocks, parts):
    pipeline = tiny.quiet(blocks.init_pipeline())
    pipeline.register_components(**parts)
    return pipeline


def test_the_block_before_flux2(database, retriever):
    from diffusers import Flux2AutoBlocks

    parts = tiny.flux2_parts()
    pipeline = with_block(
        Flux2AutoBlocks(), RetrieveReferences(), parts, database=database, retriever=retriever
    )
    assert "image" not in pipeline.blocks.input_names
    state = pipeline(
        prompt="a door", k=2, where="license == 'CC0'", generator=seeded(), **FLUX,
        output=["images", "references"],
    )  # fmt: skip
    chosen = state["references"]
    assert all(one.record["license"] == "CC0" for one in chosen.references)
    plain = without_block(Flux2AutoBlocks(), parts)
    by_hand = plain(
        prompt="a door", image=chosen.images, generator=seeded(), **FLUX, output="images"
    )
    assert same(state["images"], by_hand)
    assert not same(by_hand, plain(prompt="a door", generator=seeded(), **FLUX, output="images"))
    called = references(
        plain, database, "a door", 2, where="license == 'CC0'", retriever=retriever,
        generator=seeded(), **FLUX,
    )  # fmt: skip
    assert same(called.images, by_hand)
    with pytest.raises(ValueError, match="2 prompts in one call would share one list"):
        pipeline(prompt=["a", "b"], **FLUX)
    pipeline.update_components(database=None)
    with pytest.raises(ValueError, match="database is empty: hand it in"):
        pipeline(prompt="a", **FLUX)


def test_the_block_before_qwen_image_edit_plus(database, retriever, monkeypatch):
    from diffusers import QwenImageEditPlusAutoBlocks
    from diffusers.modular_pipelines.qwenimage import encoders

    sized = encoders.calculate_dimensions
    monkeypatch.setattr(encoders, "calculate_dimensions", lambda area, ratio: sized(64 * 64, ratio))
    parts = tiny.qwen_parts()
    block = RetrieveReferences()
    pipeline = with_block(
        QwenImageEditPlusAutoBlocks(), block, parts, database=database, retriever=retriever
    )
    state = pipeline(
        prompt="a door", k=2, generator=seeded(), **SMALL, output=["images", "references"]
    )
    by_hand = without_block(QwenImageEditPlusAutoBlocks(), parts)(
        prompt="a door", image=state["references"].images, generator=seeded(), **SMALL,
        output="images",
    )  # fmt: skip
    assert same(state["images"], by_hand)


def test_the_block_before_sdxl(database, retriever):
    from diffusers import StableDiffusionXLAutoBlocks

    parts = tiny.sdxl_parts()
    weights = tiny.adapter_weights(parts["unet"], 12)
    parts["unet"]._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    pipeline = with_block(
        StableDiffusionXLAutoBlocks(), RetrieveReferences("ip_adapter_image"), parts,
        database=database, retriever=retriever,
    )  # fmt: skip
    state = pipeline(
        prompt="a door", k=2, generator=seeded(), **SMALL, output=["images", "references"]
    )
    by_hand = without_block(StableDiffusionXLAutoBlocks(), parts)(
        prompt="a door", ip_adapter_image=[state["references"].images], generator=seeded(),
        **SMALL, output="images",
    )  # fmt: skip
    assert same(state["images"], by_hand)


def test_the_block_loads_from_the_layout_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = hub_folder(tmp_path / "block")
    config = json.loads((folder / "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": "block.RetrieveReferences"}
    block = ModularPipelineBlocks.from_pretrained(
        str(folder), trust_remote_code=True, output="ip_adapter_image"
    )
    assert type(block) is RetrieveReferences
    assert block.output == "ip_adapter_image"
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=False)
    with pytest.raises(FileExistsError):
        hub_folder(folder)
    hub_folder(folder, overwrite=True)
    with pytest.raises(ValueError, match="output='mask'"):
        RetrieveReferences("mask")


def test_a_saved_pipeline_names_our_components_by_their_public_paths(tmp_path):
    from test_references import tiny_clip

    from retrodiff.databases import Images, build_database

    encoder = tiny_clip()
    images = [torch.rand(3, 64, 64) * 2 - 1 for _ in range(4)]
    build_database(tmp_path / "d.rdb", Images(images), encoder, thumbnails=64, progress=False)
    ReferenceRetriever(encoder, top=9).save_pretrained(tmp_path / "r")
    pipeline = RetrieveReferences().init_pipeline()
    for name, kind, where in (
        ("database", ReferenceDatabase, "d.rdb"),
        ("retriever", ReferenceRetriever, "r"),
    ):
        path = str(tmp_path / where)
        spec = ComponentSpec(name, kind, pretrained_model_name_or_path=path)
        pipeline.update_components(**{name: spec.load()})
    pipeline.save_pretrained(str(tmp_path / "pipeline"), overwrite_modular_index=False)
    index = json.loads((tmp_path / "pipeline" / "modular_model_index.json").read_text())
    for name, module, kind in (
        ("database", "retrodiff.bridges.reference_database", "ReferenceDatabase"),
        ("retriever", "retrodiff.bridges.reference_retriever", "ReferenceRetriever"),
    ):
        assert index[name][2]["type_hint"] == [module, kind]
    assert RetrieveReferences.__module__ == "retrodiff.bridges.retrieve_references"
    again = RetrieveReferences().init_pipeline(str(tmp_path / "pipeline"))
    again.load_components()
    assert len(again.database) == 4
    assert again.retriever.top == 9


# --- IP-Adapter ----------------------------------------------------------------------------------


def by_hand(sdxl, chosen, n, **options):
    """Each prompt on its own: its own embeddings, weighted by similarity, and n pictures."""
    found = []
    for i, one in enumerate(chosen):
        weights = torch.tensor([r.similarity for r in one.references]).double().clamp_min(0)
        mean = (weights / weights.sum() @ one.embeddings.double()).float()[None, None]
        found += sdxl(
            prompt=one.prompt,
            ip_adapter_image_embeds=[torch.cat([torch.zeros_like(mean), mean])],
            num_images_per_prompt=n,
            generator=[seeded(10 * i + j) for j in range(n)],
            **options,
        ).images
    return found


def test_two_prompts_with_two_images_each_see_their_own_neighbors(sdxl, adapted):
    encoder, database = adapted
    chooser = ReferenceRetriever(encoder, copies=1)
    prompts = ["a door", "a boat"]
    generators = [seeded(0), seeded(1), seeded(10), seeded(11)]
    out = ip_adapter(
        sdxl, database, prompts, 3, retriever=chooser, num_images_per_prompt=2,
        generator=generators, **SMALL,
    )  # fmt: skip
    chosen = chooser.choose(database, prompts, 3)
    assert same(out.images, by_hand(sdxl, chosen, 2, **SMALL))
    assert [one.prompt for one in out.chosen] == ["a door", "a door", "a boat", "a boat"]
    # other neighbors of the second prompt change nothing of the first one's pictures
    fewer = database.subset(torch.arange(3))
    generators = [seeded(0), seeded(1), seeded(10), seeded(11)]
    again = ip_adapter(
        sdxl, [database, fewer], prompts, 3, retriever=chooser, num_images_per_prompt=2,
        generator=generators, **SMALL,
    )  # fmt: skip
    assert len(out) == 4
    assert same(again.images[:2], out.images[:2])
    assert not same(again.images[2:], out.images[2:])


def test_the_same_call_by_hand_is_identical(sdxl, adapted):
    encoder, database = adapted
    [chosen] = ReferenceRetriever(encoder).choose(database, "a door", 3)
    out = ip_adapter(
        sdxl, database, "a door", 3, retriever=encoder, generator=seeded(), merge="each", **SMALL
    )
    embeds = torch.stack([torch.zeros_like(chosen.embeddings), chosen.embeddings])
    expected = sdxl(
        prompt="a door", ip_adapter_image_embeds=[embeds], generator=seeded(), **SMALL
    ).images
    assert same(out.images, expected)
    # the pipeline's own way, from the pictures
    pictures = ip_adapter(
        sdxl, database, "a door", 3, retriever=encoder, use="pictures", merge="each",
        generator=seeded(), **SMALL,
    )  # fmt: skip
    own = sdxl(
        prompt="a door", ip_adapter_image=[chosen.images], generator=seeded(), **SMALL
    ).images
    assert same(pictures.images, own)


def test_without_guidance_no_null_prompt_is_handed_over(sdxl, adapted):
    encoder, database = adapted
    [chosen] = ReferenceRetriever(encoder).choose(database, "a door", 2)
    options = {**SMALL, "guidance_scale": 1.0}
    out = ip_adapter(
        sdxl, database, "a door", 2, retriever=encoder, merge="each", generator=seeded(), **options
    )
    expected = sdxl(
        prompt="a door", ip_adapter_image_embeds=[chosen.embeddings[None]], generator=seeded(),
        **options,
    ).images  # fmt: skip
    assert same(out.images, expected)


def test_encoders_that_are_not_the_adapters_are_refused(sdxl, adapted, database, encoder):
    with pytest.raises(ValueError, match=r"takes embeddings of width 12, but the database holds 8"):
        ip_adapter(sdxl, database, "a", 1, retriever=encoder)
    other = HashingEncoder(12)
    with pytest.raises(ValueError, match=r"database's encoder is not the IP-Adapter's: .*cosine"):
        ip_adapter(sdxl, pictures_database(other), "a", 1, retriever=other)
    out = ip_adapter(sdxl, database, "a", 1, retriever=encoder, use="pictures", **SMALL)
    assert len(out) == 1


def test_pipelines_without_an_adapter_are_refused(flux2, adapted):
    encoder, database = adapted
    plain = tiny.sdxl(adapter=False)
    with pytest.raises(ValueError, match=r"no IP-Adapter layers: call pipeline.load_ip_adapter"):
        ip_adapter(plain, database, "a", 1, retriever=encoder)
    with pytest.raises(ValueError, match=r"Flux2Pipeline takes no IP-Adapter.*references\("):
        ip_adapter(flux2, database, "a", 1, retriever=encoder)
    tiny.load_adapter(plain)
    plain.image_encoder = None
    with pytest.raises(ValueError, match="no image_encoder, so nothing tells"):
        ip_adapter(plain, database, "a", 1, retriever=encoder)
    with pytest.raises(ValueError, match="no image_encoder to encode the pictures with"):
        ip_adapter(plain, database, "a", 1, retriever=encoder, use="pictures")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "latents"}, "use='latents': give one of embeddings, pictures"),
        ({"merge": "sum"}, "merge='sum'"),
        ({"ip_adapter_image": []}, "ip_adapter_image= is what"),
        ({"generator": [1]}, "4 pictures, but 1 generators"),
        ({"negative_prompt": ["x"]}, "2 prompts, but 1 of negative_prompt"),
        ({"where": "license == 'MIT'"}, "leaves none of the 8 rows"),
    ],
)
def test_bad_input_of_an_adapter(sdxl, adapted, options, message):
    encoder, database = adapted
    with pytest.raises(ValueError, match=message):
        ip_adapter(
            sdxl, database, ["a", "b"], 1, retriever=encoder, num_images_per_prompt=2, **options
        )
