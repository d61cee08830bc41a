"""What all terms of a guide have in common, and terms made of any function of captured activations."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, ShapeError
from interp.sites import expand

Rescale = Literal["latent_range"]
Weight = float | Sequence[float]
TOTAL = "total"
"""What tables call all terms together."""
# What a term sees of one half of guidance: a map, or activations by site; rows are samples.
Reading = Tensor | dict[str, Tensor]


class Term(ABC):
    """One thing that a guide asks for: a loss of each sample, to be made small.

    A term is a frozen dataclass with these fields, and three methods: which sites it needs, what it reads from them,
    and its loss.

    Attributes:
        weight: of the loss in the guide's sum; one for the run, or one for each of its steps.
        rescale: ``"latent_range"``: the loss is multiplied by the squared range (greatest minus least) of the sample's
            current latents over `span`, as if what is compared had been mapped to that range; None: it is not.
        name: in tables and messages.
        compares: whether the loss needs the same reading of a reference.
    """

    weight: Weight
    rescale: Rescale | None
    name: str
    compares: bool

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """Which activations it reads."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Names what it reads: terms with one key share a reading."""

    @property
    def source(self) -> Any:
        """What it reads with: the readout, or the function."""
        return self

    @property
    def span(self) -> float:
        """The range of the values that it compares, for ``rescale``."""
        return 1.0

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that it computes with, whose weights get no gradient."""
        return ()

    @abstractmethod
    def read(self, maps: Mapping[str, Tensor], timestep: float, sd: Any) -> Reading:
        """Read activations, with a graph where they have one.

        Args:
            maps: activations at the sites, of some rows.
            timestep: what the model saw.
            sd: the model.
        """

    @abstractmethod
    def loss(self, reading: Reading, timestep: float, reference: Reading | None) -> Float[Tensor, " sample"]:
        """The loss of each sample.

        Args:
            reading: of one half of guidance.
            timestep: what the model saw.
            reference: the same reading of the reference, without a graph; one row may serve all samples. None for
                terms that do not compare.
        """

    def check(self, sd: Any, rows: int | None, cells: tuple[int, int], steps: int) -> None:
        """Refuse a run that the term cannot guide.

        Args:
            sd: the model.
            rows: how many samples there are; None: as many as the term is for.
            cells: height and width of the latents.
            steps: of the run.

        Raises:
            InputError, ShapeError, UnknownNameError, SiteUnavailableError: such a run.
        """
        for place in sd.expanded(self.sites):
            if place.part != "denoiser":
                raise InputError(f"term {self.name!r} reads {place.site}, which is not a site of the denoiser")
        given = values_of(self.weight)
        if not is_number(self.weight) and len(given) != steps:
            raise InputError(
                f"term {self.name!r} has {len(given)} weights for a run of {steps} steps: give one for the run, or one "
                "for each of its steps"
            )

    @staticmethod
    def from_function(
        sites: str | Sequence[str],
        function: Callable[..., Float[Tensor, " sample"]],
        *,
        weight: Weight = 1.0,
        rescale: Rescale | None = None,
        name: str = "",
        compares: bool = False,
    ) -> "FunctionTerm":
        """A term of any function of captured activations: a new kind of guidance.

        Args:
            sites: names or patterns of sites of the denoiser.
            function: takes the activations by site (of one half of guidance) and the timestep that the model saw, and
                gives one loss for each sample. It has to be differentiable.
            weight, rescale: see `Term`.
            name: in tables; by default the function's.
            compares: the function takes a third argument, the reference's activations by site.

        Raises:
            InputError: no sites, no function, or a bad weight.
        """
        if not callable(function):
            raise InputError(f"a term takes a function of activations and timestep, not {type(function).__name__}")
        listed = tuple(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else (sites,)
        title = name or getattr(function, "__name__", "function")
        return FunctionTerm(listed, function, weight, rescale, title, compares)


@dataclass(frozen=True, eq=False)
class FunctionTerm(Term):
    """What `Term.from_function` makes, and with it what its arguments mean."""

    named: tuple[str, ...]
    function: Callable[..., Tensor]
    weight: Weight = 1.0
    rescale: Rescale | None = None
    name: str = "function"
    compares: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_settings(self)
        if not self.named or not all(isinstance(site, str) and site for site in self.named):
            raise InputError(f"term {self.name!r}: name at least one site, not {self.named!r}")

    @property
    def sites(self) -> tuple[str, ...]:
        """See `Term`."""
        return self.named

    @property
    def key(self) -> str:
        """See `Term`."""
        return f"function {self.name}"

    def read(self, maps: Mapping[str, Tensor], timestep: float, sd: Any) -> Reading:
        """See `Term`."""
        return {site: maps[site] for site in expand(self.named, maps)}

    def loss(self, reading: Reading, timestep: float, reference: Reading | None) -> Float[Tensor, " sample"]:
        """See `Term`."""
        assert isinstance(reading, dict)
        rows = len(next(iter(reading.values())))
        given = (reading, timestep, reference) if self.compares else (reading, timestep)
        loss = self.function(*given)
        if not isinstance(loss, Tensor) or loss.shape != (rows,):
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ShapeError(f"term {self.name!r} gave {shape}: give one loss for each of the {rows} samples")
        return loss


def check_settings(term: Term) -> None:
    """Refuse a weight or a rescaling that means nothing.

    Raises:
        InputError: naming it.
    """
    if not any(values_of(term.weight, f"term {term.name!r}: weight")):
        raise InputError(f"term {term.name!r} has weight 0, so that it asks for nothing: leave it out")
    if term.rescale not in (None, "latent_range"):
        raise InputError(f"term {term.name!r}: rescale={term.rescale!r}: give 'latent_range' or None")


def is_number(value: Any) -> bool:
    """Whether a weight or step size is one for the whole run."""
    return isinstance(value, Real) and not isinstance(value, bool)


def values_of(value: Any, what: str = "a weight") -> list[float]:
    """A weight or step size as a list: one number, or one for each step.

    Raises:
        InputError: none, or something that is no finite number.
    """
    listed = [value] if is_number(value) or not isinstance(value, Iterable) else list(value)
    if not listed or not all(is_number(one) and math.isfinite(one) for one in listed):
        raise InputError(f"{what}={value!r}: give a finite number, or one for each step")
    return [float(one) for one in listed]


def at_step(value: Weight, step: int) -> float:
    """A weight or step size at one step of a run."""
    return values_of(value)[0 if is_number(value) else step]


def rows_of(reading: Reading, start: int, stop: int) -> Reading:
    """Some rows of a reading."""
    if isinstance(reading, dict):
        return {site: tensor[start:stop] for site, tensor in reading.items()}
    return reading[start:stop]


def precise(tensor: Tensor) -> Tensor:
    """A tensor in single precision or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def usable(tensor: Tensor) -> Tensor:
    """A tensor that gradients may be taken with, also when it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def check_finite(tensor: Any, what: str) -> None:
    """Refuse integers, and numbers that are NaN or infinite.

    Raises:
        InputError: naming how many there are.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputError(f"{what} has to be a tensor of floats, not {kind}")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(f"{what} has {bad} of {tensor.numel()} values that are NaN or infinite")
