"""Descriptors without training, from the same stacks that the aggregation network takes."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError


def concatenate(
    features: Float[Tensor, "batch step channels height width"],
    steps: Sequence[int] | None = None,
    *,
    channels: Sequence[int] | None = None,
) -> Float[Tensor, "batch joined height width"]:
    """All maps one after another as one descriptor.

    Args:
        features: a stack.
        steps: which steps; all, when not given.
        channels: channels of each layer; when given, each map is normalised to unit length per pixel before it is
            joined, so that no layer outweighs the others. By default the maps are joined as they are.

    Returns:
        Descriptor maps, step by step and layer by layer on the channel axis.

    Raises:
        InputError: a step out of range, or no step.
        ShapeError: channels that are not those of the stack.

    Source: Diffusion Hyperfeatures, section 4.1 (the baseline that concatenates all layers).
    """
    chosen = list(range(features.shape[1])) if steps is None else list(steps)
    if not chosen:
        raise InputError("no steps to concatenate")
    for step in chosen:
        _check_step(features, step)
    picked = features[:, chosen]
    if channels is not None:
        _check_channels(features, channels)
        parts = [F.normalize(part, dim=2) for part in picked.split(list(channels), dim=2)]
        return rearrange(torch.cat(parts, dim=2), "batch step channel h w -> batch (step channel) h w")
    return rearrange(picked, "batch step channel h w -> batch (step channel) h w")


def single(
    features: Float[Tensor, "batch step channels height width"], channels: Sequence[int], layer: int, step: int
) -> Float[Tensor, "batch channel height width"]:
    """The map of one layer at one step as the descriptor.

    Args:
        features: a stack.
        channels: channels of each layer, in the order of the stack.
        layer: which layer.
        step: which step, clean first.

    Returns:
        A view of the stack.

    Raises:
        InputError: a layer or step out of range.
        ShapeError: channels that are not those of the stack.

    Source: Diffusion Hyperfeatures, section 4.1 (the baseline of one layer and timestep).
    """
    _check_channels(features, channels)
    _check_step(features, step)
    if not 0 <= layer < len(channels):
        raise InputError(f"layer {layer} is out of range: the stack has {len(channels)} layers, from 0 on")
    first = sum(channels[:layer])
    return features[:, step, first : first + channels[layer]]


def singles(
    features: Float[Tensor, "batch step channels height width"], channels: Sequence[int]
) -> Iterator[tuple[int, int, Float[Tensor, "batch channel height width"]]]:
    """Every single layer and step of one stack.

    Args:
        features: a stack.
        channels: channels of each layer, in the order of the stack.

    Yields:
        Step, layer, and the map, step by step.

    Raises:
        ShapeError: channels that are not those of the stack.
    """
    _check_channels(features, channels)
    for step in range(features.shape[1]):
        for layer in range(len(channels)):
            yield step, layer, single(features, channels, layer, step)


def _check_step(features: Tensor, step: int) -> None:
    if not 0 <= step < features.shape[1]:
        raise InputError(f"step {step} is out of range: the stack has {features.shape[1]} steps, from 0 on")


def _check_channels(features: Tensor, channels: Sequence[int]) -> None:
    if sum(channels) != features.shape[2]:
        raise ShapeError(f"layers of {list(channels)} channels make {sum(channels)}, the stack has {features.shape[2]}")
