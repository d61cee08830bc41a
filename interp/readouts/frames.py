"""Pairs of video frames with point tracks, as DAVIS with tracked points is laid out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interp.errors import InputError
from interp.images import load_image
from interp.readouts.data import image_files, read_list, square, to_tensor, under
from interp.readouts.examples import Example, PointPair
from interp.readouts.tracks import Tracks, read_tracks

GAP = (2, 23)
"""Least and greatest distance of the authors' frame pairs: above 1, below 24."""
LAST = 128
"""Tracks of the authors reach up to this frame."""


@dataclass(frozen=True)
class Frames:
    """Two frames of one video.

    Attributes:
        source, target: their files; the file's stem is the frame's number.
        video: its name.
    """

    source: Path
    target: Path
    video: str


@dataclass(frozen=True)
class FramePairs:
    """Pairs of frames with the tracked points that both show.

    Both frames are cropped to squares of the same window and resized. Points outside the window do not count; where no
    window shows a point in both frames, points are moved to its border, as in the authors' code. Pairs that share no
    point are left out.

    Args:
        pairs: which frames, see `listed_frames` and `paired_frames`.
        tracks: folder with ``<video>/tracks_*.npy`` and ``visibles_*.npy``, or one such file or more for each video as
            ``tracks_<video>*.npy``.
        masks: folder with ``<video>/<frame>.png`` of objects; points count inside the source's object only. None: all.
        size: side in pixels that frames are resized to.
        crop: ``"random"``, or ``"center"``.

    Raises:
        InputError: a file that is missing or cannot be read, a frame beyond the tracks, or no pair with a shared point.

    Source: Readout Guidance, section 3.2 and official code (correspondence); pairs without a point are left out here,
    where the authors' code makes up a point.
    """

    pairs: Sequence[Frames]
    tracks: str | Path
    masks: str | Path | None = None
    size: int = 512
    crop: str = "random"
    shared: tuple[tuple[Frames, Tensor, Tensor], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or self.crop not in ("random", "center"):
            raise InputError(f"size={self.size}, crop={self.crop!r}: expected a positive size, 'random' or 'center'")
        held: dict[str, Tracks] = {}
        shared = []
        for pair in self.pairs:
            if pair.video not in held:
                held[pair.video] = video_tracks(self.tracks, pair.video)
            points = held[pair.video].pair(_number(pair.source), _number(pair.target))
            inside = self._inside(pair, points[0])
            if bool(inside.any()):
                shared.append((pair, points[0][inside], points[1][inside]))
        if not shared:
            raise InputError(f"none of {len(self.pairs)} pairs of frames shares a tracked point")
        object.__setattr__(self, "shared", tuple(shared))

    def __len__(self) -> int:
        """How many pairs share a point."""
        return len(self.shared)

    def __call__(self, index: int, generator: np.random.Generator) -> Example:
        """Two frames in -1 .. 1 and a `PointPair`.

        Raises:
            InputError: a frame that cannot be read, or frames of different sizes.
        """
        pair, there, here = self.shared[index]
        frames = [load_image(file) for file in (pair.source, pair.target)]
        if frames[0].size != frames[1].size:
            raise InputError(f"{str(pair.source)!r} and {str(pair.target)!r} are of different sizes")
        window = square(frames[0].size, None if self.crop == "center" else generator)
        if self.crop == "random" and not bool(_within(there, here, window).any()):
            # This crop shows none of the shared points in both frames: the middle of one of them does.
            window = _around(there, here, frames[0].size, generator)
        kept = _within(there, here, window)
        if not bool(kept.any()):
            kept = torch.ones_like(kept)
        side = window[2] - window[0]
        corner = torch.tensor([window[1], window[0]], dtype=torch.float32)
        # Shares of the last pixel's index, as the authors have it.
        last = max(self.size - 1, 1)
        points = [((p[kept] - corner) * (self.size / side) / last).clamp(0, 1) for p in (there, here)]
        cropped = [
            2 * to_tensor(frame.crop(window).resize((self.size, self.size), Image.Resampling.BILINEAR)) - 1
            for frame in frames
        ]
        return Example(torch.stack(cropped), PointPair(points[0], points[1]))

    def _inside(self, pair: Frames, points: Tensor) -> Tensor:
        if self.masks is None:
            return torch.ones(len(points), dtype=torch.bool)
        file = Path(self.masks) / pair.video / f"{pair.source.stem}.png"
        mask = to_tensor(load_image(file)).amax(dim=0) > 0
        cells = points.round().long()
        limit = torch.tensor(mask.shape)
        framed = ((cells >= 0) & (cells < limit)).all(dim=1)
        cells = cells.clamp(min=0).minimum(limit - 1)
        return framed & mask[cells[:, 0], cells[:, 1]]


def listed_frames(file: str | Path, images: str | Path) -> list[Frames]:
    """Frame pairs of an authors' list ``[{"source", "target", "video_name", "dataset_name"}]``.

    Args:
        file: the JSON list.
        images: folder under which the frames are, in the folder ``dataset_name`` where there is such a one.

    Raises:
        InputError: an unreadable list, an entry that lacks something, or a frame that is missing.

    Source: Readout Guidance, official data lists.
    """
    found = []
    for entry in read_list(file, ("source", "target", "video_name")):
        root = under(Path(images), entry)
        pair = Frames(root / str(entry["source"]), root / str(entry["target"]), str(entry["video_name"]))
        for frame in (pair.source, pair.target):
            if not frame.is_file():
                raise InputError(f"{str(file)!r} names {str(frame)!r}, which does not exist")
        found.append(pair)
    return found


def paired_frames(
    images: str | Path, n: int, seed: int, *, gap: tuple[int, int] = GAP, last: int = LAST
) -> list[Frames]:
    """Frame pairs drawn from a folder of videos, ``<video>/<number>.jpg``.

    Args:
        images: the folder.
        n: how many pairs, all different where there are as many.
        seed: of the draw.
        gap: least and greatest distance of the two frames.
        last: frames from this number on are not used.

    Raises:
        InputError: no frames that far apart, or settings out of range.

    Source: Readout Guidance, official code (distance above 1 and below 24, frames below 128).
    """
    if n < 1 or not 1 <= gap[0] <= gap[1]:
        raise InputError(f"n={n} and gap={gap}: expected at least one pair, and a rising gap from 1")
    videos: dict[Path, dict[int, Path]] = {}
    for file in image_files(Path(images)):
        if (number := _number(file)) < last:
            videos.setdefault(file.parent, {})[number] = file
    every = [
        Frames(frames[one], frames[other], folder.relative_to(images).as_posix())
        for folder, frames in videos.items()
        for one in frames
        for other in frames
        if gap[0] <= abs(other - one) <= gap[1]
    ]
    if not every:
        raise InputError(f"no two frames in {str(images)!r} are {gap[0]} to {gap[1]} apart")
    rng = np.random.default_rng(seed)
    return [every[int(index)] for index in rng.choice(len(every), n, replace=n > len(every))]


def video_tracks(folder: str | Path, video: str) -> Tracks:
    """The tracks of one video, see `FramePairs`.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    home = Path(folder) / video
    pattern = "tracks_*.npy" if home.is_dir() else f"tracks_{video}*.npy"
    home = home if home.is_dir() else Path(folder)
    files = sorted(home.glob(pattern))
    if not files:
        raise InputError(f"no tracks of {video!r}: {str(home / pattern)!r} matches nothing")
    seen = [file.with_name(file.name.replace("tracks_", "visibles_", 1)) for file in files]
    there = [file for file in seen if file.is_file()]
    if there and len(there) < len(seen):
        missing = next(file for file in seen if not file.is_file())
        raise InputError(f"{str(missing)!r} is missing, while other tracks of {video!r} say what is visible")
    return read_tracks(files, there)


def _number(file: Path) -> int:
    if not file.stem.isdigit():
        raise InputError(f"{str(file)!r}: a frame's file is named by its number")
    return int(file.stem)


def _within(there: Tensor, here: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    left, top, right, bottom = window
    low, high = torch.tensor([top, left]), torch.tensor([bottom, right])
    return torch.stack([((p >= low) & (p < high)).all(dim=1) for p in (there, here)]).all(dim=0)


def _around(
    there: Tensor, here: Tensor, size: tuple[int, int], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A square window around the middle of one point's two places, as far as the picture goes."""
    chosen = int(generator.integers(len(there)))
    y, x = ((there[chosen] + here[chosen]) / 2).tolist()
    side = min(size)
    left, top = (min(max(round(at - side / 2), 0), length - side) for at, length in ((x, size[0]), (y, size[1])))
    return left, top, left + side, top + side
