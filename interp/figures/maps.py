"""Maps of activations in two dimensions."""

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from interp.errors import ShapeError
from interp.figures.drawing import COLUMN, MARKERS, QUIET, axes_or_new, colours_for, finite, legend_key


def embedding_scatter(
    points: ArrayLike,
    tasks: Sequence[str],
    modalities: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a two-dimensional map of activations, such as a t-SNE: colour is the task, marker the modality.

    Args:
        points: coordinates [point, 2].
        tasks: the task of each point; colours follow the order in which tasks first appear.
        modalities: the modality of each point.
        groups: what each point is, such as ``"context"`` or ``"task vector"``. The last group is drawn
            in full colour and on top, the others pale.
        legend: whether to write what the colours and markers mean, right of the map.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes; one collection of points for each group, task and modality, labelled with all three.

    Raises:
        ShapeError: the points are not [point, 2], or a list of labels has another length.
    """
    where = finite(points, "points")
    if where.ndim != 2 or where.shape[1] != 2:
        raise ShapeError(f"Points must be [point, 2]; they have shape {list(where.shape)}.")
    groups = [""] * len(where) if groups is None else groups
    for kind, given in {"tasks": tasks, "modalities": modalities, "groups": groups}.items():
        if len(given) != len(where):
            raise ShapeError(f"There are {len(where)} points, but {len(given)} {kind}.")
    labels = list(zip(groups, tasks, modalities, strict=True))
    task_names, modality_names, group_names = (list(dict.fromkeys(x)) for x in (tasks, modalities, groups))
    colours = dict(zip(task_names, colours_for(len(task_names)), strict=True))
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(modality_names)}
    looks = {name: _group_look(index, len(group_names)) for index, name in enumerate(group_names)}
    with axes_or_new(ax, (COLUMN, 2.3)) as ax:
        for group, task, modality in itertools.product(group_names, task_names, modality_names):
            members = [label == (group, task, modality) for label in labels]
            if any(members):
                name = f"{group} {task} {modality}".strip()
                look = {"color": colours[task], "marker": markers[modality]} | looks[group]
                ax.scatter(*where[members].T, label=name, **look)
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set(visible=True, color="#B4B4B4")
        if legend:
            handles = [legend_key(name, colours[name], "o") for name in task_names]
            if len(modality_names) > 1:
                handles += [
                    legend_key("", "none", "o"),
                    *(legend_key(name, QUIET, markers[name]) for name in modality_names),
                ]
            if len(group_names) > 1:
                handles += [legend_key("", "none", "o")]
                handles += [legend_key(name, QUIET, "o", looks[name]["alpha"]) for name in group_names]
            ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.1,
                      labelspacing=0.35, borderaxespad=0.3)  # fmt: skip
    return ax


def _group_look(index: int, n: int) -> dict[str, Any]:
    if index == n - 1:
        return {"alpha": 0.95, "s": 20, "linewidths": 0.3, "edgecolor": "white", "zorder": 3}
    return {"alpha": 0.3, "s": 12, "linewidths": 0, "zorder": 2}
