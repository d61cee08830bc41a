"""The readout head: feature maps of one call of a diffusion model in, a map of a property out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, ShapeError
from interp.hyperfeatures.bottleneck import Bottleneck, drawn_layer
from interp.hyperfeatures.network import check_network, shape_of, without_wrapper
from interp.readouts.times import TimeConvention, check_convention

PICTURE_CHANNELS = (1, 3)

_WRAPPED = re.compile(r"^bottleneck_layers\.\d+\.0\.")


class ReadoutHead(nn.Module):
    """Mixes the maps of several layers at one timestep, and reads a property from the mixture.

    One bottleneck per layer brings every map to ``dim`` channels; the timestep's embedding is added inside it. The
    mixture is their weighted sum, with one softmax over the layers. An output head of three convolutions brings it to
    the channels of the property; without one, the mixture itself is read (correspondence, appearance).

    The state dict has the authors' layout. Keys with the sequential wrapper of their code, ``bottleneck_layers.0.0.``,
    are loaded too, but only into a head that does not use the embedding: under the wrapper it never had an effect.

    Args:
        channels: channels of each layer's map, in the order of the layers.
        dim: channels of the mixture.
        width: channels inside the bottlenecks; a quarter of ``dim`` when not given.
        out_channels: channels of the property; None: no output head.
        time_dim: width of the model's time embedding, 1280 for Stable Diffusion; None: none is taken.
        output_widths: channels after the output head's first two convolutions.
        squash: whether a tanh comes last; None: for pictures (1 or 3 channels), not for anything else.
        n_groups: groups of the normalisations; divides ``dim`` and ``width``.
        use_time: False: hold the embedding's weights, as the authors' files do, but do not use them.
        time_convention: which timestep's embedding the head is given, see `interp.readouts.times`.
        sites: names of the layers, for messages and checkpoints.
        seed: of the initial weights.

    Raises:
        InputError: a number that is not positive, groups that do not divide, an unknown convention, names that are too
            few or many, or ``squash`` without an output head.

    Source: Readout Guidance, section 3.1 and official code.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 384,
        width: int | None = None,
        *,
        out_channels: int | None = None,
        time_dim: int | None = None,
        output_widths: Sequence[int] = (128, 32),
        squash: bool | None = None,
        n_groups: int = 32,
        use_time: bool = True,
        time_convention: TimeConvention = "true_t",
        sites: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_whole({"dim": dim, "width": width, "n_groups": n_groups, "out_channels": out_channels, "seed": seed})
        _check_whole({"time_dim": time_dim} | {f"channels[{n}]": number for n, number in enumerate(channels)})
        width = dim // 4 if width is None else width
        check_network(channels, 1, dim, width, n_groups, sites, None)
        check_convention(time_convention)
        _check(out_channels, time_dim, output_widths, squash)
        self.channels = tuple(channels)
        self.dim = dim
        self.width = width
        self.out_channels = out_channels
        self.time_dim = time_dim
        self.output_widths = tuple(output_widths)
        self.squash = out_channels in PICTURE_CHANNELS if squash is None else squash
        self.n_groups = n_groups
        self.uses_time = use_time and time_dim is not None
        self.time_convention = time_convention
        self.sites = None if sites is None else tuple(sites)
        generator = torch.Generator("cpu").manual_seed(seed)
        self.mixing_weights = nn.Parameter(torch.ones(len(self.channels)))
        self.bottleneck_layers = nn.ModuleList(
            Bottleneck(c, dim, width, n_groups, generator, time_dim) for c in self.channels
        )
        self.output_head = None if out_channels is None else _output_head(dim, output_widths, out_channels, generator)
        self.register_load_state_dict_pre_hook(_accept_wrapped_keys)

    @property
    def n_layers(self) -> int:
        """How many layers are mixed."""
        return len(self.channels)

    @property
    def n_out(self) -> int:
        """Channels of what comes out."""
        return self.dim if self.out_channels is None else self.out_channels

    def mixing(self) -> Float[Tensor, " layer"]:
        """The share of each layer in the mixture; they add up to 1.

        Source: Readout Guidance, official code: over layers only, there is one timestep.
        """
        return self.mixing_weights.softmax(dim=0)

    def settings(self) -> dict[str, Any]:
        """The arguments that make a head of the same kind, in what JSON can say; without the seed."""
        names = ("channels", "output_widths", "dim", "width", "out_channels", "time_dim", "squash", "n_groups")
        found = {name: getattr(self, name) for name in names}
        found |= {"use_time": self.uses_time, "time_convention": self.time_convention}
        # A head without an output head has nothing to squash, whatever is asked.
        found["squash"] = self.squash if self.out_channels is not None else None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def forward(
        self,
        maps: Sequence[Tensor] | Float[Tensor, "batch channels height width"],
        time_embedding: Float[Tensor, "rows time_dim"] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch out new_height new_width"]:
        """Read the property.

        Args:
            maps: of each layer ``[batch, channel, height, width]``; or the same maps one after another on the channel
                axis. Any float dtype.
            time_embedding: the model's embedding of the timestep of each map; of more rows than there are maps, the
                first are taken. One row serves all maps. Not used by heads without an embedding.
            size: (height, width) that every map is resized to, bilinearly; None: they are all of one size.

        Returns:
            The property's map, in the dtype of the weights (under autocast, of autocast).

        Raises:
            ShapeError: another number of layers, channels or rows than expected, or maps of several sizes.
            InputError: a head that uses the embedding was given none.

        Source: Readout Guidance, section 3.1 and official code.
        """
        listed = self._listed(maps, size)
        embedding = self._embedding(time_embedding, listed[0])
        shares = self.mixing()
        total: Tensor | None = None
        for layer, (found, bottleneck) in enumerate(zip(listed, self.bottleneck_layers, strict=True)):
            found = found.to(self.mixing_weights.dtype)
            # Maps made in inference mode cannot be saved for a backward pass; a copy can.
            if found.is_inference() and torch.is_grad_enabled():
                found = found.clone()
            part = shares[layer] * bottleneck(found, embedding, size)
            total = part if total is None else total + part
        assert total is not None
        if self.output_head is None:
            return total
        read = self.output_head(total)
        return torch.tanh(read) if self.squash else read

    def layer_name(self, layer: int) -> str:
        """What a layer is called in messages: its site, or its number."""
        return f"layer {layer}" if self.sites is None else f"layer {layer} ({self.sites[layer]})"

    def _listed(self, maps: Sequence[Tensor] | Tensor, size: tuple[int, int] | None) -> list[Tensor]:
        if isinstance(maps, Tensor):
            if maps.ndim != 4 or maps.shape[1] != sum(self.channels):
                raise ShapeError(
                    f"this head takes maps of {' + '.join(map(str, self.channels))} channels, [batch, "
                    f"{sum(self.channels)}, height, width], not {list(maps.shape)}"
                )
            return list(maps.split(self.channels, dim=1))
        listed = list(maps)
        if len(listed) != self.n_layers:
            raise ShapeError(f"this head takes maps of {self.n_layers} layers, not {len(listed)}")
        for layer, found in enumerate(listed):
            sides = listed[0].shape[2:] if size is None else found.shape[2:]
            expected = (listed[0].shape[0], self.channels[layer], *sides)
            if found.ndim != 4 or tuple(found.shape) != expected:
                raise ShapeError(
                    f"the map of {self.layer_name(layer)} is {list(found.shape)}; expected {list(expected)}, "
                    f"[batch, channel, height, width]{'' if size else ', all of one size'}"
                )
        return listed

    def _embedding(self, given: Tensor | None, maps: Tensor) -> Tensor | None:
        if not self.uses_time:
            return None
        if given is None:
            raise InputError("this head uses the timestep's embedding: give it, see interp.readouts.time_embedding")
        if given.ndim != 2 or given.shape[1] != self.time_dim or not (len(given) == 1 or len(given) >= len(maps)):
            raise ShapeError(
                f"a time embedding of shape {list(given.shape)}: this head takes [{len(maps)}, {self.time_dim}]"
            )
        embedding = given[: len(maps)].to(maps.device, self.mixing_weights.dtype).expand(len(maps), -1)
        return embedding.clone() if embedding.is_inference() and torch.is_grad_enabled() else embedding


def head_of(
    state: Mapping[str, Tensor],
    *,
    n_groups: int = 32,
    use_time: bool | None = None,
    squash: bool | None = None,
    time_convention: TimeConvention = "true_t",
    sites: Sequence[str] | None = None,
) -> ReadoutHead:
    """The head that a state dict in the authors' layout belongs to, with its weights.

    Args:
        state: in either style of keys.
        n_groups: of the normalisations, which leave no trace in a state dict.
        use_time: whether the embedding acts; None: unless the keys have the sequential wrapper, or lack its weights.
        squash, time_convention, sites: as for `ReadoutHead`.

    Raises:
        InputError: a weight is missing, left over or of another shape, the state mixes several timesteps, or
            ``use_time`` asks for an embedding that the weights cannot use.
    """
    shape = shape_of(state)
    if shape.pop("n_steps") != 1:
        raise InputError(
            f"{state['mixing_weights'].numel()} mixing weights for {len(shape['channels'])} layers: a readout head "
            "mixes one timestep; this is an aggregation network, see interp.hyperfeatures"
        )
    bare = without_wrapper(state)
    first = bare.get("bottleneck_layers.0.emb_layers.weight")
    possible = first is not None and not is_wrapped(state)
    if use_time and not possible:
        why = "the weights of the embedding are missing" if first is None else "the keys have the sequential wrapper"
        raise InputError(f"this head cannot use the timestep's embedding: {why}")
    widths, out_channels = _output_shape(bare)
    head = ReadoutHead(
        **shape,
        out_channels=out_channels,
        time_dim=None if first is None else first.shape[1],
        output_widths=widths,
        squash=squash,
        n_groups=n_groups,
        use_time=possible if use_time is None else use_time,
        time_convention=time_convention,
        sites=sites,
    )
    load_head_weights(head, state)
    return head


def is_wrapped(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys of a state dict have the sequential wrapper, under which the embedding never acted."""
    return any(_WRAPPED.match(key) for key in state)


def load_head_weights(head: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly; of a `ReadoutHead`, in either style of keys.

    Raises:
        InputError: naming what is missing, left over, or of another shape.
    """
    try:
        head.load_state_dict(dict(state))
    except RuntimeError as error:
        raise InputError(f"the weights do not fit the head: {' '.join(str(error).split())}") from error


def _output_head(dim: int, widths: Sequence[int], out_channels: int, generator: torch.Generator) -> nn.Sequential:
    return nn.Sequential(
        drawn_layer(nn.Conv2d, dim, widths[0], 3, padding=1, generator=generator),
        nn.SiLU(),
        drawn_layer(nn.Conv2d, widths[0], widths[1], 3, padding=1, generator=generator),
        nn.SiLU(),
        drawn_layer(nn.Conv2d, widths[1], out_channels, 1, generator=generator),
    )


def _output_shape(state: Mapping[str, Tensor]) -> tuple[tuple[int, int], int | None]:
    """Widths and channels of the output head in a state dict."""
    keys = [f"output_head.{place}.weight" for place in (0, 2, 4)]
    if not any(key.startswith("output_head.") for key in state):
        return (128, 32), None
    for key in keys:
        if key not in state:
            raise InputError(f"the output head is incomplete: {key!r} is missing")
    first, second, last = (int(state[key].shape[0]) for key in keys)
    return (first, second), last


def _accept_wrapped_keys(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, ReadoutHead)
    for key in [key for key in state if key.startswith(prefix) and _WRAPPED.match(key.removeprefix(prefix))]:
        if module.uses_time:
            raise InputError(
                f"{key!r} has the sequential wrapper, under which the timestep's embedding never acted: make the head "
                "with use_time=False"
            )
        bare = _bare(key, prefix)
        if bare in state:
            raise InputError(f"the state dict holds one weight twice, as {key!r} and as {bare!r}")
        state[bare] = state.pop(key)


def _bare(key: str, prefix: str) -> str:
    return prefix + next(iter(without_wrapper({key.removeprefix(prefix): torch.empty(0)})))


def _check_whole(numbers: Mapping[str, Any]) -> None:
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise InputError(f"{name}={number!r}: give a whole number")


def _check(out_channels: int | None, time_dim: int | None, output_widths: Sequence[int], squash: bool | None) -> None:
    if len(output_widths) != 2:
        raise InputError(f"output_widths must be two numbers, not {list(output_widths)}")
    numbers = {"out_channels": out_channels, "time_dim": time_dim}
    numbers |= {f"output_widths[{index}]": number for index, number in enumerate(output_widths)}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    if squash and out_channels is None:
        raise InputError("squash is for heads with out_channels; this one gives the mixture itself")
