"""Small random models of every family, drawn so that errors show: large weights, random norm gains, no two
rows alike.

With the libraries' own initialisation unit gains hide a double norm, small weights make every logit alike,
and zero biases hide a bias counted twice.
"""

from functools import cache

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig, Idefics2VisionConfig

from interp import VLM

VOCAB = 97
IMAGE_TOKEN = 96
PAD = 0
N_LAYERS = 4
D_MODEL = 32
PATCHES = 4

# head_dim is not d_model / n_heads, and keys have fewer heads than queries.
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

TOWER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew: matrices with gain 2, norm gains in [0.5, 2], biases and embeddings spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        normal = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan_in = parameter.shape[0] if type(model).__name__.startswith("GPT2") else parameter[0].numel()
            scale = 1.0 if "embed" in name or "wte" in name or "wpe" in name else 2.0 / fan_in**0.5
            parameter.data = normal * scale
        elif "norm" in name or "ln_" in name:
            uniform = torch.rand(parameter.shape, generator=generator)
            parameter.data = 0.5 + 1.5 * uniform if name.endswith("weight") else 0.3 * normal
        else:
            parameter.data = 0.3 * normal
    return model.eval()


def llama(attention: str = "sdpa", **changes: object) -> LlamaForCausalLM:
    """A Llama whose head size is not d_model / n_heads, with grouped keys."""
    config = LlamaConfig(**{**DECODER, "head_dim": 12, "attention_bias": True, **changes})
    return redraw(LlamaForCausalLM._from_config(config, attn_implementation=attention))


def mistral(attention: str = "sdpa") -> MistralForCausalLM:
    """A Mistral without a sliding window."""
    config = MistralConfig(**DECODER, head_dim=8, sliding_window=None)
    return redraw(MistralForCausalLM._from_config(config, attn_implementation=attention))


def qwen2(attention: str = "sdpa") -> Qwen2ForCausalLM:
    """A Qwen2: biases on q, k, v only."""
    return redraw(Qwen2ForCausalLM._from_config(Qwen2Config(**DECODER), attn_implementation=attention))


def qwen3(attention: str = "sdpa") -> Qwen3ForCausalLM:
    """A Qwen3: norms on queries and keys."""
    return redraw(Qwen3ForCausalLM._from_config(Qwen3Config(**DECODER, head_dim=12), attn_implementation=attention))


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    """A GPT-2: fused q, k, v and learned absolute positions."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    return redraw(GPT2LMHeadModel._from_config(config, attn_implementation=attention))


def llava(
    attention: str = "sdpa", feature_layer: int = -2, vocab_size: int = VOCAB, image_token: int = IMAGE_TOKEN
) -> LlavaForConditionalGeneration:
    """A LLaVA: CLIP tower of three blocks, read after the second as in LLaVA-1.5, and the Llama above."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=24),
        text_config=LlamaConfig(**{**DECODER, "vocab_size": vocab_size}, head_dim=12, attention_bias=True),
        image_token_index=image_token,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return redraw(LlavaForConditionalGeneration._from_config(config, attn_implementation=attention))


def llava_next() -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT: an image is read whole and in tiles."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=24),
        text_config=LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 32], [32, 16]],
        tie_word_embeddings=False,
    )
    return redraw(LlavaNextForConditionalGeneration._from_config(config, attn_implementation="sdpa"))


def llava_onevision() -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision: a SigLIP tower read after its last block, and a Qwen2."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**DECODER),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return redraw(LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="sdpa"))


def idefics2() -> Idefics2ForConditionalGeneration:
    """An Idefics2: four latents per image, a Mistral with a sliding window longer than the prompts."""
    config = Idefics2Config(
        vision_config=Idefics2VisionConfig(**TOWER),
        perceiver_config=Idefics2PerceiverConfig(
            hidden_size=D_MODEL,
            resampler_n_latents=PATCHES,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=8,
            num_key_value_heads=1,
        ),
        text_config=MistralConfig(**DECODER, head_dim=8, sliding_window=64),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )
    return redraw(Idefics2ForConditionalGeneration._from_config(config, attn_implementation="sdpa"))


DECODERS = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gpt2": gpt2}
ALL = {**DECODERS, "llava": llava}


def text_inputs(lengths: tuple[int, ...] = (9, 6), seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded random tokens of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, IMAGE_TOKEN, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(images: tuple[int, ...] = (2, 1), text: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded rows with the given numbers of images, each image followed by ``text`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count in images:
        row = torch.randint(3, IMAGE_TOKEN, (3,), generator=generator).tolist()
        for _ in range(count):
            row += [IMAGE_TOKEN] * PATCHES + torch.randint(3, IMAGE_TOKEN, (text,), generator=generator).tolist()
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, **({"pixel_values": pixels} if sum(images) else {})}


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    """A batch that the named model of `ALL` takes, with padding."""
    return image_inputs() if name == "llava" else text_inputs()


@cache
def vlm(name: str, attention: str = "sdpa") -> VLM:
    """The named model of `ALL`, wrapped; the same one for all tests, which have to leave it as it was."""
    return VLM(ALL[name](attention))
