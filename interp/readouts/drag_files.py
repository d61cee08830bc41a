"""Drag examples and lists of prompts, as the authors ship them."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from interp.errors import InputError, nearest
from interp.images import load_image
from interp.readouts.data import read_json
from interp.readouts.tracks import Tracks, read_tracks


@dataclass(frozen=True)
class DragExample:
    """A picture, and where its points should go.

    Attributes:
        image: the picture; frame 0 of the tracks.
        tracks: (y, x) in pixels of ``size``; `Tracks.frames` and `Tracks.pair` give sources and targets.
        size: (height, width) that the tracks are in.
        prompt: of the picture.
        seed: of its noise.
        name: of the example: its video or picture.
        drag: of what is asked of it, such as ``"right-arm"``.
    """

    image: Image.Image
    tracks: Tracks
    size: tuple[int, int]
    prompt: str
    seed: int
    name: str
    drag: str


def load_drag_example(folder: str | Path, drag: str | None = None) -> DragExample:
    """Read ``source.png``, ``info.json`` and ``tracks_{drag}.npy`` of one example.

    Args:
        folder: of the example. ``visibles_{drag}.npy`` is read where it is there; else all points are visible.
        drag: which tracks, where the folder has several; None: the only ones.

    Raises:
        InputError: a file or field that is missing or cannot be read, or several tracks of which none is named; the
            message says which there are.

    Source: Readout Guidance, official example data.
    """
    home = Path(folder)
    info = read_json(home / "info.json")
    try:
        name, prompt, seed = str(info["video_name"]), str(info["prompt"]), int(info["seed"])
        width, height = (int(side) for side in info["image_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{str(home / 'info.json')!r} lacks or garbles video_name, prompt, seed or image_dim: {error!r}"
        ) from error
    drags = sorted(file.stem.removeprefix("tracks_") for file in home.glob("tracks_*.npy"))
    if drag is None and len(drags) == 1:
        drag = drags[0]
    if drag not in drags:
        there = ", ".join(f"tracks_{one}.npy" for one in drags) or "no tracks_*.npy"
        wanted = "name one of several drags" if drag is None and drags else f"there is no tracks_{drag or '...'}.npy"
        raise InputError(f"{str(home)!r} holds {there}: {wanted}. {nearest(drag or '', drags)}".rstrip())
    visible = home / f"visibles_{drag}.npy"
    tracks = read_tracks([home / f"tracks_{drag}.npy"], [visible] if visible.is_file() else [])
    # Some of these files are JPEG under the name .png; images are told by their content.
    return DragExample(load_image(home / "source.png"), tracks, (height, width), prompt, seed, name, drag)


def load_prompts(file: str | Path) -> dict[str, str]:
    """The prompt of each control image: ``{file stem: prompt}``.

    Raises:
        InputError: another content.

    Source: Readout Guidance, official example data (spatial).
    """
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise InputError(f"{str(file)!r} is no JSON object of prompts by file stem")
    return content
