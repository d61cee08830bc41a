"""The look that all figures share, and what several of them need to draw."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from interp.errors import InputError, ShapeError, UnknownNameError, nearest

# Okabe and Ito's colours, told apart with any colour vision; their yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
COLUMN = 3.3
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
}
QUIET = "#5A5A5A"


@contextmanager
def style() -> Iterator[None]:
    """Hold the style of these figures while drawing something of one's own: ``with figures.style(): ...``."""
    with matplotlib.rc_context(STYLE):
        yield


def panels(
    n_rows: int = 1, n_columns: int = 1, *, width: float = COLUMN, height: float | None = None
) -> tuple[Figure, np.ndarray]:
    """Make a figure of several panels in this style, laid out without overlaps.

    Args:
        n_rows: how many panels under each other.
        n_columns: how many beside each other.
        width: of the whole figure, in inches.
        height: of the whole figure, in inches; without it each panel is about 3:2.

    Returns:
        The figure, and its axes as an array [row, column]. Set titles within `style`, or they come out in
        matplotlib's own size.
    """
    if height is None:
        height = n_rows * (width / n_columns) * 0.68
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(n_rows, n_columns, squeeze=False)


@contextmanager
def axes_or_new(ax: Axes | None, size: tuple[float, float]) -> Iterator[Axes]:
    """Give the axes to draw on: the user's, or those of a new figure of this size in inches; style held."""
    with style():
        yield Figure(figsize=size, layout="constrained").subplots() if ax is None else ax


def finite(values: ArrayLike, name: str) -> np.ndarray:
    """Turn values into floats; InputError when one is not finite."""
    numbers = np.asarray(values, dtype=float)
    if not np.isfinite(numbers).all():
        raise InputError(f"{name!r} holds values that are not finite.")
    return numbers


def seed_rows(values: ArrayLike, name: str, unit: str) -> Float[np.ndarray, "seed unit"]:
    """Turn values [seed, unit] or [unit] into floats [seed, unit]; ShapeError for any other shape."""
    numbers = finite(values, name)
    if numbers.ndim not in (1, 2) or numbers.size == 0:
        raise ShapeError(f"Values of {name!r} must be [seed, {unit}] or [{unit}]; they are {list(numbers.shape)}.")
    return np.atleast_2d(numbers)


def check_known(given: Mapping[str, Any], curves: Mapping[str, Any], what: str) -> None:
    """Raise UnknownNameError when a setting names a curve that is not drawn."""
    for name in given:
        if name not in curves:
            raise UnknownNameError(f"{what} names {name!r}, which is not drawn. {nearest(name, curves)}".rstrip())


def colours_for(n: int) -> list[Any]:
    """Pick n colours, from a rainbow when there are more than can be told apart by name."""
    if n <= len(COLOURS):
        return list(COLOURS[:n])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, n)))


def blend(colour: Any, share: float, onto: str = "#FFFFFF") -> tuple[float, ...]:
    """Mix a share of a colour onto another one."""
    return tuple(share * a + (1 - share) * b for a, b in zip(to_rgb(colour), to_rgb(onto), strict=True))


def legend_key(label: str, colour: Any, marker: str, alpha: float = 1.0) -> Line2D:
    """Make a legend entry of one marker."""
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, alpha=alpha, markeredgewidth=0)
