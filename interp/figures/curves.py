"""Lines over layers or numbers of examples, each in a band."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from interp.errors import InputError, ShapeError
from interp.figures.drawing import (
    COLUMN,
    MARKERS,
    QUIET,
    axes_or_new,
    blend,
    check_known,
    colours_for,
    finite,
    seed_rows,
)


def accuracy_by_layer(
    curves: Mapping[str, ArrayLike],
    *,
    bands: Mapping[str, ArrayLike] | None = None,
    chosen: int | Mapping[str, int] | None = None,
    references: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    ylabel: str = "accuracy",
    ylim: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw one line a condition over layers: the mean over seeds, in a band.

    Args:
        curves: label -> values [seed, layer], or [layer].
        bands: label -> lower and upper ends [2, layer]; without it, the range over seeds.
        chosen: the layer to mark with a ring, one for all curves or one a label.
        references: label -> level of a dashed line, such as chance.
        layers: the number of each layer on the axis; 0, 1, ... without it.
        ylabel: what the values are.
        ylim: ends of the vertical axis; None lets them follow the values.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: curves, bands or layers do not fit each other.
        InputError: a chosen layer was not drawn, or a value is not finite.
    """
    with axes_or_new(ax, (COLUMN, 2.1)) as ax:
        drawn = _curves(ax, curves, bands, layers, "layer")
        marks = chosen if isinstance(chosen, Mapping) else dict.fromkeys(curves, chosen)
        check_known(marks, curves, "chosen")
        for label, layer in marks.items():
            if layer is not None:
                _ring(ax, drawn[label], layer, label)
        _finish_curves(ax, drawn, references, ylim)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.set(xlabel="layer", ylabel=ylabel)
    return ax


def lens_phases(
    probabilities: Mapping[str, ArrayLike],
    *,
    bands: Mapping[str, ArrayLike] | None = None,
    layers: Sequence[int] | None = None,
    ylabel: str = "probability",
    ylim: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw what the residual stream decodes to, layer by layer: the input, then the task, then the answer.

    Args:
        probabilities: phase -> probabilities [prompt, layer], or [layer], in the order of the phases.
        bands: phase -> lower and upper ends [2, layer]; without it, the middle half of the prompts.
        layers: the number of each layer on the axis; 0, 1, ... without it.
        ylabel: what the values are.
        ylim: ends of the vertical axis; None lets them follow the values.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: phases, bands or layers do not fit each other.
        InputError: a value is not finite.
    """
    with axes_or_new(ax, (COLUMN, 1.9)) as ax:
        if bands is None:
            rows = {name: seed_rows(values, name, "layer") for name, values in probabilities.items()}
            bands = {name: np.quantile(values, [0.25, 0.75], axis=0) for name, values in rows.items()}
        drawn = _curves(ax, probabilities, bands, layers, "layer")
        _finish_curves(ax, drawn, None, ylim)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.set(xlabel="layer", ylabel=ylabel)
    return ax


def sample_efficiency(
    counts: Sequence[int],
    curves: Mapping[str, ArrayLike],
    *,
    bands: Mapping[str, ArrayLike] | None = None,
    references: Mapping[str, float] | None = None,
    xlabel: str = "examples",
    ylabel: str = "accuracy",
    ylim: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw how a score grows with the number of examples.

    Args:
        counts: numbers of examples [n], increasing; drawn to base 2 when they span a factor of 8 or more.
        curves: label -> values [seed, n], or [n].
        bands: label -> lower and upper ends [2, n]; without it, the range over seeds.
        references: label -> level of a dashed line, such as the few-shot prompt.
        xlabel: what is counted.
        ylabel: what the values are.
        ylim: ends of the vertical axis; None lets them follow the values.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: counts, curves and bands do not fit each other.
        InputError: the counts do not increase, or a value is not finite.
    """
    if any(later <= earlier for earlier, later in pairwise(counts)) or min(counts) < 0:
        raise InputError(f"The counts of examples must increase from 0 or more; they are {list(counts)}.")
    with axes_or_new(ax, (COLUMN, 2.1)) as ax:
        drawn = _curves(ax, curves, bands, counts, "count")
        for curve, marker in zip(drawn.values(), MARKERS, strict=False):
            curve.line.set_marker(marker)
        _finish_curves(ax, drawn, references, ylim)
        if counts[0] > 0 and counts[-1] >= 8 * counts[0]:
            ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(list(counts)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


@dataclass(frozen=True)
class _Curve:
    places: list[int]
    heights: list[float]
    line: Line2D


def _curves(
    ax: Axes,
    curves: Mapping[str, ArrayLike],
    bands: Mapping[str, ArrayLike] | None,
    places: Sequence[int] | None,
    unit: str,
) -> dict[str, _Curve]:
    if not curves:
        raise ShapeError("There are no curves to draw.")
    rows = {name: seed_rows(values, name, unit) for name, values in curves.items()}
    lengths = {name: values.shape[1] for name, values in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ShapeError(f"Curves must have one value for each {unit}, as many in each; they have {lengths}.")
    length = next(iter(lengths.values()))
    places = range(length) if places is None else places
    if len(places) != length:
        raise ShapeError(f"There are {len(places)} {unit}s, but curves of {length} values.")
    check_known(bands or {}, curves, "bands")
    drawn = {}
    for (name, values), colour in zip(rows.items(), colours_for(len(rows)), strict=True):
        low, high = values.min(axis=0), values.max(axis=0)
        if bands is not None and name in bands:
            ends = finite(bands[name], name)
            if ends.shape != (2, length):
                raise ShapeError(f"The band of {name!r} must be [2, {length}]; it is {list(ends.shape)}.")
            low, high = ends
        ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0, label=f"_band {name}")
        heights = values.mean(axis=0)
        (line,) = ax.plot(places, heights, color=colour, label=name, zorder=3)
        drawn[name] = _Curve(list(places), heights.tolist(), line)
    return drawn


def _ring(ax: Axes, curve: _Curve, place: int, label: str) -> None:
    if place not in curve.places:
        raise InputError(f"Chosen layer {place} of {label!r} was not drawn; the layers are {curve.places}.")
    height = curve.heights[curve.places.index(place)]
    ring: dict[str, Any] = {
        "color": "white",
        "markeredgecolor": curve.line.get_color(),
        "markeredgewidth": 1.3,
        "zorder": 4,
    }
    ax.plot([place], [height], "o", markersize=6, label=f"_chosen {label}", **ring)


def _finish_curves(
    ax: Axes,
    drawn: Mapping[str, _Curve],
    references: Mapping[str, float] | None,
    ylim: tuple[float, float] | None,
) -> None:
    ends = {name: (curve.heights[-1], curve.line.get_color()) for name, curve in drawn.items()}
    for name, level in (references or {}).items():
        ax.axhline(level, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1, label=f"_reference {name}")
        ends[name] = (level, QUIET)
    if ylim is not None:
        # Room for lines that run along an end of the scale.
        margin = 0.03 * (ylim[1] - ylim[0])
        ax.set_ylim(ylim[0] - margin, ylim[1] + margin)
    ax.grid(axis="y")
    ax.margins(x=0.02)
    _label_ends(ax, ends)


def _label_ends(ax: Axes, ends: Mapping[str, tuple[float, Any]]) -> None:
    bottom, top = ax.get_ylim()
    size = 7.0
    gap = 1.25 * size / 72 / (ax.bbox.height / ax.figure.dpi) * (top - bottom)
    ordered = sorted(ends, key=lambda name: ends[name][0])
    heights = _spread(np.array([ends[name][0] for name in ordered]), gap, bottom, top)
    for name, height in zip(ordered, heights, strict=True):
        colour = blend(ends[name][1], 0.8, onto="#000000")
        ax.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=colour,
            annotation_clip=False,
        )


def _spread(heights: Float[np.ndarray, " label"], gap: float, bottom: float, top: float) -> list[float]:
    from sklearn.isotonic import isotonic_regression

    # The sorted heights closest to the wanted ones that keep the gap: isotonic once the gaps are taken out.
    steps = gap * np.arange(len(heights))
    highest = max(bottom, top - steps[-1])
    return (isotonic_regression(heights - steps, y_min=bottom, y_max=highest) + steps).tolist()
