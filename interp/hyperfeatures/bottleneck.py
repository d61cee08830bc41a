"""The residual bottleneck that brings a map of any layer to the channels of a descriptor or readout."""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from interp.correspondence.points import Size


class Convolution(nn.Module):
    """A convolution without bias, "same" padding, and group normalisation of what comes out.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output, divisible by ``n_groups``.
        kernel: side of the kernel, odd.
        n_groups: groups of the normalisation.
        generator: draws the weights, normal with variance ``2 / (kernel² · channels_out)``.

    Source: Diffusion Hyperfeatures, official code (bottleneck blocks; MSRA initialisation by fan-out).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, n_groups: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        shape = (channels_out, channels_in, kernel, kernel)
        deviation = math.sqrt(2 / (kernel * kernel * channels_out))
        # Drawn on the CPU and copied, so that a seed gives the same network on every device.
        drawn = torch.randn(shape, generator=generator, device="cpu") * deviation
        self.weight = nn.Parameter(torch.empty(shape).copy_(drawn))
        self.norm = nn.GroupNorm(n_groups, channels_out)

    def forward(
        self, x: Float[Tensor, "batch channel height width"], size: Size | None = None
    ) -> Float[Tensor, "batch out new_height new_width"]:
        """Convolve, resize and normalise.

        Args:
            x: maps.
            size: (height, width) to come out; None: that of ``x``. Pointwise convolutions only: they commute with a
                bilinear resize, and cost less before it.
        """
        return self.norm(resized(F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2), size))


class Bottleneck(nn.Module):
    """A residual bottleneck: 1×1 to ``width``, 3×3, 1×1 to ``dim``, beside a 1×1 shortcut.

    Args:
        channels: of the input. With ``channels == dim`` the shortcut is the identity.
        dim: channels of the output.
        width: channels between.
        n_groups: groups of every normalisation.
        generator: draws the weights.
        time_dim: width of a time embedding that can be added between the first two convolutions; None: none can.

    Source: Diffusion Hyperfeatures, section 3.2 and official code; Readout Guidance, official code (time embedding).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        width: int,
        n_groups: int,
        generator: torch.Generator,
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, width, 1, n_groups, generator)
        self.conv2 = Convolution(width, width, 3, n_groups, generator)
        self.conv3 = Convolution(width, dim, 1, n_groups, generator)
        self.shortcut = None if channels == dim else Convolution(channels, dim, 1, n_groups, generator)
        self.emb_layers = None if time_dim is None else drawn_layer(nn.Linear, time_dim, width, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "batch channel height width"],
        embedding: Float[Tensor, "batch time_dim"] | None = None,
        size: Size | None = None,
    ) -> Float[Tensor, "batch dim new_height new_width"]:
        """Non-negative maps: the last rectifier comes after the residual sum.

        Args:
            x: maps.
            embedding: of each map's timestep, for bottlenecks with a ``time_dim``; None: none is added.
            size: (height, width) to resize to first, bilinearly; None: not at all.
        """
        h = F.relu(self.conv1(x, size))
        if embedding is not None and self.emb_layers is not None:
            h = h + rearrange(F.relu(self.emb_layers(embedding)), "batch width -> batch width 1 1")
        h = F.relu(self.conv2(h))
        h = self.conv3(h)
        return F.relu(h + (resized(x, size) if self.shortcut is None else self.shortcut(x, size)))


def resized(maps: Float[Tensor, "batch channel height width"], size: Size | None) -> Tensor:
    """Maps of another size, bilinearly between corners that are not aligned, as every map of the method is resized.

    Args:
        maps: of one layer.
        size: (height, width); None: as they are.

    Source: Diffusion Hyperfeatures, section 3.2 and official code.
    """
    if size is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def drawn_layer(kind: type[Layer], *shape: int, generator: torch.Generator, **options: Any) -> Layer:
    """A layer with torch's default initialisation, drawn from a generator and not from the global state.

    Args:
        kind: ``nn.Linear`` or ``nn.Conv2d``.
        shape: its positional arguments.
        generator: draws weights and biases.
        options: its other arguments.
    """
    layer: Layer = nn.utils.skip_init(kind, *shape, device="cpu", **options)
    with torch.no_grad():
        bound = 1 / math.sqrt(layer.weight[0].numel())
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
