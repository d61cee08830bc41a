"""Figures of semantic correspondence: matched points, layers by timesteps, warped images, bars of PCK."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.figures.drawing import COLOURS, COLUMN, axes_or_new, blend, finite, legend_key
from interp.images import load_image
from interp.metrics import Interval

Picture = Image.Image | Tensor | np.ndarray | str | Path
RIGHT, WRONG = COLOURS[0], COLOURS[1]
_OUTLINE = [withStroke(linewidth=2.2, foreground="white")]


def matched_points(
    source: Picture,
    target: Picture,
    source_points: ArrayLike | Tensor,
    predicted: ArrayLike | Tensor,
    *,
    true: ArrayLike | Tensor | None = None,
    correct: Sequence[bool] | None = None,
    lines: bool = True,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw two images beside each other, and which point of one was matched with which point of the other.

    Args:
        source: a picture, an array [height, width, 3], a tensor [3, height, width] (0 to 1), or a file.
        target: the same for the other image; drawn as high as the source.
        source_points: (y, x) in pixels of the source.
        predicted: (y, x) in pixels of the target, in the same order.
        true: where the points really are in the target. A wrong point is then joined to its right place, a ring.
        correct: which matches are right: blue, a filled dot and a full line; wrong ones vermilion, a cross and a
            dashed line. Without it, every point has a colour of its own.
        lines: join each point with its match; without it, both bear the same number, on squares when wrong.
        legend: write below what the marks mean, when ``correct`` is given.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes: pixels of the source, with the target to the right of it.

    Raises:
        ShapeError: points that are not [point, 2], or different numbers of points.
        InputError: a file that cannot be read, or a coordinate that is not finite.
    """
    images = [_pixels(source), _pixels(target)]
    given = {"source points": source_points, "predicted points": predicted}
    places = {
        name: _points(points, name) for name, points in (given | ({} if true is None else {"true": true})).items()
    }
    n = len(places["source points"])
    for name, count in {**{name: len(points) for name, points in places.items()},
                        "marks of what is correct": n if correct is None else len(correct)}.items():  # fmt: skip
        if count != n:
            raise ShapeError(f"There are {n} source points, but {count} {name}.")
    height, width = images[0].shape[:2]
    scale = height / images[1].shape[0]
    gap = 0.03 * width
    across = images[1].shape[1] * scale
    total = width + gap + across

    def beside(points: np.ndarray) -> np.ndarray:
        return (points + 0.5) * scale - 0.5 + [0, width + gap]

    looks = _looks(n, correct, lines)
    size = (COLUMN, COLUMN * height / total + (0.22 if legend and correct is not None else 0))
    with axes_or_new(ax, size) as ax:
        ax.imshow(images[0], extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        ax.imshow(images[1], extent=(width + gap - 0.5, total - 0.5, height - 0.5, -0.5))
        there = beside(places["predicted points"])
        rights = None if true is None else beside(places["true"])
        for index, look in enumerate(looks):
            (y, x), (to_y, to_x) = places["source points"][index], there[index]
            if lines:
                ax.plot([x, to_x], [y, to_y], color=look["color"], linestyle=look["line"], linewidth=0.9, zorder=3,
                        path_effects=[withStroke(linewidth=1.7, foreground="white")], label="_match")  # fmt: skip
            if rights is not None and look["wrong"]:
                right_y, right_x = rights[index]
                ax.plot([to_x, right_x], [to_y, right_y], color=look["color"], linestyle=":", linewidth=0.9, zorder=3,
                        path_effects=[withStroke(linewidth=1.7, foreground="white")], label="_miss")  # fmt: skip
                ax.plot(right_x, right_y, "o", markersize=5, markerfacecolor="none", markeredgecolor=look["color"],
                        markeredgewidth=1.1, path_effects=_OUTLINE, zorder=4, label="_true")  # fmt: skip
            _dot(ax, x, y, look, "o" if lines else look["marker"], "_source", None if lines else index + 1)
            _dot(ax, to_x, to_y, look, look["marker"], "_predicted", None if lines else index + 1)
        ax.set(xlim=(-0.5, total - 0.5), ylim=(height - 0.5, -0.5), aspect="equal")
        ax.axis("off")
        if legend and correct is not None:
            handles = [
                _key("correct", RIGHT, "o", "-" if lines else ""),
                _key("wrong", WRONG, "X" if lines else "s", (0, (3, 1.5)) if lines else ""),
            ]
            if rights is not None and not all(correct):
                handles.append(Line2D([], [], linestyle="", marker="o", markersize=5, markerfacecolor="none",
                                      markeredgecolor=WRONG, markeredgewidth=1.1, label="true place"))  # fmt: skip
            ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, borderaxespad=0.3,
                      handlelength=2.2, columnspacing=1.4, handletextpad=0.5)  # fmt: skip
    return ax


def layer_timestep_map(
    values: ArrayLike | Tensor,
    timesteps: Sequence[float | int],
    layers: Sequence[str] | None = None,
    *,
    label: str = "PCK@0.1",
    annotate: bool = True,
    percent: bool = True,
    limits: tuple[float | int, float | int] | None = None,
    best: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one value for each layer and timestep: PCK of single cells, or learned mixing weights.

    Args:
        values: [timestep, layer], as mixing weights are stored.
        timesteps: what the model saw at each step, such as -1, 60, ..., 960.
        layers: a name for each layer; 1, 2, ... without it, as in the paper.
        label: what the values are.
        annotate: write each value into its cell; a colour bar stands beside the map either way.
        percent: values are fractions, shown in percent.
        limits: values at the two ends of the colours; the smallest and largest without it.
        best: frame the largest value.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes; layers from top to bottom, timesteps from clean to noisy as they are given.

    Raises:
        ShapeError: values that do not fit the timesteps and layers.
        InputError: a value is not finite.

    Source: Diffusion Hyperfeatures, figure of the mixing weights.
    """
    numbers = finite(_array(values), "values") * (100 if percent else 1)
    n_layers = numbers.shape[1] if layers is None and numbers.ndim == 2 else len(layers or ())
    if numbers.shape != (len(timesteps), n_layers) or numbers.size == 0:
        raise ShapeError(f"Values are [timestep, layer]; they have shape {list(numbers.shape)}, but there are "
                         f"{len(timesteps)} timesteps and {n_layers} layers.")  # fmt: skip
    cells = numbers.T
    low, high = (100 * end if percent else end for end in limits) if limits else (cells.min(), cells.max())
    with axes_or_new(ax, (COLUMN * 1.15, 0.75 + 0.19 * n_layers)) as ax:
        image = ax.imshow(cells, cmap="Blues", vmin=low, vmax=high, aspect="auto")
        names = [str(index + 1) for index in range(n_layers)] if layers is None else list(layers)
        steps = [f"{step:g}".replace("-", "−") for step in timesteps]
        crowded = len(steps) > 6
        ax.set_xticks(range(len(steps)), steps, rotation=90 if crowded else 0)
        ax.set_yticks(range(n_layers), names)
        ax.set(xlabel="timestep", ylabel="layer")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_xticks(np.arange(len(steps) + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(n_layers + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
        if annotate:
            digits = 0 if cells.max() >= 10 else 1 if cells.max() >= 1 else 2
            for (row, column), value in np.ndenumerate(cells):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                ax.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=5.5,
                        color="white" if dark else "black")  # fmt: skip
        if best:
            row, column = np.unravel_index(cells.argmax(), cells.shape)
            ax.plot(column + np.array([-1, 1, 1, -1, -1]) / 2, row + np.array([-1, -1, 1, 1, -1]) / 2, color=WRONG,
                    linewidth=1.4, clip_on=False, zorder=4, label="_best", solid_joinstyle="miter")  # fmt: skip
        bar = ax.figure.colorbar(image, ax=ax, label=f"{label} (%)" if percent else label, fraction=0.06, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return ax


def warp_panel(
    source: Picture,
    target: Picture,
    warped: Picture,
    source_colours: Picture,
    carried: Picture,
    *,
    titles: Sequence[str] = ("source", "target", "source warped", "places", "places carried"),
    ax: Axes | None = None,
) -> Axes:
    """Draw dense correspondences: two images, one warped to the other, and where every pixel comes from.

    Args:
        source: the source image, in any of the forms of `matched_points`.
        target: the target image.
        warped: the source carried over to the target.
        source_colours: a colour for each place of the source.
        carried: these colours carried over to the target.
        titles: the words above the five panels.
        ax: where to draw; a new figure of two columns without it.

    Returns:
        The axes.

    Raises:
        ShapeError: not five titles.
        InputError: a file that cannot be read.

    Source: Diffusion Hyperfeatures, figures of dense warps.
    """
    pictures = [_pixels(one) for one in (source, target, warped, source_colours, carried)]
    if len(titles) != len(pictures):
        raise ShapeError(f"There are {len(pictures)} panels, but {len(titles)} titles.")
    # What is carried to the target has its proportions, and the colours have those of the source, whatever their grid.
    wide, target_wide = (image.shape[1] / image.shape[0] for image in pictures[:2])
    widths = [wide, target_wide, target_wide, wide, target_wide]
    gap = 0.05
    total = sum(widths) + gap * (len(widths) - 1)
    with axes_or_new(ax, (2 * COLUMN, 2 * COLUMN / total + 0.22)) as ax:
        left = 0.0
        for image, width, title in zip(pictures, widths, titles, strict=True):
            ax.imshow(image, extent=(left, left + width, 1, 0), interpolation="none")
            ax.add_patch(Rectangle((left, 0), width, 1, fill=False, edgecolor="#B4B4B4", linewidth=0.5))
            ax.text(left + width / 2, -0.03, title, ha="center", va="bottom", fontsize=7)
            left += width + gap
        ax.set(xlim=(-0.01, total + 0.01), ylim=(1.02, -0.16), aspect="equal")
        ax.axis("off")
    return ax


def pck_bars(
    scores: Mapping[str, Mapping[str, Interval]],
    *,
    xlabel: str = "PCK@0.1 (%)",
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the PCK of several methods as bars with intervals, all threshold bases together.

    Args:
        scores: method -> base -> interval, such as ``{"aggregated": {"img": ..., "bbox": ...}}``, as fractions; the
            first method is drawn on top. A missing interval (NaN) is left out.
        xlabel: what the values are.
        highlight: a method whose name is set in bold.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: no scores, or methods with different bases.
        InputError: a PCK that is not finite, or a highlighted method that is not drawn.
    """
    if not scores or not all(scores.values()):
        raise ShapeError("There are no scores to draw.")
    bases = list(next(iter(scores.values())))
    for name, by_base in scores.items():
        if list(by_base) != bases:
            raise ShapeError(f"Method {name!r} has the bases {list(by_base)}; the first one has {bases}.")
        finite([interval.mean for interval in by_base.values()], name)
    if highlight is not None and highlight not in scores:
        raise InputError(f"{highlight!r} is to be highlighted, but not drawn; the methods are {list(scores)}.")
    colours = dict(zip(bases, COLOURS, strict=False))
    thick = 0.8 / len(bases)
    with axes_or_new(ax, (COLUMN, 0.6 + (0.1 + 0.13 * len(bases)) * len(scores))) as ax:
        for row, (name, by_base) in enumerate(scores.items()):
            for index, (base, interval) in enumerate(by_base.items()):
                place = row + (index - (len(bases) - 1) / 2) * thick
                mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
                ax.barh(place, mean, height=0.9 * thick, color=blend(colours[base], 0.5), label=f"_{name} {base}")
                ends = np.isfinite([low, high]).all()
                if ends:
                    ax.plot([low, high], [place, place], color="black", linewidth=1.0, zorder=4,
                            solid_capstyle="butt", label=f"_{name} {base} interval")  # fmt: skip
                ax.annotate(f"{mean:.1f}", (max(mean, high) if ends else mean, place), xytext=(3, 0),
                            textcoords="offset points", va="center", fontsize=6)  # fmt: skip
        ax.set_yticks(range(len(scores)), list(scores))
        for tick, name in zip(ax.get_yticklabels(), scores, strict=True):
            tick.set_fontweight("bold" if name == highlight else "normal")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set(xlabel=xlabel, xlim=(0, 100), ylim=(len(scores) - 0.4, -0.6))
        ax.grid(axis="x")
        handles = [legend_key(base, blend(colours[base], 0.5), "s") for base in bases]
        ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(bases),
                  handletextpad=0.1, columnspacing=1.0, borderaxespad=0.1)  # fmt: skip
    return ax


def _looks(n: int, correct: Sequence[bool] | None, lines: bool) -> list[dict[str, Any]]:
    if correct is None:
        named = [COLOURS[index % (len(COLOURS) - 2)] for index in range(n)]
        return [{"color": colour, "line": "-", "marker": "o", "wrong": False} for colour in named]
    good: dict[str, Any] = {"color": RIGHT, "line": "-", "marker": "o", "wrong": False}
    bad: dict[str, Any] = {"color": WRONG, "line": (0, (3, 1.5)), "marker": "X" if lines else "s", "wrong": True}
    return [good if right else bad for right in correct]


def _dot(ax: Axes, x: float, y: float, look: Mapping[str, Any], marker: str, label: str, number: int | None) -> None:
    size = (4.5 if marker == "o" else 5.5) if number is None else 6.5
    ax.plot(x, y, marker, markersize=size, markerfacecolor=look["color"],
            markeredgecolor="white", markeredgewidth=0.7, zorder=5, label=label)  # fmt: skip
    if number is not None:
        ax.text(x, y, str(number), color="white", fontsize=5, ha="center", va="center_baseline", zorder=6)


def _key(label: str, colour: str, marker: str, line: Any) -> Line2D:
    return Line2D([], [], color=colour, linestyle=line, linewidth=0.9, marker=marker, markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.5, label=label)  # fmt: skip


def _array(values: ArrayLike | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _points(points: ArrayLike | Tensor, name: str) -> Float[np.ndarray, "point 2"]:
    places = finite(_array(points), name)
    if places.ndim != 2 or places.shape[1] != 2:
        raise ShapeError(f"The {name} must be [point, 2], (y, x); they are {list(places.shape)}.")
    return places


def _pixels(image: Picture) -> UInt8[np.ndarray, "height width 3"]:
    if isinstance(image, Image.Image | str | Path):
        return np.asarray(load_image(image))
    values = np.moveaxis(_array(image), 0, -1) if isinstance(image, Tensor) else image
    if values.ndim != 3 or values.shape[2] != 3:
        raise ShapeError(f"A picture must be [height, width, 3], or [3, height, width] as a tensor; it is "
                         f"{list(image.shape)}.")  # fmt: skip
    return values if values.dtype == np.uint8 else (finite(values, "picture").clip(0, 1) * 255).round().astype(np.uint8)
