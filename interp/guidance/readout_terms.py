"""What the terms that read with a trained head have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import InputError, ShapeError
from interp.guidance.terms import Reading, Term, check_settings


class ReadoutTerm(Term):
    """A term over what a readout reads.

    Attributes:
        readout: an `interp.readouts.Readout`.
    """

    readout: Any

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        lacking = [name for name in ("sites", "size", "check") if not hasattr(self.readout, name)]
        if lacking or not callable(self.readout):
            raise InputError(
                f"term {self.name!r} takes an interp.readouts.Readout (a head with its sites and size), not "
                f"{type(self.readout).__name__}"
            )
        check_settings(self)

    @property
    def sites(self) -> tuple[str, ...]:
        """See `Term`."""
        return tuple(self.readout.sites)

    @property
    def key(self) -> str:
        """See `Term`."""
        return f"readout {self.title}"

    @property
    def title(self) -> str:
        """What the readout is called in messages."""
        return self.readout.name or self.readout.kind

    @property
    def source(self) -> Any:
        """See `Term`."""
        return self.readout

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See `Term`."""
        head = getattr(self.readout, "head", None)
        return (head,) if isinstance(head, nn.Module) else ()

    def read(self, maps: Mapping[str, Tensor], timestep: float, sd: Any) -> Reading:
        """See `Term`."""
        return self.readout(maps, timestep, sd)

    def check(self, sd: Any, rows: int | None, cells: tuple[int, int], steps: int) -> None:
        """See `Term`; the readout has to be of this model, and as large as its latents."""
        self.readout.check(sd)
        super().check(sd, rows, cells, steps)
        if tuple(self.readout.size) != cells:
            raise InputError(
                f"the {self.title} readout of term {self.name!r} is for latents of {tuple(self.readout.size)} cells, "
                f"and these have {cells}: generate at its size, or give it another: "
                "dataclasses.replace(readout, size=...)"
            )

    def loss(self, reading: Reading, timestep: float, reference: Reading | None) -> Float[Tensor, " sample"]:
        """See `Term`."""
        assert isinstance(reading, Tensor)
        if reference is None:
            return self.compare(reading, None)
        assert isinstance(reference, Tensor)
        if reference.shape[1:] != reading.shape[1:]:
            raise ShapeError(
                f"term {self.name!r}: the reference's reading is {tuple(reference.shape[1:])} and the sample's "
                f"{tuple(reading.shape[1:])}"
            )
        return self.compare(reading, reference.to(reading).expand_as(reading))

    @abstractmethod
    def compare(
        self, seen: Float[Tensor, "sample out height width"], reference: Float[Tensor, "sample out height width"] | None
    ) -> Float[Tensor, " sample"]:
        """The loss of each sample's reading, beside the reference's where the term compares."""


def per_sample(given: Any, rows: int, what: str) -> list[Any]:
    """One entry for each sample, of a list with one for all or one for each.

    Raises:
        InputError: another number.
    """
    if len(given) not in (1, rows):
        raise InputError(f"{what}: {len(given)} for {rows} samples; give one for all, or one for each")
    return list(given) * rows if len(given) == 1 else list(given)


def check_descriptors(term: ReadoutTerm) -> None:
    """Refuse a readout of a picture or of heat maps where descriptors are compared.

    Raises:
        InputError: naming its kind.
    """
    kind = getattr(term.readout, "kind", "features")
    if kind != "features":
        raise InputError(
            f"term {term.name!r} compares descriptors, and the {term.title} readout is of kind {kind!r}: give one of "
            "kind 'features', such as correspondence or appearance, or use Spatial"
        )
