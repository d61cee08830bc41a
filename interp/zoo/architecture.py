"""The small models, untrained: configurations, and the processor that goes with them."""

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIDE = 48
PATCH = 16
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
CONTEXT = 512


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The configuration of the language model: 8 layers of width 128 with 4 heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_llama(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A language model with random weights.

    Args:
        tokenizer: gives the vocabulary and the special tokens.
        seed: of the weights.

    Returns:
        The model, float32, on the CPU.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(tokenizer))


def new_llava(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A VLM with random vision tower and projector around a copy of a trained language model.

    Args:
        llama: the language model to start from; it is not changed.
        tokenizer: gives the image token.
        seed: of the new weights.

    Returns:
        The model, float32, on the CPU; the last vision layer's patch outputs are projected, CLS dropped.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.language_model.load_state_dict(llama.model.state_dict())
    llava.tie_weights()
    return llava


def new_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: pictures are resized to 48 x 48 with Pillow and scaled to -1 .. 1."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
