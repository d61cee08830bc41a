"""Film strips: what a sampling run was heading for at some of its steps, with the readout drawn over it."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from interp.errors import ShapeError
from interp.figures.drawing import panels, style

PALE = 0.45  # share of an image's own colours that stays under a readout
SIDE = 0.72  # inches of one frame


def film_strip(
    images: Float[Tensor, "row step 3 height width"],
    steps: Sequence[str],
    rows: Sequence[str],
    *,
    readouts: Float[Tensor, "row step channel map_height map_width"] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    targets: Sequence[Tensor | None] | None = None,
) -> Figure:
    """Draw rows of frames, one column for each step.

    Args:
        images: what each step was heading for, 0 to 1.
        steps: the columns' titles.
        rows: the rows' titles.
        readouts: drawn over the frames, enlarged to their size: pictures of three channels in their own colours; of
            one channel, or of many (keypoints, of which the highest counts), in a scale from clear to strong.
        value_range: least and greatest value of readouts and targets.
        targets: what each row was guided to, in a column of its own; None in a row that was not guided.

    Returns:
        The figure.

    Raises:
        ShapeError: other numbers of titles, readouts or targets than there are rows and steps.
    """
    n_rows, n_steps = images.shape[:2]
    if (len(rows), len(steps)) != (n_rows, n_steps):
        raise ShapeError(f"{len(rows)} rows and {len(steps)} steps are named; there are {n_rows} and {n_steps}")
    if readouts is not None and tuple(readouts.shape[:2]) != (n_rows, n_steps):
        raise ShapeError(f"readouts of {list(readouts.shape[:2])} rows and steps, images of {[n_rows, n_steps]}")
    if targets is not None and len(targets) != n_rows:
        raise ShapeError(f"{len(targets)} targets for {n_rows} rows")
    n_columns = n_steps + (targets is not None)
    figure, axes = panels(n_rows, n_columns, width=SIDE * n_columns + 0.8, height=SIDE * n_rows + 0.25)
    with style():
        for row in range(n_rows):
            frames = [_array(image) for image in images[row]]
            if readouts is not None:
                frames = [
                    _over(f, _map(m, f.shape[0], value_range)) for f, m in zip(frames, readouts[row], strict=True)
                ]
            if targets is not None:
                target, blank = targets[row], np.ones_like(frames[0])
                frames = [blank if target is None else _over(blank, _map(target, len(blank), value_range)), *frames]
            for ax, frame in zip(axes[row], frames, strict=True):
                ax.imshow(frame, interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                for spine in ax.spines.values():
                    spine.set_visible(False)
            axes[row, 0].set_ylabel(rows[row], rotation=0, ha="right", va="center")
        titles = [*(["target"] if targets is not None else []), *steps]
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
    return figure


def _array(image: Tensor) -> np.ndarray:
    return rearrange(image.detach().float().cpu().clamp(0, 1).numpy(), "rgb y x -> y x rgb")


def _map(values: Tensor, side: int, ends: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Colours of a map, and how strongly each pixel shows them."""
    scaled = ((values.detach().float().cpu() - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)
    large = functional.interpolate(scaled[None], size=(side, side), mode="bilinear", align_corners=False)[0]
    strength = large.amax(dim=0)
    if len(large) == 3:
        colours = rearrange(large / strength.clamp(min=1e-6), "rgb y x -> y x rgb").numpy()
    else:
        colours = matplotlib.colormaps["plasma"](strength.numpy())[..., :3]
    return colours, strength.numpy()


def _over(frame: np.ndarray, drawn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    colours, strength = drawn
    share = repeat(strength, "y x -> y x 1")
    under: np.ndarray = PALE * frame + (1 - PALE)
    return under * (1 - share) + share * colours
