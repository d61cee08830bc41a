"""Small random pipelines of every family, drawn so that errors show: random norm gains and biases, no two rows
alike, guidance that is felt.

Nothing is downloaded: the tokenizers are made from letters, the models from configurations.
"""

import string
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

FAMILIES = ("unet", "sdxl", "sd3", "flux", "pixart")
TEXT_LENGTH = 16  # tokens of CLIP
WIDTH = 32  # of CLIP and T5
LATENT = 8  # cells a side, by default
PIXELS = 16  # a side, by default: the autoencoders halve each side


def redraw(model: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Draw all weights anew: matrices with ``gain``, norm gains in [0.5, 2], biases and embeddings spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            embedding = "embedding" in name or name.startswith(("shared", "encoder.embed"))
            scale = 1.0 if embedding and parameter.ndim == 2 else gain / parameter[0].numel() ** 0.5
            parameter.data = normal * scale
        elif "norm" in name and name.endswith("weight"):
            parameter.data = 0.5 + 1.5 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data = normal * 0.2
    return model.eval()


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows bytes and no merges, so that any text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


@cache
def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer over letters."""
    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters]
    return T5Tokenizer(vocab=[(piece, 0.0 if index < 3 else -2.0) for index, piece in enumerate(pieces)], extra_ids=0)


def clip_text(seed: int, *, projection: bool = False, layers: int = 3) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return redraw(CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config), seed)


def t5_text(seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return redraw(T5EncoderModel(config), seed)  # type: ignore[return-value]


def autoencoder(seed: int, *, channels: int = 4, **options: Any) -> AutoencoderKL:
    """Latents of half the image's side."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=PIXELS,
        **options,
    )
    return redraw(model, seed)  # type: ignore[return-value]


@cache
def tiny_autoencoder(seed: int = 50) -> AutoencoderTiny:
    """Latents of a quarter of the image's side; levels of no, one and two blocks, each of its own width."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(12, 12, 12),
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )
    return redraw(model, seed)  # type: ignore[return-value]


def ddim(prediction_type: str = "epsilon", **options: Any) -> DDIMScheduler:
    """Stable Diffusion's noise schedule; its pipeline rewrites any other offset, with a warning."""
    settings = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1} | options
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **settings
    )


@cache
def stable_diffusion(prediction_type: str = "epsilon", seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """The layout of Stable Diffusion 1 and 2: four levels, three resnets in each up block, attention in the middle
    two; latents 8 × 8 of four channels."""
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 24, 32, 32),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(seed + 1),
        text_encoder=clip_text(seed + 2),
        tokenizer=clip_tokenizer(),
        unet=redraw(unet, seed + 3),
        scheduler=ddim(prediction_type, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def sdxl(seed: int = 10) -> StableDiffusionXLPipeline:
    """The layout of Stable Diffusion XL: three levels, two text encoders, size and pooled text as conditions."""
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 24, 32),
        layers_per_block=2,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(seed + 1, scaling_factor=0.13025),
        text_encoder=clip_text(seed + 2),
        text_encoder_2=clip_text(seed + 3, projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=redraw(unet, seed + 4),
        scheduler=ddim(),
        add_watermarker=False,
    )


@cache
def sd3(seed: int = 20) -> StableDiffusion3Pipeline:
    """The layout of Stable Diffusion 3: joint attention over image and text, three text encoders, a flow."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return StableDiffusion3Pipeline(
        vae=autoencoder(seed + 1, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=clip_text(seed + 2, projection=True),
        text_encoder_2=clip_text(seed + 3, projection=True),
        text_encoder_3=redraw(T5EncoderModel(t5), seed + 4),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=redraw(transformer, seed + 5),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@cache
def flux(seed: int = 30) -> FluxPipeline:
    """The layout of Flux: two double blocks, two single ones, packed latents, guidance as a condition."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        vae=autoencoder(seed + 1, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=clip_text(seed + 2),
        text_encoder_2=t5_text(seed + 3),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=redraw(transformer, seed + 4),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


@cache
def pixart(seed: int = 40) -> PixArtAlphaPipeline:
    """The layout of PixArt-alpha: self and cross attention, T5 with a mask, a learned sigma beside the noise."""
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        caption_channels=WIDTH,
        cross_attention_dim=32,
    )
    return PixArtAlphaPipeline(
        vae=autoencoder(seed + 1),
        text_encoder=t5_text(seed + 2),
        tokenizer=t5_tokenizer(),
        transformer=redraw(transformer, seed + 3),
        scheduler=ddim(),
    )


def pipeline(family: str) -> DiffusionPipeline:
    """One of `FAMILIES`, made once and shared: do not change it."""
    made = {"unet": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux, "pixart": pixart}[family]()
    made.set_progress_bar_config(disable=True)
    return made
