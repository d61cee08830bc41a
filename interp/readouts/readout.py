"""A readout: a head with everything that is needed to use it on a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interp.activations import Activations
from interp.errors import InputError, ShapeError, UnknownNameError, nearest
from interp.hyperfeatures.bottleneck import resized
from interp.hyperfeatures.features import as_maps
from interp.models.diffusion import Diffusion
from interp.readouts.head import ReadoutHead
from interp.readouts.times import (
    TimeConvention,
    check_convention,
    embedded_timestep,
    time_dim,
    time_embedding,
    trained_timesteps,
)

Timestep = float | int | Tensor
KINDS = ("spatial", "keypoints", "features")

_ALIKE = 0.9  # cosine of two models' fingerprints; fine-tuned copies are above 0.99, other models near 0
_FINGERPRINT = 64


@dataclass(frozen=True, eq=False)
class Readout:
    """A head, and which model, sites and timesteps it is for. This is what guidance takes and checkpoints hold.

    Attributes:
        head: a `ReadoutHead`, or another module that takes a list of maps and a time embedding.
        sites: which activations it reads, in the order of its layers.
        size: (height, width) that the maps are resized to, the latents' own grid.
        kind: ``"spatial"``: a picture of a property; ``"keypoints"``: a heat map for each point; ``"features"``:
            descriptors to compare.
        name: of the property: pose, depth, edge, correspondence, appearance, identity, ...
        value_range: (least, greatest) value of the targets it was trained on; None where there are none.
        model: name or id of the diffusion model.
        time_convention: which timestep's embedding the head is given, see `interp.readouts.times`.
        fingerprint: of the diffusion model's weights, see `fingerprint`; empty: the model is not compared.

    Raises:
        InputError: values that contradict each other, or the head.
    """

    head: nn.Module
    sites: tuple[str, ...]
    size: tuple[int, int]
    kind: str = "spatial"
    name: str = ""
    value_range: tuple[float, float] | None = None
    model: str = ""
    time_convention: TimeConvention = "true_t"
    fingerprint: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_convention(self.time_convention)
        if self.kind not in KINDS:
            raise InputError(f"no kind {self.kind!r}: there are {', '.join(KINDS)}. {nearest(str(self.kind), KINDS)}")
        if not isinstance(self.head, nn.Module):
            raise InputError(f"a head is a module, such as a ReadoutHead, not {type(self.head).__name__}")
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise InputError(f"sites must be at least one name, each once, not {list(self.sites)}")
        if not _pair(self.size, int) or min(self.size) < 1:
            raise InputError(f"size must be a positive (height, width), not {self.size}")
        span = self.value_range
        if span is not None and not (_pair(span, Real) and -math.inf < span[0] < span[1] < math.inf):
            raise InputError(f"value_range must be (least, greatest), not {self.value_range}")
        if self.kind == "spatial" and self.value_range is None:
            raise InputError("a spatial readout needs the value_range of its targets, such as (-1.0, 1.0)")
        self._check_head()

    def __call__(
        self, activations: "Activations | Mapping[str, Any]", timestep: Timestep, sd: Diffusion
    ) -> Float[Tensor, "batch out height width"]:
        """Read the property from captured activations, with a graph where they have one.

        Args:
            activations: what the model's call at ``timestep`` gave at the sites; other sites are not used.
            timestep: what the model saw: one for all rows, or one for each.
            sd: the model, whose time embedding is used.

        Returns:
            The readout of each row, of this readout's ``size``.

        Raises:
            UnknownNameError: a site is missing.
            ShapeError: activations of another shape than one call's maps.
            InputError: a head with an embedding on a model without one.
        """
        maps = [self._map(activations, site) for site in self.sites]
        embedding = self.embedding(timestep, len(maps[0]), sd)
        read: Tensor
        if isinstance(self.head, ReadoutHead):
            # It resizes where that costs least, and gives the same.
            read = self.head(maps, embedding, self.size)
        else:
            read = self.head([resized(one, self.size) for one in maps], embedding)
        return read

    def embedding(self, timestep: Timestep, rows: int, sd: Diffusion) -> Float[Tensor, "rows time_dim"] | None:
        """The time embedding of each row under this readout's convention; None for heads that take none.

        Args:
            timestep: what the model saw: one for all rows, or one for each.
            rows: how many there are.
            sd: the model.

        Raises:
            ShapeError: another number of timesteps.
            InputError: the model has no time embedding.
        """
        if not getattr(self.head, "uses_time", False):
            return None
        seen = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if len(seen) not in (1, rows):
            raise ShapeError(f"{len(seen)} timesteps for {rows} rows: give one for all, or one for each")
        times = embedded_timestep(seen, self.time_convention, trained_timesteps(sd))
        return time_embedding(sd, times.expand(rows))

    def check(self, sd: Diffusion) -> None:
        """Refuse a model that this head was not made for.

        Raises:
            InputError: naming the first difference: a site's channels, the time embedding, or the weights.
            UnknownNameError, SiteUnavailableError: the model lacks a site.
        """
        expected = getattr(self.head, "channels", None)
        if expected is not None:
            for site, ours, theirs in zip(self.sites, expected, sd.channels(list(self.sites)), strict=True):
                if ours != theirs:
                    raise InputError(
                        f"the {self.title} head takes {ours} channels of {site}, but {sd.name} has {theirs} there: it "
                        f"is for {self.model or 'another model'}"
                    )
        if getattr(self.head, "uses_time", False):
            ours, theirs = getattr(self.head, "time_dim", None), time_dim(sd)
            if ours != theirs:
                raise InputError(f"the {self.title} head takes a time embedding of {ours}, but {sd.name} has {theirs}")
        if self.fingerprint and not _alike(self.fingerprint, fingerprint(sd)):
            raise InputError(
                f"the {self.title} head is for {self.model!r}, but {sd.name!r} is another model, although its sites "
                "have the same channels"
            )

    @torch.no_grad()
    def read(
        self,
        sd: Diffusion,
        latents: Float[Tensor, "batch channel h w"],
        timestep: Timestep,
        prompt: Any = "",
    ) -> Float[Tensor, "batch out height width"]:
        """Read the property of latents with one call of the model, stopped after the last site; without a graph.

        Args:
            sd: the model.
            latents: scaled latents, noised as the timestep says.
            timestep: what the model sees: one for all rows, or one for each.
            prompt: text, texts, or what `Diffusion.prompt` encoded.

        Raises:
            InputError, ShapeError, UnknownNameError: as `check` and `Diffusion.capture`.
        """
        self.check(sd)
        return self(sd.capture(latents, timestep, prompt, list(self.sites), stop=True), timestep, sd)

    @property
    def title(self) -> str:
        """What this readout is called in messages."""
        return self.name or self.kind

    def _map(self, activations: "Activations | Mapping[str, Any]", site: str) -> Tensor:
        if site not in activations:
            raise UnknownNameError(f"the {self.title} head reads {site!r}, which was not captured")
        return as_maps(activations[site], torch.Size((1, 1, *self.size)), site)

    def _check_head(self) -> None:
        own = getattr(self.head, "time_convention", self.time_convention)
        if own != self.time_convention:
            raise InputError(f"the head's time convention is {own!r}, not {self.time_convention!r}")
        channels = getattr(self.head, "channels", self.sites)
        if len(channels) != len(self.sites):
            raise InputError(f"the head mixes {len(channels)} layers, but {len(self.sites)} sites are named")
        sites = getattr(self.head, "sites", None)
        if sites is not None and tuple(sites) != tuple(self.sites):
            raise InputError(f"the head is for sites {list(sites)}, not {list(self.sites)}")


def _pair(given: Any, kind: type) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(one, kind) for one in given)


def fingerprint(sd: Diffusion) -> tuple[float, ...]:
    """A few weights of a model's denoiser, by which models of one architecture are told apart.

    Args:
        sd: the model; its dtype hardly matters.

    Returns:
        Numbers from its first matrix of weights, evenly spread.
    """
    first = next(parameter for parameter in sd.denoiser.parameters() if parameter.ndim >= 2)
    flat = first.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, _FINGERPRINT).round().long()
    return tuple(round(float(number), 6) for number in flat[places.to(flat.device)].float().cpu())


def _alike(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    if len(ours) != len(theirs):
        return False
    return float(F.cosine_similarity(torch.tensor(ours), torch.tensor(theirs), dim=0)) > _ALIKE
