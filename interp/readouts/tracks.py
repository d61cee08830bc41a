"""Point tracks over the frames of a video, as files hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InputError, ShapeError


@dataclass(frozen=True)
class Tracks:
    """Points followed over frames.

    Attributes:
        points: (y, x) in pixels.
        visible: where each point can be seen.
    """

    points: Float[Tensor, "frame point 2"]
    visible: Bool[Tensor, "frame point"]

    def __post_init__(self) -> None:
        if self.points.shape[:2] != self.visible.shape:
            raise ShapeError(f"points are {list(self.points.shape)}, their visibility {list(self.visible.shape)}")

    @property
    def n_frames(self) -> int:
        """How many frames."""
        return len(self.points)

    def frames(self, n: int | None = None) -> "Tracks":
        """As many frames as are asked for.

        Args:
            n: of exactly two frames, points on the straight way between are made up; of any other number the first
                ones are taken, as many as there are. None: all.

        Raises:
            InputError: fewer than two frames are asked for.

        Source: Readout Guidance, official code (drag examples).
        """
        if n is None:
            return self
        if n < 2:
            raise InputError(f"a drag has at least two frames, not {n}")
        if self.n_frames != 2:
            return Tracks(self.points[:n], self.visible[:n])
        share = torch.linspace(0, 1, n)[:, None, None]
        both = self.visible.all(dim=0)
        return Tracks(self.points[:1] + share * (self.points[1:] - self.points[:1]), both.expand(n, -1))

    def pair(self, source: int, target: int) -> tuple[Float[Tensor, "point 2"], Float[Tensor, "point 2"]]:
        """The points that two frames both show, in each.

        Raises:
            InputError: there is no such frame.
        """
        for frame in (source, target):
            if not 0 <= frame < self.n_frames:
                raise InputError(f"frame {frame} is out of range: the tracks have {self.n_frames}, from 0 on")
        both = self.visible[source] & self.visible[target]
        return self.points[source, both], self.points[target, both]


def read_tracks(files: Sequence[str | Path], visible: Sequence[str | Path] = ()) -> Tracks:
    """Tracks of one video from one or several files, joined over points.

    Args:
        files: ``.npy`` of shape (1, frames, points, 2), (x, y) in pixels, floats or whole numbers.
        visible: ``.npy`` of shape (1, frames, points), one for each; none: all points can be seen in all frames.

    Raises:
        InputError: a file that cannot be read, that is of another shape or holds no finite numbers, or numbers of
            files or frames that differ; the message names it.

    Source: Readout Guidance, official code and files.
    """
    if not files:
        raise InputError("no file of tracks is given")
    if visible and len(visible) != len(files):
        raise InputError(f"{len(files)} files of tracks with {len(visible)} of visibility")
    points = [_points(Path(file)) for file in files]
    for file, found in zip(files, points, strict=True):
        if len(found) != len(points[0]):
            raise InputError(f"{str(file)!r} has {len(found)} frames, but {str(files[0])!r} has {len(points[0])}")
    seen = [torch.ones(found.shape[:2], dtype=torch.bool) for found in points]
    for index, file in enumerate(visible):
        array = _array(Path(file), 3)
        if array.shape[1:] != tuple(points[index].shape[:2]):
            raise InputError(f"{str(file)!r} is {list(array.shape)}, but its tracks are {list(points[index].shape)}")
        seen[index] = torch.from_numpy(array[0] != 0)
    return Tracks(torch.cat(points, dim=1), torch.cat(seen, dim=1))


def _points(file: Path) -> Tensor:
    array = _array(file, 4)
    if array.shape[-1] != 2 or not np.isfinite(array).all():
        raise InputError(f"{str(file)!r} is no array of finite (x, y): its shape is {list(array.shape)}")
    return torch.from_numpy(np.ascontiguousarray(array[0, :, :, ::-1], dtype=np.float32))


def _array(file: Path, n_axes: int) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{str(file)!r} cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != n_axes or len(array) != 1 or array.dtype.kind not in "fiub":
        shape = list(getattr(array, "shape", ()))
        raise InputError(f"{str(file)!r} is of shape {shape}: expected numbers with {n_axes} axes, the first of 1")
    return array
