"""The stages of training: the autoencoder, the denoiser on its latents, and the decoder once more."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from interp.errors import InputError
from interp.progress import track
from interp.zoo.creatures import STYLES, Scene, caption, draw_scenes, render
from interp.zoo.diffusion.architecture import new_scheduler

CAPTION_DROPOUT = 0.1
SNR_LIMIT = 5.0  # of the loss weights min(SNR, limit) / SNR, "Efficient Diffusion Training via Min-SNR", eq. 6
EMA_DECAY = 0.999
LATENT_NOISE = 0.05  # added to latents while the autoencoder learns, so that near latents are near pictures
LATENT_PULL = 1e-3  # weight of the mean squared latent, without which they would grow out of the noise
CROP = 32  # pixels a side of what the autoencoder learns from
SLOPES = 0.5  # weight of the error of differences between neighbouring pixels while the decoder learns alone
LOG_EVERY = 50
SAVE_EVERY = 500


@dataclass(frozen=True)
class Stage:
    """How long and how fast a stage learns.

    Attributes:
        name: of the stage, and of its folder.
        steps: optimiser steps.
        batch: pictures a step.
        rate: peak learning rate.
        seed: of the weights and of everything drawn.

    Raises:
        InputError: ``steps``, ``batch`` or ``rate`` is not positive, or ``seed`` is negative.
    """

    name: str
    steps: int
    batch: int
    rate: float
    seed: int

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "rate"):
            if getattr(self, field) <= 0:
                raise InputError(f"stage {self.name!r}: {field} is {getattr(self, field)}; expected more than 0.")
        if self.seed < 0:
            raise InputError(f"stage {self.name!r}: seed is {self.seed}; expected a whole number from 0.")


def draw_pictures(n: int, seed: int) -> tuple[list[Scene], UInt8[Tensor, "picture 3 height width"]]:
    """Draw training pictures.

    Args:
        n: how many, at least 1.
        seed: of the scenes.

    Returns:
        The scenes, and their pictures in 8 bits.

    Raises:
        InputError: ``n`` is below 1 or ``seed`` below 0.
    """
    scenes = draw_scenes(n, seed)
    chunks = range(0, n, 256)
    drawn = [render(scenes[k : k + 256]).images for k in track(chunks, "drawing pictures", len(chunks))]
    return scenes, (torch.cat(drawn) * 255).round().to(torch.uint8)


def scaled(pictures: UInt8[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Pictures from 8 bits to -1 .. 1, as the autoencoder takes them."""
    return pictures.float() / 127.5 - 1.0


def epochs(n: int, stage: Stage, rng: np.random.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """Choose pictures for every step of a stage: each picture once in an epoch.

    Args:
        n: how many pictures there are.
        stage: its steps and batch.
        rng: where the order comes from.

    Yields:
        Indexes below ``n``.
    """
    order = np.empty(0, dtype=np.int64)
    for _ in range(stage.steps):
        while len(order) < stage.batch:
            order = np.concatenate([order, rng.permutation(n)])
        taken, order = order[: stage.batch], order[stage.batch :]
        yield torch.from_numpy(taken)


class Log:
    """Lines of JSON with the mean loss of the last steps, and how many seconds have passed.

    Args:
        path: of the file; one that is there is written anew.
        steps: how many there will be; a line follows the last of them in any case.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._path, self._steps = path, steps
        self._recent: list[float] = []
        self._started = time.time()
        path.write_text("", encoding="utf-8")

    def add(self, step: int, loss: float) -> None:
        """Note the loss of a step, counted from 1."""
        self._recent.append(loss)
        if step % LOG_EVERY == 0 or step == self._steps:
            line = {"step": step, "loss": float(np.mean(self._recent)), "seconds": round(time.time() - self._started)}
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
            self._recent.clear()


class Optimiser:
    """AdamW with linear warm-up and cosine decay of the rate to a hundredth, gradients clipped to norm 1.

    Args:
        parameters: what it changes.
        stage: its steps and peak rate.
    """

    def __init__(self, parameters: list[nn.Parameter], stage: Stage) -> None:
        warm = max(1, min(200, stage.steps // 10))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, stage.steps - warm)))

        self._parameters = parameters
        self._adam = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, factor)

    def step(self, loss: Tensor) -> None:
        """Take one step down the gradient of a loss."""
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()


def train_autoencoder(
    autoencoder: AutoencoderTiny, pictures: UInt8[Tensor, "picture 3 height width"], stage: Stage, folder: Path
) -> None:
    """Train the autoencoder on mean absolute and squared error of crops.

    Its scaling factor is then set so that latents have unit variance.

    Args:
        autoencoder: trained in place.
        pictures: in 8 bits.
        stage: its length and rate.
        folder: gets ``log.jsonl``.
    """
    optimiser, log = Optimiser(list(autoencoder.parameters()), stage), Log(folder / "log.jsonl", stage.steps)
    rng, generator = np.random.default_rng(stage.seed), torch.Generator().manual_seed(stage.seed)
    chosen = epochs(len(pictures), stage, rng)
    for step, indexes in enumerate(track(chosen, stage.name, stage.steps), start=1):
        top, left = rng.integers(pictures.shape[-1] - CROP + 1, size=2)
        target = scaled(pictures[indexes, :, top : top + CROP, left : left + CROP])
        latents = autoencoder.encode(target).latents
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        error = autoencoder.decode(latents + noise).sample - target
        loss = error.abs().mean() + 2 * error.square().mean() + LATENT_PULL * latents.square().mean()
        optimiser.step(loss)
        log.add(step, loss.item())
    deviation = encode(autoencoder, pictures[:2048], scale=1.0).std()
    autoencoder.register_to_config(scaling_factor=round(1 / float(deviation), 4))


@torch.no_grad()
def encode(
    autoencoder: AutoencoderTiny, pictures: UInt8[Tensor, "picture 3 height width"], scale: float
) -> Float[Tensor, "picture channel latent_height latent_width"]:
    """The latents of pictures.

    Args:
        autoencoder: encodes them.
        pictures: in 8 bits.
        scale: what the latents are multiplied by, such as the autoencoder's scaling factor.

    Returns:
        The latents, in the order of the pictures.
    """
    chunks = [pictures[k : k + 64] for k in range(0, len(pictures), 64)]
    latents = [autoencoder.encode(scaled(chunk)).latents for chunk in track(chunks, "encoding", len(chunks))]
    return torch.cat(latents) * scale


def caption_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[Tensor, "caption pos"]:
    """Captions as the pipeline tokenizes them: padded to the text encoder's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_denoiser(
    denoiser: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scenes: list[Scene],
    latents: Float[Tensor, "picture channel height width"],
    stage: Stage,
    folder: Path,
) -> None:
    """Train denoiser and text encoder together to predict the noise; the averaged weights are kept.

    Args:
        denoiser, text_encoder: trained in place.
        tokenizer: of the captions.
        scenes: of the training pictures.
        latents: of the same pictures, scaled to unit variance.
        stage: its length and rate.
        folder: gets ``log.jsonl``, and every 500 steps the averaged weights so far.
    """
    both = nn.ModuleList([denoiser, text_encoder])
    parameters = list(both.parameters())
    optimiser, log = Optimiser(parameters, stage), Log(folder / "log.jsonl", stage.steps)
    average = EMAModel(parameters, decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    rng, generator = np.random.default_rng(stage.seed), torch.Generator().manual_seed(stage.seed)
    by_style = [caption_ids(tokenizer, [caption(scene, style) for scene in scenes]) for style in range(len(STYLES))]
    styles = torch.stack(by_style)
    empty = caption_ids(tokenizer, [""])[0]
    alphas = new_scheduler().alphas_cumprod
    both.train()
    chosen = epochs(len(latents), stage, rng)
    for step, indexes in enumerate(track(chosen, stage.name, stage.steps), start=1):
        ids = styles[torch.from_numpy(rng.integers(len(styles), size=len(indexes))), indexes]
        ids[torch.from_numpy(rng.random(len(indexes)) < CAPTION_DROPOUT)] = empty
        clean = latents[indexes].float()
        timesteps = torch.from_numpy(rng.integers(len(alphas), size=len(indexes)))
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        context = text_encoder(ids).last_hidden_state
        error = (denoiser(noisy, timesteps, context).sample - noise).square().mean(dim=(1, 2, 3))
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        loss = (error * snr.clamp(max=SNR_LIMIT) / snr).mean()
        optimiser.step(loss)
        average.step(parameters)
        log.add(step, loss.item())
        if step % SAVE_EVERY == 0:
            average.store(parameters)
            average.copy_to(parameters)
            denoiser.save_pretrained(folder / "unet")
            text_encoder.save_pretrained(folder / "text_encoder")
            average.restore(parameters)
    average.copy_to(parameters)
    both.eval()


def train_decoder(
    autoencoder: AutoencoderTiny,
    pictures: UInt8[Tensor, "picture 3 height width"],
    latents: Float[Tensor, "picture channel latent_height latent_width"],
    stage: Stage,
    folder: Path,
) -> None:
    """Go on training the decoder alone, on whole pictures; latents keep their meaning.

    Besides the errors that the autoencoder learned from there are those of the differences between neighbouring
    pixels: they show blotches on plain areas and blurred edges, which weigh little in the errors of single pixels.

    Args:
        autoencoder: its decoder is trained in place.
        pictures: in 8 bits.
        latents: of the same pictures, times the autoencoder's scaling factor.
        stage: its length and rate.
        folder: gets ``log.jsonl``.
    """
    optimiser = Optimiser(list(autoencoder.decoder.parameters()), stage)
    log = Log(folder / "log.jsonl", stage.steps)
    rng, generator = np.random.default_rng(stage.seed), torch.Generator().manual_seed(stage.seed)
    chosen = epochs(len(pictures), stage, rng)
    for step, indexes in enumerate(track(chosen, stage.name, stage.steps), start=1):
        target = scaled(pictures[indexes])
        clean = latents[indexes] / autoencoder.config.scaling_factor
        noise = LATENT_NOISE * torch.randn(clean.shape, generator=generator)
        error = autoencoder.decode(clean + noise).sample - target
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + SLOPES * slopes
        optimiser.step(loss)
        log.add(step, loss.item())
