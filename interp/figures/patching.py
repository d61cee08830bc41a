"""Figures of patching experiments: maps over layers and tokens, lines with intervals, heat over an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from interp.errors import InputError, ShapeError
from interp.figures.drawing import COLOURS, COLUMN, QUIET, axes_or_new, finite
from interp.images import ImageLike, load_image

# Vermilion below, blue above, white where a patch does nothing.
DIVERGING = LinearSegmentedColormap.from_list("patching", [COLOURS[1], "#F4C9A8", "#FFFFFF", "#A9CFE6", COLOURS[0]])
_MAX_LABELS = 48
_SITES = {"hook_resid_pre": "residual", "hook_resid_post": "residual", "hook_attn_out": "attention",
          "hook_mlp_out": "MLP"}  # fmt: skip


def effect_map(
    values: ArrayLike | Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    panels: Sequence[str] = (),
    center: float = 0.0,
    limits: tuple[float, float] | None = None,
    xlabel: str = "layer",
    ylabel: str = "",
    label: str = "effect",
    lower: bool = False,
    annotate: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the effect of patching for each row and column, such as token and layer; several maps beside each other.

    Args:
        values: [row, column], or [panel, row, column].
        rows: their names, from top to bottom.
        columns: their names.
        panels: their titles, such as kinds of sites.
        center: the value of a patch that does nothing, which is white.
        limits: values at the two ends of the colours; without it, as far as the values reach on either side.
        xlabel: what the columns are.
        ylabel: what the rows are.
        label: what the values are.
        lower: whether the first row is at the bottom, as for layers.
        annotate: write the values into the cells.
        ax: where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ShapeError: values that do not fit the names.
        InputError: a value that is not finite.

    Source: Meng et al. 2022, figure 1 (tokens by layers, white where nothing is restored).
    """
    numbers = finite(_array(values), "values")
    maps = numbers[None] if numbers.ndim == 2 else numbers
    if maps.shape != (max(1, len(panels)), len(rows), len(columns)) or maps.size == 0:
        raise ShapeError(f"Values are [panel, row, column]; they have shape {list(numbers.shape)}, but there are "
                         f"{len(panels)} panels, {len(rows)} rows and {len(columns)} columns.")  # fmt: skip
    n_panels, n_rows, n_columns = maps.shape
    gap = max(1, round(0.06 * n_columns)) if n_panels > 1 else 0
    sheet = np.full((n_rows, n_panels * (n_columns + gap) - gap), np.nan)
    lefts = [panel * (n_columns + gap) for panel in range(n_panels)]
    for left, one in zip(lefts, maps, strict=True):
        sheet[:, left : left + n_columns] = one
    labels_wide = 0.055 * max(map(len, rows)) + 0.9
    width = min(2 * COLUMN + 0.4, max(COLUMN, labels_wide + 0.16 * sheet.shape[1]))
    height = min(7.0, 0.75 + 0.15 * n_rows)
    with axes_or_new(ax, (width, max(1.9, height))) as ax:
        image = ax.imshow(np.ma.masked_invalid(sheet), cmap=DIVERGING, norm=_norm(maps, center, limits), aspect="auto",
                          interpolation="none", origin="lower" if lower else "upper")  # fmt: skip
        step = -(-n_columns * n_panels // 24)
        shown = [column for column in range(n_columns) if column % step == 0]
        long = max(len(columns[column]) for column in shown) > 3
        ax.set_xticks([left + column for left in lefts for column in shown],
                      [columns[column] for column in shown] * n_panels, rotation=90 if long else 0)  # fmt: skip
        row_step = -(-n_rows // _MAX_LABELS)
        ax.set_yticks(range(0, n_rows, row_step), list(rows)[::row_step])
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.tick_params(length=0, pad=2)
        ax.spines[:].set_visible(False)
        bottom, top = ax.get_ylim()
        for left in lefts:
            frame = np.array([-0.5, n_columns - 0.5])[[0, 1, 1, 0, 0]] + left
            ax.plot(frame, np.array([bottom, top])[[0, 0, 1, 1, 0]], color="#B4B4B4", linewidth=0.6, clip_on=False,
                    label="_frame")  # fmt: skip
        for left, title in zip(lefts, panels, strict=False):
            ax.text(left + (n_columns - 1) / 2, top, title, ha="center", va="bottom", fontsize=7.5)
        ax.set_ylim(bottom, top)
        if annotate:
            for left, one in zip(lefts, maps, strict=True):
                for (row, column), value in np.ndenumerate(one):
                    _write(ax, image, float(left + column), float(row), float(value))
        _bar(ax, image, label, maps, center, limits)
    return ax


def effect_line(
    means: ArrayLike | Tensor,
    names: Sequence[str],
    *,
    interval: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
    controls: Mapping[str, ArrayLike | Tensor] | None = None,
    baselines: Mapping[str, float] | None = None,
    xlabel: str = "layer",
    label: str = "effect",
    ax: Axes | None = None,
) -> Axes:
    """Draw the effect of patching along one axis, such as layers, with its interval and its controls.

    Args:
        means: one for each name.
        names: along the axis.
        interval: low and high ends, one for each name.
        controls: dashed lines, one value for each name, or one for all.
        baselines: dotted levels, such as the clean and the corrupt run.
        xlabel: what the names are.
        label: what the values are.
        ax: where to draw; a new figure of one column without it.

    Returns:
        The axes.

    Raises:
        ShapeError: not as many values as names.
        InputError: a value that is not finite.
    """
    places = np.arange(len(names))
    values = _along(means, places, "means")
    words = any(not name.lstrip("-").isdigit() for name in names)
    with axes_or_new(ax, (COLUMN, 2.1)) as ax:
        for name, level in (baselines or {}).items():
            ax.axhline(level, color="#B4B4B4", linestyle=":", linewidth=1, zorder=1)
            ax.annotate(name, (1, level), xycoords=("axes fraction", "data"), xytext=(3, 0), fontsize=7, color=QUIET,
                        textcoords="offset points", va="center")  # fmt: skip
        marker = "o" if len(names) <= 40 else ""
        for index, (name, line) in enumerate((controls or {}).items()):
            ax.plot(places, _along(line, places, name), color=COLOURS[(index + 6) % len(COLOURS)], linestyle="--",
                    linewidth=1, label=name, alpha=0.7)  # fmt: skip
        if interval is not None:
            low, high = (_along(end, places, "interval") for end in interval)
            ax.fill_between(places, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="_interval")
        ax.plot(places, values, color=COLOURS[0], marker=marker, markersize=3, label="patched", clip_on=False)
        step = -(-len(names) // (_MAX_LABELS if words else 16))
        long = words and max(map(len, names)) > 4
        ax.set_xticks(places[::step], list(names)[::step], rotation=90 if long else 0)
        ax.set(xlabel=xlabel, ylabel=label)
        ax.grid(axis="y")
        if controls:
            ax.legend(loc="best", handlelength=1.8)
    return ax


def image_heat(
    image: ImageLike | np.ndarray,
    values: ArrayLike | Tensor,
    *,
    center: float = 0.0,
    limits: tuple[float, float] | None = None,
    label: str = "effect",
    opacity: float = 0.75,
    frame: bool = True,
    annotate: bool = False,
    bar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the effect of each patch of an image over that image, grey below the colours.

    Args:
        image: a picture, a file, or an array [height, width, 3].
        values: [row, column] of the patches, from the top left.
        center: the value of a patch that does nothing, which is left clear.
        limits: values at the two ends of the colours.
        label: what the values are.
        opacity: of the strongest colour; others are the clearer, the less they do.
        frame: outline the patch with the largest effect.
        annotate: write the values onto the patches.
        bar: whether to draw a bar of the colours; pictures of the same limits need one in all.
        ax: where to draw; a new figure without it.

    Returns:
        The axes, in pixels of the image.

    Raises:
        ShapeError: values that are not [row, column].
        InputError: a file that cannot be read, or a value that is not finite.
    """
    numbers = finite(_array(values), "values")
    if numbers.ndim != 2 or numbers.size == 0:
        raise ShapeError(f"Values are [row, column] of the image's patches; they have shape {list(numbers.shape)}.")
    picture = _picture(image)
    height, width = picture.shape[:2]
    tall, wide = height / numbers.shape[0], width / numbers.shape[1]
    norm = _norm(numbers, center, limits)
    size = (COLUMN * 0.72, COLUMN * 0.55 * height / width + 0.1)
    with axes_or_new(ax, size) as ax:
        box = (-0.5, width - 0.5, height - 0.5, -0.5)
        grey = picture @ np.array([0.299, 0.587, 0.114])
        ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=box, interpolation="none")
        strength = np.abs(numbers - center)
        # Clear where a patch does nothing, and alike in pictures of the same limits.
        alpha = opacity * np.clip(2 * np.abs(np.asarray(norm(numbers)) - 0.5), 0, 1)
        ax.imshow(numbers, cmap=DIVERGING, norm=norm, extent=box, interpolation="none", alpha=alpha)
        if frame:
            row, column = np.unravel_index(strength.argmax(), numbers.shape)
            x, y = column * wide - 0.5, row * tall - 0.5
            ax.plot([x, x + wide, x + wide, x, x], [y, y, y + tall, y + tall, y], color="black", linewidth=1.1,
                    label="_strongest", solid_joinstyle="miter", clip_on=False)  # fmt: skip
        colours = ScalarMappable(norm, DIVERGING)
        if annotate:
            for (row, column), value in np.ndenumerate(numbers):
                place = (column + 0.5) * wide - 0.5, (row + 0.5) * tall - 0.5
                _write(ax, colours, *place, float(value), outline=True)
        ax.axis("off")
        if bar:
            _bar(ax, colours, label, numbers, center, limits)
    return ax


def agreement_scatter(
    exact: ArrayLike | Tensor,
    estimates: ArrayLike | Tensor,
    *,
    groups: Sequence[str] | None = None,
    label: str = "effect",
    rank_correlation: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw estimated effects against exact ones, a dot for each patch, and the line where they agree.

    Args:
        exact: of each patch.
        estimates: in the same order.
        groups: what each patch is, such as its site; each has a colour.
        label: what the values are.
        rank_correlation: written into the corner.
        ax: where to draw; a new figure without it.

    Returns:
        The axes.

    Raises:
        ShapeError: not as many estimates, or groups, as exact values.
        InputError: a value that is not finite.
    """
    across, up = finite(_array(exact), "exact").ravel(), finite(_array(estimates), "estimates").ravel()
    kinds = [""] * len(across) if groups is None else list(groups)
    if len(across) != len(up) or len(kinds) != len(across):
        raise ShapeError(f"There are {len(across)} exact values, {len(up)} estimates and {len(kinds)} groups.")
    names = list(dict.fromkeys(kinds))
    with axes_or_new(ax, (COLUMN * 0.8, COLUMN * 0.72)) as ax:
        both = np.concatenate([across, up])
        ends = np.array([both.min(), both.max()])
        ax.plot(ends, ends, color="#B4B4B4", linestyle=":", linewidth=1, zorder=1, label="_agree")
        for index, name in enumerate(names):
            chosen = [kind == name for kind in kinds]
            ax.scatter(across[chosen], up[chosen], s=12, alpha=0.7, linewidths=0, label=name or "_cells",
                       color=COLOURS[index % len(COLOURS)])  # fmt: skip
        ax.set(xlabel=f"exact {label}", ylabel=f"estimated {label}")
        ax.grid()
        if rank_correlation is not None:
            ax.text(0.97, 0.04, f"rank correlation {rank_correlation:.2f}", transform=ax.transAxes, ha="right",
                    fontsize=7, color=QUIET)  # fmt: skip
        if any(names):
            ax.legend(loc="upper left", handletextpad=0.1, borderaxespad=0.2)
    return ax


def draw(
    result: Any, ax: Axes | None, normalised: bool, picture: ImageLike | np.ndarray | None = None, **options: Any
) -> Axes:
    """Draw a `interp.patching.result.PatchingResult`; see its ``plot``."""
    axes = dict(result.axes)
    if picture is not None:
        return _on_image(result, ax, normalised, picture, options)
    if not 1 <= len(axes) <= 3:
        raise InputError(f"{result.name} has the axes {list(axes)}: result.select(...) keeps one name of some of them")
    if len(axes) == 1:
        options = {"label": _label(result, normalised)} | options
        means = result.mean(normalised)
        ((name, names),) = axes.items()
        shades = result.interval(normalised=normalised) if result.n_examples > 1 else None
        controls = {what: result.control(what, normalised) for what in result.controls}
        runs = {name: end for name, end in (("clean", result.clean), ("corrupt", result.corrupt)) if end is not None}
        levels = {name: float(end.mean()) for name, end in runs.items()}
        band = shades and (shades.low, shades.high)
        given = {"interval": band, "controls": controls, "xlabel": name,
                 "baselines": {"clean": 1.0, "corrupt": 0.0} if normalised else levels}  # fmt: skip
        return effect_line(means, names, **{**given, **options}, ax=ax)
    means, base, label = _centred(result, normalised)
    options = {"label": label} | options
    *first, row, column = axes
    if column == "position":
        # Tokens read best as rows.
        row, column, means = column, row, means.transpose(-1, -2)
    panels = axes[first[0]] if first else ()
    short = [_SITES.get(name, name) for name in panels]
    shown = short if len(set(short)) == len(short) else panels
    given = {"panels": shown, "center": base, "xlabel": column, "ylabel": row, "lower": row == "layer"}
    return effect_map(means, axes[row], axes[column], **{**given, **options}, ax=ax)


def _label(result: Any, normalised: bool) -> str:
    return f"{result.metric}\n(0 = corrupt, 1 = clean)" if normalised else result.metric


def _centred(result: Any, normalised: bool) -> tuple[Tensor, float, str]:
    """The means, the value of a patch that does nothing, and what the values are; effects where that value varies."""
    unpatched = result.unpatched(normalised)
    if unpatched is None:
        return result.mean(normalised), 0.0, _label(result, normalised)
    levels = unpatched.mean(dim=-1)
    if levels.numel() == 1:
        return result.mean(normalised), float(levels), _label(result, normalised)
    what = "(0 = no effect, 1 = as the other run)" if normalised else "(towards the other run)"
    return result.effects(normalised).mean(dim=-1), 0.0, f"effect on {result.metric}\n{what}"


def _on_image(
    result: Any, ax: Axes | None, normalised: bool, picture: ImageLike | np.ndarray, options: Mapping[str, Any]
) -> Axes:
    """One value for each patch of an image, on the image."""
    grid = result.about.get("grid")
    if grid is None or "position" not in result.axes:
        raise InputError(f"{result.name}: the positions are no grid of an image; patching.image_patches makes one")
    several = [axis for axis, names in result.axes.items() if axis != "position" and len(names) > 1]
    if several:
        wanted = ", ".join(f"{axis}=..." for axis in several)
        raise InputError(f"an image shows one value for each patch: result.select({wanted}).plot(image=...)")
    means, base, label = _centred(result, normalised)
    values = means.reshape(grid["rows"], grid["columns"])
    return image_heat(picture, values, **{"center": base, "label": label, **options}, ax=ax)


def _norm(values: np.ndarray, center: float, limits: tuple[float, float] | None) -> TwoSlopeNorm:
    """Colours as far from white on both sides for equal distances."""
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    reach = max(abs(low - center), abs(high - center), 1e-9)
    return TwoSlopeNorm(center, center - reach, center + reach)


def _bar(
    ax: Axes, image: Any, label: str, values: np.ndarray, center: float, limits: tuple[float, float] | None
) -> None:
    """A colour bar that reaches as far as the values, or the limits, do."""
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    low, high = min(low, center), max(high, center)
    bar = ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.03, aspect=18)
    if high > low:
        bar.ax.set_ylim(low, high)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


def _write(ax: Axes, colours: ScalarMappable, x: float, y: float, value: float, outline: bool = False) -> None:
    """A value in its cell; over a picture its letters have an outline."""
    red, green, blue, _ = colours.to_rgba(np.array([value]))[0]
    dark = not outline and 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
    # A value that rounds to nothing has no sign.
    words = f"{round(float(value), 2) + 0.0:.2f}".replace("-", "−")
    text = ax.text(x, y, words, ha="center", va="center", fontsize=5.5, color="white" if dark else "black")
    if outline:
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])


def _along(values: ArrayLike | Tensor, places: np.ndarray, name: str) -> Float[np.ndarray, " place"]:
    line = finite(_array(values), name)
    if line.size == 1:
        return np.full(len(places), float(line.ravel()[0]))
    if line.shape != places.shape:
        raise ShapeError(f"There are {len(places)} names, but {name!r} has shape {list(line.shape)}.")
    return line


def _picture(image: ImageLike | np.ndarray) -> Float[np.ndarray, "height width 3"]:
    if isinstance(image, np.ndarray):
        return image.astype(float) / (255 if image.dtype == np.uint8 else 1)
    loaded = image if isinstance(image, Image.Image) else load_image(Path(image))
    return np.asarray(loaded.convert("RGB"), dtype=float) / 255


def _array(values: ArrayLike | Tensor) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
