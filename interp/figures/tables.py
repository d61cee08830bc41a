"""Tables of numbers as pictures: heat maps, and bars with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from interp.errors import InputError, ShapeError
from interp.figures.drawing import COLUMN, axes_or_new, blend, check_known, colours_for, finite, legend_key, seed_rows


def similarity_matrix(
    matrix: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    annotate: bool = True,
    limits: tuple[float, float] | None = None,
    label: str = "cosine similarity",
    ax: Axes | None = None,
) -> Axes:
    """Draw a matrix of similarities as a heat map.

    Args:
        matrix: values [row, column].
        rows: a name for each row.
        columns: a name for each column; the row names without it.
        annotate: write each value into its cell; without it, a colour bar tells the values.
        limits: values at the two ends of the colours; without it 0 to 1, or -1 to 1 when values are negative.
        label: what the values are.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: the matrix does not fit the names.
        InputError: a value is not finite.
    """
    columns = rows if columns is None else columns
    values = _matrix(matrix, rows, columns)
    limits = limits or ((-1.0, 1.0) if values.min() < 0 else (0.0, 1.0))
    with axes_or_new(ax, (COLUMN, COLUMN * min(1.2, 0.25 + 0.75 * len(rows) / len(columns)))) as ax:
        image = _heat(ax, values, rows, columns, limits, aspect="equal")
        if annotate:
            _write_cells(ax, image, [[f"{value:z.2f}".replace("-", "−") for value in row] for row in values])
            ax.set_title(label)
        else:
            bar = ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.03)
            bar.outline.set_visible(False)
    return ax


def transfer_table(
    scores: ArrayLike,
    conditions: Sequence[str],
    tasks: Sequence[str],
    *,
    mean: bool = True,
    label: str = "accuracy",
    ax: Axes | None = None,
) -> Axes:
    """Draw the main table, conditions by tasks, as a heat map with the scores in percent written in.

    Args:
        scores: fractions [condition, task].
        conditions: a name for each row.
        tasks: a name for each column.
        mean: add a last column with the mean over tasks.
        label: what the scores are.
        ax: where to draw; a new figure of two columns without it.

    Returns:
        The axes.

    Raises:
        ShapeError: the scores do not fit the names.
        InputError: a score is not finite.
    """
    values = _matrix(scores, conditions, tasks)
    names = list(tasks)
    if mean:
        values, names = np.column_stack([values, values.mean(axis=1)]), [*names, "mean"]
    with axes_or_new(ax, (2 * COLUMN, 0.55 + 0.2 * len(conditions))) as ax:
        image = _heat(ax, values, conditions, names, (0.0, 1.0), aspect="auto")
        _write_cells(ax, image, [[f"{100 * value:.0f}" for value in row] for row in values])
        if mean:
            ax.axvline(len(tasks) - 0.5, color="white", linewidth=4)
        ax.set_title(f"{label} (%)")
    return ax


def condition_bars(
    scores: Mapping[str, ArrayLike],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    kinds: Mapping[str, str] | None = None,
    xlabel: str = "accuracy",
    xlim: tuple[float, float] | None = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Draw one bar a condition: the mean, an interval, and a dot for each task.

    Args:
        scores: condition -> values [seed, task], or [task]; the first is drawn on top.
        intervals: condition -> lower and upper end; without it, the range over seeds of the mean over tasks.
        kinds: condition -> kind, such as ``"patch"`` or ``"control"``; each kind has its colour.
        xlabel: what the values are.
        xlim: ends of the horizontal axis; None lets them follow the values.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: scores are neither [seed, task] nor [task].
        InputError: a value is not finite, or a condition has no kind.
    """
    if not scores:
        raise ShapeError("There are no conditions to draw.")
    rows = {name: seed_rows(values, name, "task") for name, values in scores.items()}
    kinds = dict.fromkeys(scores, "") if kinds is None else kinds
    check_known(kinds, scores, "kinds")
    check_known(intervals or {}, scores, "intervals")
    without = [name for name in scores if name not in kinds]
    if without:
        raise InputError(f"These conditions have no kind: {without}.")
    names = list(dict.fromkeys(kinds[name] for name in scores))
    colours = dict(zip(names, colours_for(len(names)), strict=True))
    with axes_or_new(ax, (COLUMN, 0.5 + 0.19 * len(rows))) as ax:
        for place, (name, values) in enumerate(rows.items()):
            by_seed = values.mean(axis=1)
            low, high = (intervals or {}).get(name, (by_seed.min(), by_seed.max()))
            colour = colours[kinds[name]]
            ax.barh(place, by_seed.mean(), height=0.66, color=blend(colour, 0.45), label=f"_{name}")
            ax.plot(values.mean(axis=0), np.full(values.shape[1], place), "o", markersize=2.4, color=colour,
                    alpha=0.75, markeredgewidth=0, clip_on=False, label=f"_{name} by task")  # fmt: skip
            ax.plot([low, high], [place, place], color="black", linewidth=1.1, clip_on=False, zorder=4,
                    solid_capstyle="butt", label=f"_{name} interval")  # fmt: skip
        ax.set_yticks(range(len(rows)), list(rows))
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="x")
        ax.set(xlabel=xlabel, xlim=xlim)
        if names != [""]:
            handles = [legend_key(kind, blend(colours[kind], 0.45), "s") for kind in names]
            ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names),
                      handletextpad=0.1, columnspacing=1.0, borderaxespad=0.1)  # fmt: skip
    return ax


def _matrix(values: ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> Float[np.ndarray, "row column"]:
    numbers = finite(values, "matrix")
    if numbers.shape != (len(rows), len(columns)):
        names = f"{len(rows)} names of rows and {len(columns)} of columns"
        raise ShapeError(f"The values have shape {list(numbers.shape)}, but there are {names}.")
    return numbers


def _heat(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    aspect: Literal["equal", "auto"],
) -> Any:
    colours = "RdBu_r" if limits[0] < 0 else "Blues"
    image = ax.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect=aspect)
    long = max(len(name) for name in columns) > 4 and len(columns) > 4
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(columns)), list(columns), **slant)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    return image


def _write_cells(ax: Axes, image: Any, words: Sequence[Sequence[str]]) -> None:
    size = 7 if len(words) <= 8 else 6
    for (row, column), value in np.ndenumerate(image.get_array()):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        colour = "white" if dark else "black"
        ax.text(column, row, words[row][column], ha="center", va="center", fontsize=size, color=colour)
