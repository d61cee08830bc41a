"""Guide a picture of a property (pose, depth, edges) or heat maps of keypoints towards a target."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.guidance.readout_terms import ReadoutTerm
from interp.guidance.terms import Rescale, Weight, check_finite, precise, usable

_SLACK = 1e-3  # targets come through resizes and half precision


@dataclass(frozen=True, eq=False)
class Spatial(ReadoutTerm):
    """The mean squared difference between what is read and a target.

    Args:
        readout: of pose, depth, edges or keypoints.
        target: ``[out, height, width]`` for all samples, or ``[sample, out, height, width]``, of the readout's size and
            in its value range. Resize drawings by nearest neighbour, so that no new colours arise.
        weight: see `Term`.
        rescale: ``"latent_range"``: prediction and target are compared as if both were mapped from the readout's value
            range to the range of the current latents.
        name: in tables; by default the readout's.

    Raises:
        InputError: a target with NaN, integers, or values outside the readout's range; a rescaling that needs a range
            that the readout does not have.
        ShapeError: a target of another size.

    Source: Readout Guidance, section 3.2 (spatially aligned control) and official code.
    """

    readout: Any
    target: Float[Tensor, "*sample out height width"]
    weight: Weight = 0.5
    rescale: Rescale | None = "latent_range"
    name: str = ""

    compares = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if not self.name:
            object.__setattr__(self, "name", str(getattr(self.readout, "name", "") or "spatial"))
        super().__post_init__()
        if getattr(self.readout, "kind", "spatial") == "features":
            raise InputError(
                f"term {self.name!r} takes a readout of a picture or of heat maps, and the {self.title} readout gives "
                "descriptors: use Appearance or Drag"
            )
        what = f"the target of term {self.name!r}"
        check_finite(self.target, what)
        if not self.target.numel():
            raise ShapeError(f"{what} is empty: {tuple(self.target.shape)}")
        channels = getattr(getattr(self.readout, "head", None), "n_out", None)
        if channels is not None and self.target.ndim >= 3 and self.target.shape[-3] != channels:
            raise ShapeError(f"{what} has {self.target.shape[-3]} channels, and its readout gives {channels}")
        size = tuple(self.readout.size)
        if self.target.ndim not in (3, 4) or tuple(self.target.shape[-2:]) != size:
            raise ShapeError(
                f"{what} is of shape {tuple(self.target.shape)}: the {self.title} readout gives [sample, out, "
                f"{size[0]}, {size[1]}]"
            )
        span = self.readout.value_range
        if span is None:
            if self.rescale is not None:
                raise InputError(
                    f"term {self.name!r}: the {self.title} readout has no value_range to map to the latents': give "
                    "rescale=None"
                )
            return
        low, high = float(self.target.min()), float(self.target.max())
        slack = _SLACK * (span[1] - span[0])
        if low < span[0] - slack or high > span[1] + slack:
            raise InputError(
                f"{what} has values from {low:.3g} to {high:.3g}: the {self.title} readout was trained on "
                f"{span[0]:g} to {span[1]:g}"
            )

    @property
    def span(self) -> float:
        """See `Term`."""
        low, high = self.readout.value_range or (0.0, 1.0)
        return float(high - low)

    def check(self, sd: Any, rows: int | None, cells: tuple[int, int], steps: int) -> None:
        """See `Term`."""
        super().check(sd, rows, cells, steps)
        given = len(self.target) if self.target.ndim == 4 else 1
        if rows is not None and given not in (1, rows):
            raise ShapeError(
                f"term {self.name!r} has {given} targets for {rows} samples: give one for all, or one for each"
            )

    def compare(
        self, seen: Float[Tensor, "sample out height width"], reference: Float[Tensor, "sample out height width"] | None
    ) -> Float[Tensor, " sample"]:
        """See `ReadoutTerm`."""
        target = usable(self.target)
        if target.shape[-3] != seen.shape[1]:
            raise ShapeError(
                f"the target of term {self.name!r} has {target.shape[-3]} channels, and its readout gives "
                f"{seen.shape[1]}"
            )
        difference = precise(seen) - target.to(precise(seen))
        return difference.square().mean(dim=(1, 2, 3))
