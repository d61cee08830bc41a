"""Guide the looks of an image, or of a part of it, towards those of a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError
from interp.guidance.readout_terms import ReadoutTerm, check_descriptors, per_sample
from interp.guidance.terms import Rescale, Weight, is_number
from interp.readouts.losses import aligned_cosine_distance

# (top, left, bottom, right) in shares 0 to 1 of the image
Box = Sequence[float]
BoxPair = tuple[Box, Box]


@dataclass(frozen=True, eq=False)
class Appearance(ReadoutTerm):
    """The spatially aligned cosine distance of descriptors: mean over the cells of 1 - cosine.

    Args:
        readout: of appearance.
        boxes: a pair (box in the reference, box in the sample) for all samples, or a list of one pair for each; a box
            is (top, left, bottom, right) in shares 0 to 1 of the image. What is inside is resized bilinearly to the
            readout's size before it is compared. None: the whole maps, cell by cell.
        weight: see `Term`.
        rescale: ``"latent_range"``, as the authors', outweighs terms without it by the squared range of the latents,
            some 60 times in the first steps; None: the distance as it is, 0 to 2.
        name: in tables.
        pooled: compare the means of the descriptors over all cells (of the boxes) in place of cell by cell: the looks
            are asked for, but no longer their places.

    Raises:
        InputError: boxes that are empty, outside the image, or smaller than a cell, or a readout that is no map of
            descriptors.

    Source: Readout Guidance, section 3.4 (appearance preservation) and official code.
    """

    readout: Any
    boxes: BoxPair | Sequence[BoxPair] | None = None
    weight: Weight = 1.0
    rescale: Rescale | None = "latent_range"
    name: str = "appearance"
    pooled: bool = False

    compares = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        check_descriptors(self)
        self._cells()

    def check(self, sd: Any, rows: int | None, cells: tuple[int, int], steps: int) -> None:
        """See `Term`."""
        super().check(sd, rows, cells, steps)
        if self.boxes is not None and rows is not None:
            per_sample(self._cells(), rows, f"boxes of term {self.name!r}")

    def compare(
        self, seen: Float[Tensor, "sample out height width"], reference: Float[Tensor, "sample out height width"] | None
    ) -> Float[Tensor, " sample"]:
        """See `ReadoutTerm`."""
        assert reference is not None
        if self.boxes is None:
            return self._distance(seen, reference)
        pairs = per_sample(self._cells(), len(seen), f"boxes of term {self.name!r}")
        there = torch.cat([_cropped(one, box) for (box, _), one in zip(pairs, reference, strict=True)])
        here = torch.cat([_cropped(one, box) for (_, box), one in zip(pairs, seen, strict=True)])
        return self._distance(here, there)

    def _distance(
        self, seen: Float[Tensor, "sample out height width"], reference: Float[Tensor, "sample out height width"]
    ) -> Float[Tensor, " sample"]:
        if self.pooled:
            seen, reference = (maps.mean(dim=(2, 3), keepdim=True) for maps in (seen, reference))
        return aligned_cosine_distance(seen, reference)

    @property
    def observed(self) -> list[tuple[slice, slice]]:
        """The cells of each sample's own box (or of all samples'); all of them without boxes."""
        height, width = self.readout.size
        return [box for _, box in self._cells()] or [(slice(0, height), slice(0, width))]

    def _cells(self) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Rows and columns of each pair of boxes."""
        if self.boxes is None:
            return []
        given: Any = self.boxes if _length(self.boxes) is not None else ()
        pairs = [given] if [_length(box) for box in given] == [4, 4] else given
        size = tuple(self.readout.size)
        if not len(pairs) or any(_length(pair) != 2 for pair in pairs):
            raise InputError(f"boxes of term {self.name!r}: give pairs (box in the reference, box in the sample)")
        return [(_box(a, size, self.name), _box(b, size, self.name)) for a, b in pairs]


def _box(box: Box, size: tuple[int, ...], name: str) -> tuple[slice, slice]:
    """The rows and columns whose cells lie in a box with half their height and width or more."""
    edges: tuple[Any, ...] = tuple(box) if _length(box) == 4 else (box,)
    numbers = len(edges) == 4 and all(is_number(edge) for edge in edges)
    top, left, bottom, right = edges if numbers else (0.0,) * 4
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise InputError(
            f"box {edges} of term {name!r}: give (top, left, bottom, right) in shares 0 to 1 of the image, top < "
            "bottom and left < right"
        )
    rows = slice(_edge(top, size[0]), _edge(bottom, size[0]))
    columns = slice(_edge(left, size[1]), _edge(right, size[1]))
    if rows.start == rows.stop or columns.start == columns.stop:
        raise InputError(f"box {edges} of term {name!r} is smaller than a cell of the {size[0]} × {size[1]} grid")
    return rows, columns


def _length(given: Any) -> int | None:
    """How many entries a list, tuple or array has; None of anything else, text among it."""
    return len(given) if hasattr(given, "__len__") and not isinstance(given, str) else None


def _edge(share: float, cells: int) -> int:
    # Halves go down for both edges, whatever the rounding of the product.
    return int(share * cells + 0.5 - 1e-9)


def _cropped(descriptors: Float[Tensor, "out height width"], box: Any) -> Float[Tensor, "1 out height width"]:
    """What is inside a box, resized to the whole map's size."""
    rows, columns = box
    inside = descriptors[None, :, rows, columns]
    return F.interpolate(inside, size=tuple(descriptors.shape[-2:]), mode="bilinear", align_corners=False)
