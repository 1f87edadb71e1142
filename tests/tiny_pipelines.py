"""Tiny pipelines of other models, made from configurations with random weights.

Networks, schedulers and pre- and post-processing are the libraries' own. Tokenizers that would need
files are stood in for by characters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from parts import HashingEncoder
from torch import Tensor, nn

from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.model.generated import to_picture

WORDS = 64
"""Tokens that the text encoders know."""

IMAGE, START = WORDS - 1, WORDS - 2
"""Qwen's tokens for a part of a picture, and for where one begins."""


def ids_of(text: str) -> list[int]:
    return [ord(c) % (WORDS - 4) for c in text]


def padded(rows: list[list[int]], length: int | None = None) -> dict[str, Tensor]:
    length = length or max(map(len, rows))
    rows = [row[-length:] for row in rows]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Batch(dict[str, Tensor]):
    def to(self, device: Any) -> Batch:
        return self


class CharacterChat:
    """FLUX.2's processor: the conversation as characters."""

    def apply_chat_template(self, conversations: Any, max_length: int, **_: Any) -> Batch:
        return Batch(padded([ids_of(str(one[-1])) for one in conversations], max_length))


class CharacterPictures:
    """Qwen's processor: characters, and as many tokens as a picture has patches."""

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessor

        self.images = Qwen2VLImageProcessor(patch_size=14, merge_size=2)

    def __call__(self, text: list[str], images: list[Any] | None, **_: Any) -> Batch:
        if not images:
            return Batch(padded([ids_of(one) for one in text]))
        seen = self.images(images, return_tensors="pt")
        counts = [math.prod(grid) // 4 for grid in seen["image_grid_thw"].tolist()]
        shown = [token for n in counts for token in [START, *[IMAGE] * n]]
        batch = Batch(padded([ids_of(one[:70]) + shown + ids_of(one[70:]) for one in text]))
        n = len(text)  # every prompt of a batch sees all pictures
        batch["pixel_values"] = seen["pixel_values"].repeat(n, 1)
        batch["image_grid_thw"] = seen["image_grid_thw"].repeat(n, 1)
        return batch


def flux2_parts(layers: int = 3) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(0)
    text = Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": WORDS, "hidden_size": 16, "head_dim": 8,
            "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "intermediate_size": 16,
        },
    )  # fmt: skip
    return {
        "text_encoder": Mistral3ForConditionalGeneration(text).eval(),
        "tokenizer": CharacterChat(),
        "vae": AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ).eval(),
    }  # fmt: skip


def qwen_parts() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": WORDS,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16, "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE, vision_start_token_id=START,
    )  # fmt: skip
    return {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config).eval(),
        "processor": CharacterPictures(),
        "vae": AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "transformer": QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        ).eval(),
    }  # fmt: skip


def sdxl_parts(image_width: int = 12) -> dict[str, Any]:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=WORDS, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=image_width,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    tokenizer.model_max_length = 77
    return {
        "text_encoder": CLIPTextModel(text).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32,
        ).eval(),
        "unet": UNet2DConditionModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ).eval(),
        "scheduler": EulerDiscreteScheduler(),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "feature_extractor": CLIPImageProcessor(crop_size=16, size=16),
    }  # fmt: skip


def adapter_weights(unet: nn.Module, image_width: int) -> dict[str, Any]:
    """An IP-Adapter of random weights, as its files hold one: 4 tokens of each picture."""
    generator = torch.Generator().manual_seed(1)
    width, numbered, layers = unet.config.cross_attention_dim, 1, {}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{numbered}.{part}.weight"] = random(module.to_k.weight.shape[0], width)
            numbered += 2
    return {
        "ip_adapter": layers,
        "image_proj": {
            "proj.weight": random(4 * width, image_width), "proj.bias": torch.zeros(4 * width),
            "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
        },
    }  # fmt: skip


def flux2() -> Any:
    from diffusers import Flux2Pipeline

    return quiet(Flux2Pipeline(**flux2_parts()))


def qwen() -> Any:
    from diffusers import QwenImageEditPlusPipeline

    return quiet(QwenImageEditPlusPipeline(**qwen_parts(), tokenizer=None))


def sdxl(adapter: bool = True, image_width: int = 12) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = quiet(StableDiffusionXLPipeline(**sdxl_parts(image_width), add_watermarker=False))
    if adapter:
        load_adapter(pipeline, image_width)
    return pipeline


def load_adapter(pipeline: Any, image_width: int = 12) -> None:
    weights = adapter_weights(pipeline.unet, image_width)
    pipeline.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class AdapterEncoder(TextEncoder):
    """The image encoder of a pipeline's adapter as one of ours.

    Text is placed at random on the side where the pictures are: similarities are weights.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.text = (
            pipeline,
            HashingEncoder(pipeline.image_encoder.config.projection_dim),
        )

    @property
    def dim(self) -> int:
        return self.text.dim

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(encoder="adapter's", weights="0", preprocessing="its own", dim=self.dim)

    def encode_image(self, images: Tensor) -> Tensor:
        pictures = [to_picture(image) for image in images]
        with torch.no_grad():
            return self.pipeline.encode_image(pictures, "cpu", 1)[0]

    def encode_text(self, prompts: list[str]) -> Tensor:
        gray = self.encode_image(torch.zeros(1, 3, 64, 80))
        placed = self.text.encode_text(prompts)
        return placed * (placed @ gray.T).sign()
