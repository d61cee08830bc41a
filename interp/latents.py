"""Images to latents and back, through a pipeline's autoencoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from interp.errors import InputError, ShapeError, nearest
from interp.images import load_image

VaeMode = Literal["mode", "mean", "sample"]
Size = int | Sequence[int] | None
# Beyond the range by rounding of the resize or of half precision, not by a wrong scale.
_SLACK = 1e-2


def size_of(size: Size, multiple: int) -> tuple[int, int] | None:
    """A size in pixels as (height, width), checked.

    Args:
        size: one side of a square, or (height, width); None passes through.
        multiple: what both sides have to be multiples of.

    Raises:
        InputError: a size of another form, or sides that are no multiples.
    """
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise InputError(f"size={size!r}: give one side in pixels, or (height, width)")
    if any(side % multiple for side in sides):
        near = tuple(max(round(side / multiple), 1) * multiple for side in sides)
        raise InputError(
            f"images of {sides[0]}×{sides[1]} pixels: the sides have to be multiples of {multiple} here; size={near} "
            "is the nearest"
        )
    return sides[0], sides[1]


def pixels(images: Any, *, size: Size = None, multiple: int = 1) -> Float[Tensor, "batch 3 height width"]:
    """Images as the autoencoder takes them.

    Args:
        images: a PIL image (or a path to one), several of them, or a float tensor [batch, 3, height, width] in -1..1.
        size: resize PIL images to this, bilinearly; None: as they are.
        multiple: what the sides have to be multiples of.

    Returns:
        float32 in -1..1.

    Raises:
        InputError: no images, a tensor outside -1..1, images of different sizes, sides that are no multiples, or
            ``size`` with a tensor of another size.
        ShapeError: a tensor of another shape.

    Source: Diffusion Hyperfeatures' code (bilinear resize by PIL, then 2 x / 255 - 1).
    """
    wanted = size_of(size, multiple)
    if isinstance(images, Tensor):
        return _checked(images, wanted, multiple)
    listed = list(images) if isinstance(images, list | tuple) else [images]
    if not listed:
        raise InputError("no images given")
    read = [load_image(image) for image in listed]
    if wanted is not None:
        read = [image.resize((wanted[1], wanted[0]), Image.Resampling.BILINEAR) for image in read]
    sizes = sorted({(image.height, image.width) for image in read})
    if len(sizes) > 1:
        raise InputError(f"images of different sizes in one batch ({sizes[0]} and {sizes[1]} pixels): give size=")
    size_of(sizes[0], multiple)
    stacked = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in read]))
    return rearrange(stacked, "batch height width rgb -> batch rgb height width") / 127.5 - 1


def _checked(images: Tensor, wanted: tuple[int, int] | None, multiple: int) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ShapeError(f"images of shape {tuple(images.shape)}: expected [batch, 3, height, width]")
    if not images.is_floating_point():
        raise InputError(f"images of dtype {images.dtype}: expected floats in -1..1 (of bytes: x / 127.5 - 1)")
    if not images.numel():
        raise InputError("no images given")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):
        raise InputError(f"images with values from {low:.3g} to {high:.3g}: expected -1..1")
    if wanted is not None and tuple(images.shape[-2:]) != wanted:
        raise InputError(f"size={wanted} resizes PIL images; the tensor is {tuple(images.shape[-2:])}")
    size_of(tuple(images.shape[-2:]), multiple)
    return images.float()


def encode(
    vae: Any,
    images: Float[Tensor, "batch 3 height width"],
    mode: VaeMode = "mode",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channel latent_height latent_width"]:
    """Scaled latents of images.

    Args:
        vae: an ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers.
        images: in -1..1.
        mode: ``"mode"`` (or ``"mean"``, the same of a Gaussian) of the posterior, or a ``"sample"`` of it.
        generator: of the sample.

    Returns:
        Latents in the autoencoder's dtype, shifted and scaled as the denoiser expects them.

    Raises:
        InputError: an unknown mode, or a sample without a generator.
    """
    if mode not in ("mode", "mean", "sample"):
        raise InputError(f"vae={mode!r}: give 'mode', 'mean' or 'sample'. {nearest(str(mode), ('mode', 'sample'))}")
    if mode == "sample" and generator is None:
        raise InputError("vae='sample' draws at random: give seed=")
    with _full_precision(vae) as dtype:
        weights = next(vae.parameters())
        encoded = vae.encode(images.to(weights.device, weights.dtype))
        # Autoencoders without a posterior (AutoencoderTiny) have one latent only.
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None:
            raw = encoded.latents
        else:
            raw = posterior.sample(generator) if mode == "sample" else posterior.mode()
    mean, std = _statistics(vae, raw)
    scaled = (raw - mean) * vae.config.scaling_factor / std
    return scaled.to(dtype)


def decode(
    vae: Any, latents: Float[Tensor, "batch channel latent_height latent_width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Images of scaled latents.

    Args:
        vae: an ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers.
        latents: as the denoiser has them.

    Returns:
        float32 in 0..1.
    """
    with _full_precision(vae):
        weights = next(vae.parameters())
        scaled = latents.to(weights.device, weights.dtype)
        mean, std = _statistics(vae, scaled)
        decoded = vae.decode(scaled * std / vae.config.scaling_factor + mean, return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """PIL images of a batch in 0..1."""
    values = rearrange(images, "batch rgb height width -> batch height width rgb").float().cpu().numpy()
    return [Image.fromarray((value * 255).round().astype(np.uint8)) for value in values]


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is subtracted from raw latents, and their spread by channel where the autoencoder states it."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        by_channel = [rearrange(torch.as_tensor(one), "channel -> 1 channel 1 1").to(latents) for one in (mean, std)]
        return by_channel[0], by_channel[1]
    return float(getattr(vae.config, "shift_factor", None) or 0.0), 1.0


@contextmanager
def _full_precision(vae: Any) -> Iterator[torch.dtype]:
    """Run a float16 autoencoder that overflows in it in float32; its weights come back bit by bit."""
    dtype = next(vae.parameters()).dtype
    upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        yield dtype
    finally:
        if upcast:
            vae.to(dtype)
