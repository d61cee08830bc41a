"""What the small diffusion model can do, measured on scenes that it has never seen."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from interp.progress import track
from interp.zoo.creatures import STYLES, Scene, caption, draw_scenes, render
from interp.zoo.diffusion.classifier import Classifier, agreement
from interp.zoo.diffusion.novelty import summaries
from interp.zoo.diffusion.training import caption_ids, encode

HELD_OUT_SEED = 12  # of the scenes whose pictures are encoded, reconstructed and noised
CAPTION_SEED = 13  # of the scenes whose captions are drawn
NOISE_SEED = 14  # of timesteps and noise
FIRST_IMAGE_SEED = 1000  # of the first generated picture; the next ones follow
BINS = 10
BATCH = 32

Predictor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measuring:
    """How much is measured.

    Attributes:
        held_out: how many pictures are reconstructed and noised.
        captions: how many pictures are generated at each scale.
        scales: of the guidance.
        steps: of DDIM.
    """

    held_out: int
    captions: int
    scales: tuple[float, ...]
    steps: int


FULL = Measuring(held_out=512, captions=256, scales=(1.0, 3.0, 7.5), steps=50)
CHECK = Measuring(held_out=24, captions=16, scales=(3.0,), steps=20)


def load(folder: Path) -> StableDiffusionPipeline:
    """Load a pipeline with diffusers alone, in single precision, without bars.

    Args:
        folder: of the pipeline.

    Returns:
        The pipeline.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def captions(scenes: Sequence[Scene]) -> list[str]:
    """Captions of scenes, their styles taking turns."""
    return [caption(scene, index % len(STYLES)) for index, scene in enumerate(scenes)]


@torch.no_grad()
def decode(
    autoencoder: AutoencoderTiny, latents: Float[Tensor, "picture channel latent_height latent_width"]
) -> Float[Tensor, "picture 3 height width"]:
    """Pictures of latents, as the pipeline decodes them.

    Args:
        autoencoder: decodes them.
        latents: times the autoencoder's scaling factor.

    Returns:
        Pictures, 0 to 1.
    """
    chunks = (latents / autoencoder.config.scaling_factor).split(BATCH)
    return torch.cat([(autoencoder.decode(chunk).sample / 2 + 0.5).clamp(0, 1) for chunk in chunks])


def psnr(
    images: Float[Tensor, "picture 3 height width"], others: Float[Tensor, "picture 3 height width"]
) -> Float[Tensor, " picture"]:
    """The peak signal-to-noise ratio of each picture against another one, in dB; the peak is 1."""
    return -10 * (images - others).square().mean(dim=(1, 2, 3)).log10()


def reconstruct(
    autoencoder: AutoencoderTiny, images: Float[Tensor, "picture 3 height width"]
) -> tuple[Float[Tensor, "picture channel latent_height latent_width"], Float[Tensor, "picture 3 height width"]]:
    """Encode pictures and decode them again.

    Args:
        autoencoder: does both.
        images: 0 to 1.

    Returns:
        Latents, times the autoencoder's scaling factor, and pictures, 0 to 1.
    """
    pictures = (images * 255).round().to(torch.uint8)
    latents = encode(autoencoder, pictures, autoencoder.config.scaling_factor)
    return latents, decode(autoencoder, latents)


def generate(
    pipeline: StableDiffusionPipeline, texts: Sequence[str], scale: float, steps: int
) -> tuple[Float[Tensor, "picture channel latent_height latent_width"], Float[Tensor, "picture 3 height width"]]:
    """Generate a picture for each caption with the pipeline itself; each has a seed of its own.

    Args:
        pipeline: the model.
        texts: the captions.
        scale: of the guidance; 1 is without guidance.
        steps: of DDIM.

    Returns:
        Latents, times the autoencoder's scaling factor, and pictures, 0 to 1.
    """
    latents = []
    starts = range(0, len(texts), BATCH)
    for start in track(starts, f"guidance {scale:g}", len(starts)):
        chunk = list(texts[start : start + BATCH])
        seeds = range(FIRST_IMAGE_SEED + start, FIRST_IMAGE_SEED + start + len(chunk))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipeline(
            chunk, guidance_scale=scale, num_inference_steps=steps, generator=generators, output_type="latent"
        )
        latents.append(made.images)
    return torch.cat(latents), decode(pipeline.vae, torch.cat(latents))


def denoising_loss(
    predict: Predictor,
    alphas: Float[Tensor, " timestep"],
    latents: Float[Tensor, "picture channel latent_height latent_width"],
) -> list[float]:
    """The mean squared error of predicted noise, in bins of timesteps of equal width.

    Args:
        predict: gives the noise in noisy latents [picture, channel, height, width] at timesteps [picture].
        alphas: the scheduler's cumulative products.
        latents: without noise; each is noised once in every bin, always in the same way.

    Returns:
        The error in each bin, that of the lowest timesteps first; predicting no noise at all has an error of 1.
    """
    generator = torch.Generator().manual_seed(NOISE_SEED)
    width = len(alphas) // BINS
    losses = []
    for low in range(0, width * BINS, width):
        timesteps = torch.randint(low, low + width, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        alpha = rearrange(alphas[timesteps], "picture -> picture 1 1 1")
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        losses.append(round(float((predict(noisy, timesteps) - noise).square().mean()), 4))
    return losses


def model_predictor(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Predictor:
    """The denoiser with the captions of the pictures that it will be asked about, in their order."""
    ids = caption_ids(pipeline.tokenizer, list(texts))

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Int[Tensor, " picture"]) -> Tensor:
        parts = zip(noisy.split(BATCH), timesteps.split(BATCH), ids.split(BATCH), strict=True)
        predicted = [
            pipeline.unet(rows, times, pipeline.text_encoder(words).last_hidden_state).sample
            for rows, times, words in parts
        ]
        return torch.cat(predicted)

    return predict


def linear_predictor(
    latents: Float[Tensor, "picture channel latent_height latent_width"], alphas: Float[Tensor, " timestep"]
) -> Predictor:
    """The best predictor of the noise that is linear in the noisy latents.

    It is optimal among all affine predictors for latents of this mean and covariance, one for each timestep.

    Args:
        latents: where mean and covariance come from.
        alphas: the scheduler's cumulative products.

    Returns:
        The predictor.
    """
    flat = rearrange(latents, "picture channel height width -> picture (channel height width)")
    mean = flat.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov((flat - mean).T))
    values = values.clamp(min=0)

    def predict(noisy: Tensor, timesteps: Int[Tensor, " picture"]) -> Tensor:
        alpha = alphas[timesteps][:, None]
        centred = noisy.flatten(start_dim=1) - alpha.sqrt() * mean
        gain = (1 - alpha).sqrt() / (alpha * values + 1 - alpha)
        return (((centred @ vectors) * gain) @ vectors.T).reshape(noisy.shape)

    return predict


def measure(
    pipeline: StableDiffusionPipeline,
    classifier: Classifier,
    how: Measuring,
    training: UInt8[Tensor, "known 3 height width"] | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        pipeline: the model.
        classifier: tells what pictures show.
        how: how much is measured.
        training: the pictures that the denoiser learned from; without them there is no linear bound, and nothing is
            said about the nearest of them.

    Returns:
        PSNR of reconstructions; denoising loss by timestep; how often generated pictures show what their captions
        say, and held-out pictures and their reconstructions what they should; and how far generated pictures are
        from the nearest training pictures, beside the reconstructions of held-out pictures and of training pictures.
    """
    autoencoder, alphas = pipeline.vae, pipeline.scheduler.alphas_cumprod
    scenes, wanted = draw_scenes(how.held_out, HELD_OUT_SEED), draw_scenes(how.captions, CAPTION_SEED)
    images = render(scenes).images
    latents, reconstructed = reconstruct(autoencoder, images)
    made = {f"guidance {scale:g}": generate(pipeline, captions(wanted), scale, how.steps) for scale in how.scales}
    losses = {
        "with caption": denoising_loss(model_predictor(pipeline, captions(scenes)), alphas, latents),
        "without caption": denoising_loss(model_predictor(pipeline, [""] * len(scenes)), alphas, latents),
    }
    figures: dict[str, Any] = {
        "measured_on": asdict(how),
        "psnr": round(float(psnr(reconstructed, images).mean()), 2),
        "denoising_loss": losses,
        "generated": {name: agreement(classifier.predict(shown), wanted) for name, (_, shown) in made.items()},
        "classifier": {
            "held-out renders": agreement(classifier.predict(images), scenes),
            "their reconstructions": agreement(classifier.predict(reconstructed), scenes),
        },
    }
    if training is not None:
        known = encode(autoencoder, training, autoencoder.config.scaling_factor)
        losses["linear"] = denoising_loss(linear_predictor(known, alphas), alphas, latents)
        again = decode(autoencoder, known[: how.captions])
        pixels = {"held-out": reconstructed[: how.captions], "training pictures themselves": again}
        figures["nearest_training_picture"] = {
            "pixels": summaries({name: shown for name, (_, shown) in made.items()} | pixels, training, 1 / 255),
            "latents": summaries(
                {name: drawn for name, (drawn, _) in made.items()} | {"held-out": latents[: how.captions]}, known
            ),
        }
    return figures
