"""Figures of readouts: where and when a property is readable, training curves, readouts beside their targets."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.figures.correspondence import layer_timestep_map
from interp.figures.drawing import COLOURS, COLUMN, QUIET, axes_or_new, panels, style


def readout_map(
    table: pd.DataFrame,
    *,
    value: str = "score",
    label: str = "R²",
    limits: tuple[float | int, float | int] | None = None,
    annotate: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw where in the network and when in the process a property is readable.

    Args:
        table: a row for each cell with ``site``, ``timestep`` and the value, such as one task's rows of
            `interp.readouts.readout_sweep`.
        value: which column.
        label: what the values are.
        limits: values at the two ends of the colours; the smallest and largest without it.
        annotate: write each value into its cell.
        ax: where to draw; a new figure without it.

    Returns:
        The axes; sites from top to bottom in the order of the table, timesteps rising.

    Raises:
        InputError: a column is missing, a cell is missing or there twice, or a value is not finite.
    """
    missing = [name for name in ("site", "timestep", value) if name not in table]
    if missing:
        raise InputError(f"the table has no column {missing[0]!r}: it has {', '.join(map(str, table.columns))}")
    if table.duplicated(["site", "timestep"]).any():
        raise InputError("the table has a cell twice: give the rows of one task")
    sites = list(dict.fromkeys(table["site"]))
    cells = table.pivot(index="timestep", columns="site", values=value)[sites].sort_index()
    return layer_timestep_map(
        cells.to_numpy(dtype=float),
        [float(time) for time in cells.index],
        sites,
        label=label,
        percent=False,
        limits=limits,
        annotate=annotate,
        ax=ax,
    )


def training_curves(history: pd.DataFrame, *, smooth: int = 25, ax: Axes | None = None) -> Axes:
    """Draw the loss of a training over its steps, and its validation scores on an axis of their own.

    Args:
        history: ``step``, ``loss`` and ``score``, as trainings return it.
        smooth: steps of the running mean that is drawn over the single losses.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes of the loss, which are logarithmic where all losses are positive.

    Raises:
        InputError: there is no step.
    """
    if not len(history):
        raise InputError("there is no step to draw")
    with axes_or_new(ax, (COLUMN, 2.1)) as ax:
        ax.plot(history["step"], history["loss"], color=COLOURS[0], alpha=0.25, linewidth=0.6)
        mean = history["loss"].rolling(smooth, min_periods=1).mean()
        ax.plot(history["step"], mean, color=COLOURS[0], label="loss")
        ax.set(xlabel="step", ylabel="loss")
        if (history["loss"] > 0).all():
            ax.set_yscale("log")
        scores = history.dropna(subset=["score"])
        if len(scores):
            other = ax.twinx()
            other.plot(scores["step"], scores["score"], color=COLOURS[1], marker="o", markersize=3)
            other.set_ylabel("validation score", color=COLOURS[1])
    return ax


def head_errors(table: pd.DataFrame, *, label: str = "error", ax: Axes | None = None) -> Axes:
    """Draw the error of heads by timestep between their bounds.

    Args:
        table: rows with ``head``, ``samples``, ``timestep`` and ``error``; rows without a timestep are bounds, drawn as
            lines at the mean of their largest number of samples. Other rows make a curve for each number of samples,
            with the standard error of the mean around it.
        label: what the error is.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        InputError: a column is missing, or there is no row with a timestep.
    """
    missing = [name for name in ("head", "samples", "timestep", "error") if name not in table]
    if missing:
        raise InputError(f"the table has no column {missing[0]!r}: it has {', '.join(map(str, table.columns))}")
    read = table.dropna(subset=["timestep"])
    if not len(read):
        raise InputError("no row of the table has a timestep")
    bounds = table[table["timestep"].isna()]
    with axes_or_new(ax, (COLUMN, 2.1)) as ax:
        for index, (samples, rows) in enumerate(read.groupby("samples")):
            cells = rows.groupby("timestep")["error"].agg(["mean", "sem"])
            colour = COLOURS[index % len(COLOURS)]
            ax.plot(cells.index, cells["mean"], color=colour, marker="o", markersize=3, label=f"{samples} samples")
            low, high = cells["mean"] - cells["sem"], cells["mean"] + cells["sem"]
            ax.fill_between(cells.index, low, high, color=colour, alpha=0.2, linewidth=0)
        for line, (name, rows) in zip(("--", ":", "-."), bounds.groupby("head", sort=False), strict=False):
            most = rows[rows["samples"] == rows["samples"].max()]
            ax.axhline(most["error"].mean(), color=QUIET, linestyle=line, linewidth=1, label=str(name))
        ax.set(xlabel="timestep", ylabel=label, ylim=(0, None))
        ax.legend()
    return ax


def readout_panels(
    images: Float[Tensor, "image 3 height width"],
    targets: Sequence[Tensor] | None,
    readouts: Mapping[str, Float[Tensor, "_ _ _ _"]],
    value_range: tuple[float, float] | None = None,
) -> Figure:
    """Draw pictures with their targets and readouts beside them, a row for each.

    Args:
        images: 0 to 1.
        targets: ``[channel, height, width]`` each; None: none are drawn.
        readouts: ``[image, channel, height, width]`` by the title of their column.
        value_range: least and greatest value of targets and readouts; None: of what is drawn.

    Returns:
        The figure. Maps of one or three channels are drawn as pictures; of others, the greatest channel is.

    Raises:
        ShapeError: other numbers of targets or readouts than images.
    """
    columns: dict[str, Sequence[Tensor]] = {"image": [2 * image - 1 for image in images]}
    columns |= {} if targets is None else {"target": targets}
    columns |= {title: list(maps) for title, maps in readouts.items()}
    for title, maps in columns.items():
        if len(maps) != len(images):
            raise ShapeError(f"{len(images)} images with {len(maps)} of {title!r}")
    side = COLUMN / 3
    figure, axes = panels(len(images), len(columns), width=side * len(columns), height=side * len(images))
    with style():
        for place, (title, maps) in enumerate(columns.items()):
            ends = (-1.0, 1.0) if title == "image" else value_range or _ends(maps)
            for row, one in enumerate(maps):
                ax = axes[row, place]
                ax.imshow(_picture(one, ends), cmap="gray", vmin=0, vmax=1)
                ax.set_axis_off()
                if row == 0:
                    ax.set_title(title)
    return figure


def _ends(maps: Sequence[Tensor]) -> tuple[float, float]:
    low, high = min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)
    return low, high if high > low else low + 1


def _picture(one: Tensor, ends: tuple[float, float]) -> Any:
    values = (one.detach().float().cpu() - ends[0]) / (ends[1] - ends[0])
    shown = values if len(values) in (1, 3) else values.amax(dim=0, keepdim=True)
    return np.clip(rearrange(shown.numpy(), "channel height width -> height width channel"), 0, 1)
