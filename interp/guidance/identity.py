"""Guide who is seen in one part of an image towards who is seen in a part of a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interp.errors import InputError
from interp.guidance.appearance import Appearance, BoxPair
from interp.guidance.terms import Rescale, Weight


@dataclass(frozen=True, eq=False)
class Identity(Appearance):
    """The aligned cosine distance of identity descriptors within a pair of boxes.

    Args:
        readout: of identity.
        boxes: where the face (or creature) is in the reference and in the sample, as for `Appearance`; needed.
        weight, rescale, pooled: as for `Appearance`.
        name: in tables.

    Raises:
        InputError: as `Appearance`.

    Source: Readout Guidance, section 3.5 (identity consistency).
    """

    readout: Any
    boxes: BoxPair | Sequence[BoxPair] | None = None
    weight: Weight = 1.0
    rescale: Rescale | None = "latent_range"
    name: str = "identity"
    pooled: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.boxes is None:
            raise InputError(f"term {self.name!r} compares a part of each image: give boxes, or use Appearance")
        super().__post_init__()
