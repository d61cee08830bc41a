"""The aggregation network: feature maps of many layers and timesteps in, one descriptor per pixel out."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from interp.correspondence.points import Size
from interp.errors import InputError, ShapeError
from interp.hyperfeatures.bottleneck import Bottleneck

LOGIT_SCALE = math.log(1 / 0.07)
"""Logarithm of the factor 14.286 by which the training loss scales cosine similarities; never trained."""

_WRAPPED = re.compile(r"^(bottleneck_layers\.\d+)\.0\.(.+)$")
_BARE = re.compile(r"^(bottleneck_layers\.\d+)\.(?!0\.)(.+)$")


class AggregationNetwork(nn.Module):
    """Mixes the feature maps of all layers and timesteps into one descriptor map.

    One bottleneck per layer, shared by all timesteps, brings every map to ``dim`` channels. The descriptor is
    their weighted sum, with one softmax over all (timestep, layer) pairs. It is non-negative. The network
    computes in the dtype of its weights, whatever the dtype of the maps and with autocast switched off.

    The state dict has the authors' layout; both styles of keys are loaded, ``bottleneck_layers.0.0.conv1...`` and
    ``bottleneck_layers.0.conv1...``.

    Args:
        channels: channels of each layer's map, in the order of the layers.
        n_steps: how many timesteps are mixed, clean first.
        dim: channels of the descriptor.
        width: channels inside the bottlenecks; a quarter of ``dim`` when not given.
        n_groups: groups of the normalisations; divides ``dim`` and ``width``.
        sites: names of the layers, for tables and checkpoints.
        timesteps: the model's timestep of each step, for tables and checkpoints.
        seed: of the initial weights.

    Raises:
        InputError: a number that is not positive, groups that do not divide, names that are too few or many.

    Source: Diffusion Hyperfeatures, section 3.2.
    """

    def __init__(
        self,
        channels: Sequence[int],
        n_steps: int,
        dim: int = 384,
        width: int | None = None,
        *,
        n_groups: int = 32,
        sites: Sequence[str] | None = None,
        timesteps: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = dim // 4 if width is None else width
        check_network(channels, n_steps, dim, width, n_groups, sites, timesteps)
        self.channels = tuple(channels)
        self.n_steps = n_steps
        self.dim = dim
        self.width = width
        self.n_groups = n_groups
        self.sites = None if sites is None else tuple(sites)
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.logit_scale = LOGIT_SCALE
        generator = torch.Generator("cpu").manual_seed(seed)
        self.mixing_weights = nn.Parameter(torch.ones(n_steps * len(self.channels)))
        # The sequential wrapper is the ".0." of the authors' keys.
        self.bottleneck_layers = nn.ModuleList(
            nn.Sequential(Bottleneck(c, dim, width, n_groups, generator)) for c in self.channels
        )
        self.register_load_state_dict_pre_hook(_accept_bare_keys)

    @property
    def n_layers(self) -> int:
        """How many layers are mixed."""
        return len(self.channels)

    def mixing(self) -> Float[Tensor, "step layer"]:
        """The share of each (timestep, layer) in the sum; all shares add up to 1.

        Source: Diffusion Hyperfeatures, section 3.2; timestep-major order as in the official code.
        """
        return rearrange(self.mixing_weights.softmax(dim=0), "(step layer) -> step layer", step=self.n_steps)

    def mixing_table(self) -> pd.DataFrame:
        """The mixing shares as a table: a row for each timestep, a column for each layer.

        Returns:
            Rows named by the model's timesteps (by step, when they are not known), columns by sites (by layer).
        """
        rows = pd.Index(range(self.n_steps), name="step")
        if self.timesteps is not None:
            rows = pd.Index(self.timesteps, name="timestep")
        columns = pd.Index(self.sites or range(self.n_layers), name="layer")
        return pd.DataFrame(self.mixing().detach().float().cpu().numpy(), index=rows, columns=columns)

    def bottleneck(
        self, layer: int, maps: Float[Tensor, "batch channel height width"], size: Size | None = None
    ) -> Float[Tensor, "batch dim new_height new_width"]:
        """Bring maps of one layer to the descriptor's channels.

        Args:
            layer: index of the layer.
            maps: of any timesteps, in any float dtype.
            size: (height, width) to resize to first; None: not at all.

        Returns:
            Non-negative maps in the dtype of the weights.

        Raises:
            InputError: there is no such layer.
            ShapeError: the maps do not have the channels of this layer.
        """
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer} is out of range: this network has {self.n_layers} layers, from 0 on")
        if maps.shape[1] != self.channels[layer]:
            raise ShapeError(
                f"{self.layer_name(layer)} has {self.channels[layer]} channels in this network, but its map has "
                f"{maps.shape[1]} (shape {tuple(maps.shape)})"
            )
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.to(self.mixing_weights.dtype)
            # Maps made in inference mode cannot be saved for a backward pass; a copy can.
            if maps.is_inference() and torch.is_grad_enabled():
                maps = maps.clone()
            return self._bottleneck(layer)(maps, size=size)

    def forward(
        self,
        features: Float[Tensor, "batch step channels height width"] | Sequence[Float[Tensor, "batch step _ _ _"]],
        size: Size | None = None,
    ) -> Float[Tensor, "batch dim new_height new_width"]:
        """Aggregate the maps of all layers and steps.

        Args:
            features: for every step, clean first, the maps of all layers one after another on the channel axis, all of
                one size; or a list of the layers' maps, ``[batch, step, channel, height, width]``, in sizes of their
                own.
            size: (height, width) to which all maps are resized first, bilinearly; None: not at all.

        Returns:
            The descriptor map, in the dtype of the weights.

        Raises:
            ShapeError: another number of axes, layers, steps or channels than this network has, or maps of several
                sizes with no ``size`` to bring them to.
        """
        parts = self._parts(features, size)
        shares = self.mixing()
        total: Tensor | None = None
        for layer, maps in enumerate(parts):
            # Steps ride in the batch: normalisation is per sample, so that this is exact.
            brought = self.bottleneck(layer, rearrange(maps, "b s c h w -> (b s) c h w"), size)
            brought = rearrange(brought, "(b s) d h w -> b s d h w", s=self.n_steps)
            with torch.autocast(maps.device.type, enabled=False):
                part = einsum(brought, shares[:, layer], "b s d h w, s -> b d h w")
            total = part if total is None else total + part
        assert total is not None
        return total

    def _bottleneck(self, layer: int) -> Bottleneck:
        wrapper = self.bottleneck_layers[layer]
        assert isinstance(wrapper, nn.Sequential)
        bottleneck = wrapper[0]
        assert isinstance(bottleneck, Bottleneck)
        return bottleneck

    def _parts(self, features: Tensor | Sequence[Tensor], size: Size | None) -> Sequence[Tensor]:
        if isinstance(features, Tensor):
            expected = (self.n_steps, sum(self.channels))
            if features.ndim != 5 or tuple(features.shape[1:3]) != expected:
                raise ShapeError(
                    f"this network takes features of shape [batch, {expected[0]} steps, {expected[1]} channels, "
                    f"height, width] (layers of {', '.join(map(str, self.channels))} channels), not "
                    f"{list(features.shape)}"
                )
            return features.split(self.channels, dim=2)
        if len(features) != self.n_layers:
            raise ShapeError(f"this network takes maps of {self.n_layers} layers, not {len(features)}")
        for layer, maps in enumerate(features):
            if maps.ndim != 5 or maps.shape[1] != self.n_steps:
                raise ShapeError(
                    f"{self.layer_name(layer)}: expected maps of shape [batch, {self.n_steps} steps, "
                    f"{self.channels[layer]} channels, height, width], not {list(maps.shape)}"
                )
        if len({maps.shape[0] for maps in features}) > 1:
            raise ShapeError(f"the layers' maps are of batches of {[maps.shape[0] for maps in features]}")
        sizes = [tuple(maps.shape[-2:]) for maps in features]
        if size is None and len(set(sizes)) > 1:
            raise ShapeError(f"the layers' maps are of several sizes, {sizes}: give the size to bring them to")
        return features

    def layer_name(self, layer: int) -> str:
        """What a layer is called in messages: its site, or its number."""
        return f"layer {layer}" if self.sites is None else f"layer {layer} ({self.sites[layer]})"


class Accumulator:
    """The aggregation as a running sum: one map at a time goes in, and none is kept.

    Adding all (step, layer) maps of a run, in any order, gives what the network gives for their stack, up to the
    rounding of float32 sums.

    Args:
        net: the network; its mixing shares are read once, here.
        size: (height, width) to which every map is resized first, bilinearly; None: not at all.

    Source: Diffusion Hyperfeatures, section 3.2; the sum of eq. 2 taken term by term.
    """

    def __init__(self, net: AggregationNetwork, size: Size | None = None) -> None:
        self.net = net
        self.size = size
        self._shares = net.mixing()
        self._missing = {(step, layer) for step in range(net.n_steps) for layer in range(net.n_layers)}
        self._sum: Tensor | None = None

    def add(self, step: int, layer: int, maps: Float[Tensor, "batch channel height width"]) -> None:
        """Add the map of one step and layer.

        Args:
            step: which step of the network, clean first.
            layer: which layer of the network.
            maps: the layer's map at that step.

        Raises:
            InputError: the pair was added before, or there is no such step or layer.
            ShapeError: another size or number of channels than expected.
        """
        if (step, layer) not in self._missing:
            known = 0 <= step < self.net.n_steps and 0 <= layer < self.net.n_layers
            raise InputError(
                f"step {step} of {self.net.layer_name(layer)} was added before"
                if known
                else f"step {step} of layer {layer} is out of range: {self.net.n_steps} steps and {self.net.n_layers} "
                "layers, both from 0 on"
            )
        if self.size is None and self._sum is not None and maps.shape[-2:] != self._sum.shape[-2:]:
            raise ShapeError(
                f"the map of step {step}, {self.net.layer_name(layer)} is {tuple(maps.shape[-2:])}, the ones before it "
                f"were {tuple(self._sum.shape[-2:])}: give the size to bring them to"
            )
        part = self._shares[step, layer] * self.net.bottleneck(layer, maps, self.size)
        self._sum = part if self._sum is None else self._sum + part
        self._missing.discard((step, layer))

    def result(self) -> Float[Tensor, "batch dim height width"]:
        """The descriptor map.

        Raises:
            InputError: maps are still missing; the message names the first.
        """
        if self._missing or self._sum is None:
            step, layer = min(self._missing)
            raise InputError(
                f"{len(self._missing)} of {self.net.n_steps * self.net.n_layers} maps are missing, the first is step "
                f"{step} of {self.net.layer_name(layer)}"
            )
        return self._sum


def without_wrapper(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under keys without ``.0.`` after the layer's number.

    Args:
        state: a state dict of an `AggregationNetwork`, in either style.

    Returns:
        A new dict of the same tensors.
    """
    return {_WRAPPED.sub(r"\1.\2", key): tensor for key, tensor in state.items()}


def shape_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read from a state dict which network it belongs to.

    Args:
        state: in either style of keys.

    Returns:
        ``channels``, ``n_steps``, ``dim`` and ``width``: arguments of `AggregationNetwork`. The number of groups
        leaves no trace in a state dict.

    Raises:
        InputError: the weights that tell are missing, or there are not as many mixing weights as whole timesteps.
    """
    bare = without_wrapper(state)
    first, last = "bottleneck_layers.{}.conv1.weight", "bottleneck_layers.0.conv3.weight"
    channels: list[int] = []
    while (key := first.format(len(channels))) in bare:
        channels.append(bare[key].shape[1])
    for key in (first.format(0), last, "mixing_weights"):
        if key not in bare:
            raise InputError(f"these are no weights of an aggregation network: {key!r} is missing")
    n_mixing = bare["mixing_weights"].numel()
    if n_mixing % len(channels):
        raise InputError(f"{n_mixing} mixing weights cannot be shared out to {len(channels)} layers in whole timesteps")
    dim, width = bare[last].shape[:2]
    return {"channels": channels, "n_steps": n_mixing // len(channels), "dim": dim, "width": width}


def _accept_bare_keys(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        wrapped = prefix + _BARE.sub(r"\1.0.\2", key.removeprefix(prefix))
        if wrapped != key:
            if wrapped in state:
                raise InputError(f"the state dict holds one weight twice, as {key!r} and as {wrapped!r}")
            state[wrapped] = state.pop(key)


def check_network(
    channels: Sequence[int],
    n_steps: int,
    dim: int,
    width: int,
    n_groups: int,
    sites: Sequence[str] | None,
    timesteps: Sequence[float] | None,
) -> None:
    """Refuse settings of which no network can be made.

    Raises:
        InputError: naming the first such setting.
    """
    if not channels or min(channels) < 1:
        raise InputError(f"channels must be one positive number for each layer, not {list(channels)}")
    for name, number in (("n_steps", n_steps), ("dim", dim), ("width", width), ("n_groups", n_groups)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    for name, number in (("dim", dim), ("width", width)):
        if number % n_groups:
            fitting = max(n for n in range(1, n_groups) if dim % n == 0 and width % n == 0)
            raise InputError(
                f"{name} {number} is not divisible by n_groups {n_groups}; n_groups={fitting} divides dim and width"
            )
    if sites is not None and len(sites) != len(channels):
        raise InputError(f"{len(sites)} sites are named for {len(channels)} layers")
    if timesteps is not None and len(timesteps) != n_steps:
        raise InputError(f"{len(timesteps)} timesteps are named for {n_steps} steps")
