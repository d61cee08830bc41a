"""ControlNets and T2I-adapters beside a UNet: what they add goes into every one of its calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, ShapeError
from interp.guidance.checkpointing import without_weight_gradients
from interp.guidance.terms import check_finite, is_number, usable

FAMILIES = ("unet", "sdxl")


@contextmanager
def controlled(
    sd: Any, network: nn.Module, image: Float[Tensor, "sample channel height width"], scale: float = 1.0
) -> Iterator[None]:
    """Within this block, every call of the UNet has the residuals of a ControlNet or a T2I-adapter added to it.

    That holds for generations, inversions and captures, guided or not, and for the twins of guided runs. Gradients of
    guidance go through a ControlNet, which sees the latents; none of its weights gets one.

    Args:
        sd: Stable Diffusion 1, 2 or XL.
        network: a ``ControlNetModel`` or ``T2IAdapter`` of diffusers, made for this model; it is not changed.
        image: what it sees, 0 to 1, in pixels of the generated images; one for all samples, or one for each. It is no
            target: guidance has its own.
        scale: of what is added.

    Raises:
        InputError: another kind of model or network, an image out of range, or a scale that is no number.
        ShapeError: an image of another size than the run's, or numbers of images and samples that do not fit.

    Source: Adding Conditional Control to Text-to-Image Diffusion Models, section 3.1; T2I-Adapter, section 3.2.
    """
    if sd.family not in FAMILIES:
        raise InputError(f"residuals go into UNets ({', '.join(FAMILIES)}), not into the family {sd.family!r}")
    if not isinstance(network, ControlNetModel | T2IAdapter):
        raise InputError(f"controlled takes a ControlNetModel or T2IAdapter of diffusers, not {type(network).__name__}")
    if not is_number(scale):
        raise InputError(f"scale={scale!r}: give a number")
    check_finite(image, "the control image")
    if image.ndim != 4 or not len(image):
        raise ShapeError(f"the control image is {tuple(image.shape)}: give [sample, channel, height, width]")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise InputError(f"the control image has values from {low:.3g} to {high:.3g}: give 0 to 1")
    seen = image.to(sd.device, sd.dtype)
    features: list[Tensor] = []
    if isinstance(network, T2IAdapter):
        with torch.no_grad():
            features = [float(scale) * one for one in network(seen)]

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        sample = given["sample"]
        _check_size(image, sample, sd.adapter.scale)
        if features:
            # The UNet takes them off its list.
            more = {"down_intrablock_additional_residuals": [usable(_tiled(one, len(sample))) for one in features]}
            return args, kwargs | more
        down, middle = network(
            sample,
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=usable(_tiled(seen, len(sample))),
            conditioning_scale=float(scale),
            added_cond_kwargs=given.get("added_cond_kwargs"),
            return_dict=False,
        )
        return args, kwargs | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    handle = sd.denoiser.register_forward_pre_hook(add, with_kwargs=True)
    try:
        with without_weight_gradients([network]):
            yield
    finally:
        handle.remove()


def _check_size(image: Tensor, sample: Tensor, scale: int) -> None:
    sides = tuple(scale * side for side in sample.shape[-2:])
    if tuple(image.shape[-2:]) != sides:
        raise ShapeError(f"the control image has {tuple(image.shape[-2:])} pixels, and the run makes {sides}")
    if len(sample) % len(image):
        raise ShapeError(f"{len(image)} control images for {len(sample)} rows: give one, or one for each sample")


def _tiled(tensor: Tensor, rows: int) -> Tensor:
    """A row for each of the batch's, in which the halves of guidance follow each other."""
    return tensor.repeat(rows // len(tensor), 1, 1, 1)
