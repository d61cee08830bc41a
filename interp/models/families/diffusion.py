"""The families of diffusion pipelines: how each encodes prompts, calls its denoiser and measures its latents.

To add a family, write one class here and list it in `DIFFUSION_FAMILIES`.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from interp.errors import InputError, nearest

Latents = Float[Tensor, "batch channel height width"]


@dataclass(frozen=True)
class Text:
    """Encoded prompts, as a denoiser takes them.

    Args:
        states: of every token.
        pooled: one vector per prompt, in families that have it.
        mask: which tokens are real, in families that mask the rest.
    """

    states: Float[Tensor, "prompt pos d_text"]
    pooled: Float[Tensor, "prompt d_pooled"] | None = None
    mask: Shaped[Tensor, "prompt pos"] | None = None

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.states)

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Text":
        """The same function on every tensor."""
        given = (self.pooled, self.mask)
        return Text(function(self.states), *(None if one is None else function(one) for one in given))

    def repeat(self, n: int) -> "Text":
        """Every prompt n times, copies side by side."""
        return self.apply(lambda value: value.repeat_interleave(n, dim=0))

    def followed_by(self, other: "Text") -> "Text":
        """The rows of two in one batch."""
        pairs = ((self.pooled, other.pooled), (self.mask, other.mask))
        rest = (None if one is None or two is None else torch.cat([one, two]) for one, two in pairs)
        return Text(torch.cat([self.states, other.states]), *rest)


class DiffusionFamily(ABC):
    """What differs between pipelines.

    Args:
        pipeline: a diffusers pipeline of this family.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    uncond_follows: ClassVar[bool] = False
    """Whether the pipeline calls the denoiser for the conditional half and then for the unconditional one."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.scale = int(pipeline.vae_scale_factor)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        unet = getattr(self.pipeline, "unet", None)
        return self.pipeline.transformer if unet is None else unet

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.denoiser.config.in_channels)

    @property
    def multiple(self) -> int:
        """What the sides of an image, in pixels, have to be multiples of."""
        return self.scale * int(getattr(self.denoiser.config, "patch_size", None) or 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained for."""
        cells = self.denoiser.config.sample_size
        height, width = (cells, cells) if isinstance(cells, int) else cells
        return height * self.scale, width * self.scale

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is a condition of the denoiser, not a matter of two calls."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipeline._execution_device)

    @abstractmethod
    def encode(self, prompts: list[str]) -> Text:
        """Encode prompts with the pipeline's own ``encode_prompt``."""

    def unconditional(self, prompts: list[str] | None, cond: Text) -> Text:
        """The other half of guidance: negative prompts, or what stands for none given.

        Args:
            prompts: one for each conditional one; None: none given.
            cond: the conditional half.
        """
        return self.encode(prompts if prompts is not None else [""] * len(cond))

    @abstractmethod
    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """Call the denoiser once.

        Args:
            latents: as the solver gives them.
            time: the timestep, a scalar.
            text: one row per latent.
            guidance: the guidance scale, for denoisers that take it as a condition.
        """

    def halves(self, rows: int) -> tuple[str, ...]:
        """Which halves of guidance a batch holds when the user runs the pipeline himself.

        Args:
            rows: of the batch. An even number after a guided ``pipeline(...)`` began counts as both halves.
        """
        scale = getattr(self.pipeline, "_guidance_scale", None)
        guided = scale is not None and bool(self.pipeline.do_classifier_free_guidance)
        return ("uncond", "cond") if guided and rows % 2 == 0 else ("cond",)

    def schedule(self, cells: tuple[int, int], steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's ``set_timesteps`` that depend on the size of the latents."""
        return {}

    @property
    def max_cells(self) -> int | None:
        """The longest side of the latents that the denoiser has positions for; None: any."""
        return None


class StableDiffusion(DiffusionFamily):
    """Stable Diffusion 1 and 2: a UNet that cross-attends to one CLIP encoder."""

    name = "unet"
    pipelines = ("StableDiffusionPipeline",)

    def encode(self, prompts: list[str]) -> Text:
        """See `DiffusionFamily`."""
        return Text(self.pipeline.encode_prompt(prompts, self.device, 1, False)[0])

    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """See `DiffusionFamily`."""
        return self.denoiser(latents, time, encoder_hidden_states=text.states, return_dict=False)[0]


class StableDiffusionXL(DiffusionFamily):
    """Stable Diffusion XL: two CLIP encoders; pooled text and the image's size are conditions as well."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)

    def encode(self, prompts: list[str]) -> Text:
        """See `DiffusionFamily`."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, do_classifier_free_guidance=False
        )
        return Text(states, pooled)

    def unconditional(self, prompts: list[str] | None, cond: Text) -> Text:
        """See `DiffusionFamily`; without negative prompts the checkpoint may ask for zeros."""
        if prompts is None and self.pipeline.config.force_zeros_for_empty_prompt:
            # No encoder runs, so that edits of it in this half are known not to apply.
            return cond.apply(torch.zeros_like)
        return super().unconditional(prompts, cond)

    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """See `DiffusionFamily`."""
        height, width = (side * self.scale for side in latents.shape[-2:])
        # Original size, upper left corner of the crop, target size.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.states.dtype, device=latents.device)
        added = {"text_embeds": text.pooled, "time_ids": sizes.repeat(len(latents), 1)}
        return self.denoiser(
            latents, time, encoder_hidden_states=text.states, added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusion3(DiffusionFamily):
    """Stable Diffusion 3: joint attention over the image's patches and the text of three encoders."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)

    def encode(self, prompts: list[str]) -> Text:
        """See `DiffusionFamily`."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False
        )
        return Text(states, pooled)

    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """See `DiffusionFamily`."""
        return self.denoiser(
            hidden_states=latents,
            timestep=time.to(latents.device).expand(len(latents)),
            encoder_hidden_states=text.states,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]

    def schedule(self, cells: tuple[int, int], steps: int) -> dict[str, Any]:
        """See `DiffusionFamily`."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", None):
            return {}
        patch = int(self.denoiser.config.patch_size)
        return {"mu": _shift((cells[0] // patch) * (cells[1] // patch), config, max_shift=1.16)}

    @property
    def max_cells(self) -> int | None:
        """See `DiffusionFamily`."""
        return int(self.denoiser.config.pos_embed_max_size) * int(self.denoiser.config.patch_size)


class Flux(DiffusionFamily):
    """Flux: joint attention over packed latents and T5's text; the guidance scale is a condition.

    Latents are [batch, channel, height, width] everywhere outside the denoiser.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    uncond_follows = True

    @property
    def latent_channels(self) -> int:
        """See `DiffusionFamily`; cells are packed by fours."""
        return int(self.denoiser.config.in_channels) // 4

    @property
    def multiple(self) -> int:
        """See `DiffusionFamily`."""
        return self.scale * 2

    @property
    def default_size(self) -> tuple[int, int]:
        """See `DiffusionFamily`."""
        side = int(self.pipeline.default_sample_size) * self.scale
        return side, side

    @property
    def embeds_guidance(self) -> bool:
        """See `DiffusionFamily`."""
        return True

    def halves(self, rows: int) -> tuple[str, ...]:
        """See `DiffusionFamily`; the pipeline calls the denoiser once for each half."""
        return ("cond",)

    def encode(self, prompts: list[str]) -> Text:
        """See `DiffusionFamily`."""
        states, pooled, _ = self.pipeline.encode_prompt(prompt=prompts, device=self.device)
        return Text(states, pooled)

    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """See `DiffusionFamily`."""
        batch, _, height, width = latents.shape
        packed = rearrange(latents, "batch c (h p) (w q) -> batch (h w) (c p q)", p=2, q=2)
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        positions = rearrange(torch.stack([torch.zeros_like(rows), rows, columns]), "xyz h w -> (h w) xyz")
        distilled = bool(self.denoiser.config.guidance_embeds)
        predicted = self.denoiser(
            hidden_states=packed,
            timestep=time.to(latents.device).expand(batch).to(latents.dtype) / 1000,
            guidance=torch.full([batch], guidance, device=latents.device) if distilled else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.states,
            txt_ids=torch.zeros(text.states.shape[1], 3, device=latents.device, dtype=text.states.dtype),
            img_ids=positions.to(latents.device, text.states.dtype),
            return_dict=False,
        )[0]
        return rearrange(predicted, "batch (h w) (c p q) -> batch c (h p) (w q)", h=height // 2, p=2, q=2)

    def schedule(self, cells: tuple[int, int], steps: int) -> dict[str, Any]:
        """See `DiffusionFamily`."""
        config = self.pipeline.scheduler.config
        sigmas = None if config.get("use_flow_sigmas", None) else np.linspace(1.0, 1 / steps, steps)
        given = {} if sigmas is None else {"sigmas": sigmas}
        return given | {"mu": _shift((cells[0] // 2) * (cells[1] // 2), config, max_shift=1.15)}


class PixArt(DiffusionFamily):
    """PixArt-alpha and -sigma: cross-attention to masked T5 text; some predict a variance beside the noise.

    Sizes are not moved to the nearest of the training bins, as the pipelines do by default.
    """

    name = "pixart"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    def halves(self, rows: int) -> tuple[str, ...]:
        """See `DiffusionFamily`; these pipelines do not say whether they guide: even batches count as guided."""
        return ("uncond", "cond") if rows % 2 == 0 else ("cond",)

    def encode(self, prompts: list[str]) -> Text:
        """See `DiffusionFamily`; captions are cleaned where the packages for it are installed, as the pipeline does."""
        clean = all(importlib.util.find_spec(package) is not None for package in ("bs4", "ftfy"))
        sigma = any(cls.__name__ == "PixArtSigmaPipeline" for cls in type(self.pipeline).__mro__)
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts, False, device=self.device, clean_caption=clean, max_sequence_length=300 if sigma else 120
        )
        return Text(states, mask=mask)

    def predict(self, latents: Latents, time: Tensor, text: Text, guidance: float) -> Latents:
        """See `DiffusionFamily`."""
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:
            height, width = (side * self.scale for side in latents.shape[-2:])
            resolution, ratio = torch.tensor([[height, width]]), torch.tensor([[height / width]])
            added["resolution"] = resolution.to(text.states).repeat(len(latents), 1)
            added["aspect_ratio"] = ratio.to(text.states).repeat(len(latents), 1)
        predicted = self.denoiser(
            latents,
            encoder_hidden_states=text.states,
            encoder_attention_mask=text.mask,
            timestep=time.to(latents.device).expand(len(latents)),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return predicted[:, : self.latent_channels]


DIFFUSION_FAMILIES: tuple[type[DiffusionFamily], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArt,
)


def diffusion_family_of(pipeline: Any) -> DiffusionFamily:
    """The family of a pipeline, by its class or one that it inherits from.

    Raises:
        InputError: no family covers it, it lacks a part, or its UNet takes the guidance scale as a condition.
    """
    classes = [cls.__name__ for cls in type(pipeline).__mro__]
    known = {name: family for family in DIFFUSION_FAMILIES for name in family.pipelines}
    family = next((known[name] for name in classes if name in known), None)
    if family is None:
        raise InputError(
            f"Diffusion wraps a diffusers text-to-image pipeline, not {classes[0]}. {nearest(classes[0], known)} "
            f"Supported: {', '.join(known)}; Diffusion.from_pretrained(name) loads one".replace("  ", " ")
        )
    made = family(pipeline)
    for part in ("vae", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise InputError(f"this {classes[0]} has no {part}, without which it cannot run")
    if not isinstance(made.denoiser, nn.Module):
        raise InputError(f"this {classes[0]} has no denoiser (unet or transformer)")
    if getattr(made.denoiser.config, "time_cond_proj_dim", None) is not None:
        raise InputError(f"the UNet of this {classes[0]} takes the guidance scale as a condition, which is unsupported")
    return made


def _shift(tokens: int, config: Any, max_shift: float) -> float:
    """How far the noise levels of a flow move with the number of image tokens: linear between two sizes.

    Source: the Flux and Stable Diffusion 3 pipelines of diffusers.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return float(tokens * slope + (base - slope * low))
