"""Regions of an image, and the cells of a model's grid that they cover."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, ShapeError


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """A part of the image, for the ``at`` of captures and edits: `Region.box` or `Region.mask` makes one.

    Args:
        edges: top, left, bottom and right of a box, in shares 0 to 1 of the image's height and width.
        shape: a mask of the whole image, of any size, in place of a box.
    """

    edges: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    shape: Tensor | None = None

    @classmethod
    def box(cls, top: float, left: float, bottom: float, right: float) -> "Region":
        """A box, in shares of the image: ``Region.box(0.0, 0.0, 0.5, 1.0)`` is its upper half.

        Raises:
            InputError: edges outside 0 to 1, or in the wrong order.
        """
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise InputError(
                f"Region.box({top}, {left}, {bottom}, {right}): give top < bottom and left < right, as shares 0 to 1 "
                "of the image"
            )
        return cls(edges=(float(top), float(left), float(bottom), float(right)))

    @classmethod
    def mask(cls, shape: Tensor) -> "Region":
        """The part of the image where a mask is True.

        Args:
            shape: bool ``[height, width]``, over the whole image.

        Raises:
            InputError: a mask of numbers, or one that is False everywhere.
            ShapeError: a mask that has not two axes.
        """
        if not isinstance(shape, Tensor) or shape.dtype != torch.bool:
            kind = shape.dtype if isinstance(shape, Tensor) else type(shape).__name__
            raise InputError(f"Region.mask takes a bool tensor [height, width], not {kind}")
        if shape.ndim != 2:
            raise ShapeError(f"Region.mask takes a bool tensor [height, width], not one of shape {tuple(shape.shape)}")
        if not bool(shape.any()):
            raise InputError("Region.mask: the mask is False everywhere")
        return cls(shape=shape.detach().cpu().clone())

    def covered(self, height: int, width: int) -> Float[Tensor, "height width"]:
        """Which share of each cell's area lies in the region.

        Args:
            height, width: of the grid.
        """
        if self.shape is None:
            top, left, bottom, right = self.edges
            return torch.outer(_within(top, bottom, height), _within(left, right, width))
        rows, columns = self.shape.shape
        return _shares(height, rows) @ self.shape.double() @ _shares(width, columns).T

    def cells(self, height: int, width: int) -> list[int]:
        """The cells of a grid that lie in the region with more than half their area, row by row.

        Args:
            height, width: of the grid.

        Raises:
            InputError: there is no such cell.
        """
        # Sums of shares are off by roundings, and a cell that is half covered must not depend on them.
        inside = self.covered(height, width) > 0.5 + 1e-9
        if not bool(inside.any()):
            raise InputError(
                f"{self!r} covers more than half of no cell of the {height} × {width} grid: it is too small here"
            )
        return inside.flatten().nonzero().flatten().tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region):
            return NotImplemented
        if self.shape is None or other.shape is None:
            return self.edges == other.edges and self.shape is other.shape
        return torch.equal(self.shape, other.shape)

    def __hash__(self) -> int:
        return hash((self.edges, None if self.shape is None else tuple(self.shape.shape)))

    def __repr__(self) -> str:
        if self.shape is None:
            return f"Region.box{self.edges}"
        height, width = self.shape.shape
        return f"Region.mask(<{height}×{width}, {int(self.shape.sum())} True>)"


def _within(start: float, stop: float, size: int) -> Float[Tensor, " size"]:
    """Which share of each of ``size`` equal intervals lies between two points of 0 to 1."""
    edges = torch.arange(size + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=stop * size) - edges[:-1].clamp(min=start * size)).clamp(min=0)


@cache
def _shares(size: int, of: int) -> Float[Tensor, "size of"]:
    """Row i says which shares of ``of`` equal intervals make up the i-th of ``size`` equal intervals."""
    mine, theirs = torch.arange(size, dtype=torch.float64) / size, torch.arange(of, dtype=torch.float64) / of
    overlap = torch.minimum(mine[:, None] + 1 / size, theirs + 1 / of) - torch.maximum(mine[:, None], theirs)
    return overlap.clamp(min=0) * size
