"""The parts of the small diffusion model, in the layout of Stable Diffusion, with random weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from interp.zoo.creatures import VOCABULARY

SIZE = 64  # pixels a side
LATENT_SIZE = 16
LATENT_CHANNELS = 4
TEXT_LENGTH = 32  # tokens of a caption, the two special ones included
TEXT_WIDTH = 96
CHANNELS = (64, 80, 96, 96)
END_OF_WORD = "</w>"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw weights from a seed and leave torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: every merge, in order, wherever its two pieces meet."""
    for first, second in merges:
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == (first, second):
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def new_tokenizer() -> CLIPTokenizer:
    """The CLIP tokenizer with merges that make one token of each of the captions' words; always the same.

    Its ids are in CLIP's order: bytes, bytes at the end of a word, merges, the two special tokens. Any other text is
    spelled in bytes and in pieces of the words.

    Returns:
        The tokenizer, for texts of up to 32 tokens.
    """
    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    # What a word adds comes after every merge of the words before it, so it cannot split those again.
    for word in VOCABULARY:
        pieces = _merged([*word[:-1], f"{word[-1]}{END_OF_WORD}"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1:])
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def new_autoencoder(seed: int) -> AutoencoderTiny:
    """An autoencoder without normalisation: 64×64 pixels to 16×16 latents of four channels.

    Args:
        seed: of the weights.

    Returns:
        The autoencoder; its scaling factor is set once it is trained.
    """
    with _seeded(seed):
        return AutoencoderTiny(
            encoder_block_out_channels=(32, 32, 32),
            decoder_block_out_channels=(32, 32, 32),
            num_encoder_blocks=(0, 1, 2),
            num_decoder_blocks=(2, 1, 1),
            latent_channels=LATENT_CHANNELS,
        )


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A CLIP text model, to be trained from nothing together with the denoiser.

    Args:
        tokenizer: whose tokens it embeds.
        seed: of the weights.

    Returns:
        The model: three layers of four heads.
    """
    configuration = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _seeded(seed):
        return CLIPTextModel(configuration)


def new_denoiser(seed: int) -> UNet2DConditionModel:
    """A UNet with four levels and three resnets in each up block, attention at the two middle levels.

    Args:
        seed: of the weights.

    Returns:
        The UNet, 6.8 million parameters.
    """
    with _seeded(seed):
        return UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=CHANNELS,
            layers_per_block=2,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # the number of heads, in this configuration's words
            norm_num_groups=16,
        )


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1: 1000 timesteps, epsilon prediction, steps offset by 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def new_pipeline(
    autoencoder: AutoencoderTiny, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, denoiser: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Put the parts together as any Stable Diffusion pipeline.

    Args:
        autoencoder: between pixels and latents.
        text_encoder: of the captions.
        tokenizer: of the captions.
        denoiser: predicts the noise in latents.

    Returns:
        The pipeline, with the scheduler of the training and without a safety checker.
    """
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
