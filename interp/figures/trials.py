"""Figures of paired trials: the same prompts and seeds under several conditions."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from interp.errors import ShapeError
from interp.figures.drawing import COLOURS, COLUMN, QUIET, axes_or_new, finite

ROW = 0.28  # inches of one condition


def trial_dots(
    values: Mapping[str, Sequence[float] | np.ndarray],
    *,
    label: str = "error",
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw every trial of every condition as a dot, and each condition's median as a line.

    Args:
        values: of each condition from top to bottom, one for each trial.
        label: what the values are.
        highlight: a condition drawn in colour; by default the first after the top one.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: no conditions, or one without trials.
        InputError: a value that is not finite.
    """
    if not values or any(len(some) == 0 for some in values.values()):
        raise ShapeError("there is nothing to draw: every condition needs at least one trial")
    names = list(values)
    chosen = highlight if highlight is not None else names[min(1, len(names) - 1)]
    with axes_or_new(ax, (COLUMN, 0.5 + ROW * len(names))) as ax:
        for row, name in enumerate(names):
            numbers = finite(values[name], name)
            # Spread evenly in the order of the trials: the same trial has the same height in every row.
            heights = row + np.linspace(-0.28, 0.28, len(numbers))
            colour = COLOURS[0] if name == chosen else QUIET
            ax.scatter(numbers, heights, s=5, color=colour, alpha=0.55, linewidths=0)
            middle = float(np.median(numbers))
            ax.plot([middle, middle], [row - 0.38, row + 0.38], color=colour, linewidth=1.8)
            ax.annotate(f" {middle:.3g}", (middle, row - 0.3), fontsize=7, color=colour, va="center")
        ax.set(yticks=range(len(names)), xlabel=label, ylim=(len(names) - 0.45, -0.55))
        ax.set_yticklabels(names)
    return ax
