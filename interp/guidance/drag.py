"""Drag points of an image to other places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.guidance.readout_terms import ReadoutTerm, check_descriptors, per_sample
from interp.guidance.terms import Rescale, Weight, is_number

Points = Num[Tensor, "point 2"]


@dataclass(frozen=True, eq=False)
class Drag(ReadoutTerm):
    """What the reference has at a source point is to be found at its target, and no longer at the source.

    With s = (cosine + 1) / 2 between descriptors, the loss of a sample is
    ``-0.5 mean s(reference[source], sample[target]) + 0.5 mean s(reference[source], sample[source])``. Points are
    scaled to the readout's cells and truncated; pairs that leave the image are dropped (see `cells`).

    Args:
        readout: of correspondence.
        sources: ``[point, 2]``, (y, x) in pixels of ``size``, for all samples; or one such tensor for each.
        targets: where each source is to go.
        size: (height, width) of the image that the points belong to.
        anti_ghosting: the second term of the loss, without which a copy may stay behind.
        weight, rescale: see `Term`.
        name: in tables.

    Raises:
        InputError: numbers of sources and targets that differ, points that are not finite, none inside the image, none
            that moves by a cell, a source cell that is asked to go to places more than a cell apart, or a readout that
            is no map of descriptors.

    Source: Readout Guidance, section 3.3 (drag-based manipulation) and official code.
    """

    readout: Any
    sources: Points | Sequence[Points]
    targets: Points | Sequence[Points]
    size: tuple[int, int]
    anti_ghosting: bool = True
    weight: Weight = 1.0
    rescale: Rescale | None = None
    name: str = "drag"

    compares = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        check_descriptors(self)
        sides = self.size if isinstance(self.size, Sequence) and not isinstance(self.size, str) else ()
        if len(sides) != 2 or not all(is_number(side) and side >= 1 for side in sides):
            raise InputError(f"term {self.name!r}: size={self.size!r}: give (height, width) of the points' image")
        sources, targets = (
            _listed(given, f"{what} of term {self.name!r}")
            for given, what in ((self.sources, "sources"), (self.targets, "targets"))
        )
        if len(sources) != len(targets):
            raise InputError(f"term {self.name!r}: sources of {len(sources)} samples, targets of {len(targets)}")
        kept = [self._kept(s, t, index) for index, (s, t) in enumerate(zip(sources, targets, strict=True))]
        object.__setattr__(self, "_pairs", kept)

    @property
    def cells(self) -> list[tuple[Int[Tensor, "pair 2"], Int[Tensor, "pair 2"]]]:
        """Source and target cells (y, x) of each sample's pairs (or of all samples'), those out of frame left out."""
        return list(vars(self)["_pairs"])

    def check(self, sd: Any, rows: int | None, cells: tuple[int, int], steps: int) -> None:
        """See `Term`."""
        super().check(sd, rows, cells, steps)
        if rows is not None:
            per_sample(self.cells, rows, f"points of term {self.name!r}")

    def compare(
        self, seen: Float[Tensor, "sample out height width"], reference: Float[Tensor, "sample out height width"] | None
    ) -> Float[Tensor, " sample"]:
        """See `ReadoutTerm`."""
        assert reference is not None
        losses = []
        pairs = per_sample(self.cells, len(seen), f"points of term {self.name!r}")
        for (sources, targets), one, other in zip(pairs, seen, reference, strict=True):
            wanted = _at(other, sources)
            loss = -0.5 * _likeness(wanted, _at(one, targets)).mean()
            if self.anti_ghosting:
                loss = loss + 0.5 * _likeness(wanted, _at(one, sources)).mean()
            losses.append(loss)
        return torch.stack(losses)

    def _kept(self, sources: Tensor, targets: Tensor, sample: int) -> tuple[Tensor, Tensor]:
        """The cells of one sample's pairs, checked."""
        what = f"term {self.name!r}" + (f", sample {sample}" if sample else "")
        for points, name in ((sources, "sources"), (targets, "targets")):
            if points.ndim != 2 or points.shape[1] != 2:
                raise ShapeError(f"{what}: {name} of shape {tuple(points.shape)}: give [point, 2], (y, x) in pixels")
            if not bool(torch.isfinite(points).all()):
                raise InputError(f"{what}: {name} have coordinates that are NaN or infinite")
        if len(sources) != len(targets):
            raise InputError(f"{what}: {len(sources)} sources and {len(targets)} targets")
        grid = torch.tensor(self.readout.size, dtype=torch.float64)
        scale = grid / torch.tensor(self.size, dtype=torch.float64)
        places = torch.stack([sources, targets]).cpu().double() * scale
        inside = ((places >= 0) & (places < grid)).all(dim=-1).all(dim=0)
        if not bool(inside.any()):
            raise InputError(
                f"{what}: of {len(sources)} pairs of points none lies inside the image of {self.size[0]} × "
                f"{self.size[1]} pixels at both ends. Points are (y, x) here, (x, y) in most files"
            )
        start, end = places[:, inside].long()
        if bool((start == end).all()):
            raise InputError(
                f"{what}: no point moves by a cell of the {self.title} readout's {tuple(self.readout.size)} grid, so "
                "that there is nothing to drag"
            )
        goals: dict[tuple[int, ...], tuple[int, ...]] = {}
        for source, target in zip(start.tolist(), end.tolist(), strict=True):
            first = goals.setdefault(tuple(source), tuple(target))
            # Points of one cell that move together are truncated to cells next to each other.
            if max(abs(a - b) for a, b in zip(first, target, strict=True)) > 1:
                raise InputError(
                    f"{what}: what the reference has at cell {tuple(source)} is asked to go to "
                    f"{goals[tuple(source)]} and to {tuple(target)}"
                )
        return start, end


def _listed(points: Any, what: str) -> list[Tensor]:
    """One tensor of points for each sample, or one for all."""
    several = isinstance(points, list | tuple) and any(isinstance(one, Tensor | np.ndarray) for one in points)
    try:
        return [torch.as_tensor(one) for one in (points if several else [points])]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} are no points: give [point, 2], (y, x) in pixels, or one for each sample") from error


def _at(descriptors: Float[Tensor, "out height width"], cells: Int[Tensor, "pair 2"]) -> Float[Tensor, "out pair"]:
    rows, columns = cells.to(descriptors.device).unbind(dim=1)
    return descriptors[:, rows, columns]


def _likeness(a: Float[Tensor, "out pair"], b: Float[Tensor, "out pair"]) -> Float[Tensor, " pair"]:
    return (torch.cosine_similarity(a, b, dim=0) + 1) / 2
