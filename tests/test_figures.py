"""Figures hold the numbers they were given, on the axes they were given, and leave matplotlib as it was."""

from collections.abc import Callable
from pathlib import Path

import jaxtyping
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from interp import figures
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.figures import curves, drawing
from interp.metrics import Interval

RANDOM = np.random.default_rng(0)
SEEDS = {"text → image": RANDOM.random((3, 5)), "image → text": RANDOM.random((3, 5))}
TASKS = ["capital", "young", "colour", "capital"]
PIXELS = [RANDOM.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(3)]

CELLS = pd.DataFrame(
    [{"site": site, "timestep": time, "score": 0.1 * time} for site in ("up.0", "up.1") for time in (1, 5)]
)
ERRORS = pd.DataFrame(
    [{"head": "readout", "samples": n, "timestep": t, "error": t / n} for n in (1, 2) for t in (5.0, 9.0, 9.0)]
    + [{"head": "mean", "samples": n, "timestep": np.nan, "error": 4.0 + n} for n in (1, 2)]
)
HISTORY = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "score": [np.nan, 0.5, 0.6]})

DRAW: dict[str, Callable[..., Axes]] = {
    "accuracy_by_layer": lambda ax=None: figures.accuracy_by_layer(SEEDS, chosen=2, ax=ax),
    "lens_phases": lambda ax=None: figures.lens_phases({"input": SEEDS["text → image"]}, ax=ax),
    "sample_efficiency": lambda ax=None: figures.sample_efficiency([1, 2, 4, 8, 16], SEEDS, ax=ax),
    "embedding_scatter": lambda ax=None: figures.embedding_scatter(
        RANDOM.random((4, 2)), TASKS, ["text", "image"] * 2, ax=ax
    ),
    "similarity_matrix": lambda ax=None: figures.similarity_matrix(np.eye(3), ["a", "b", "c"], ax=ax),
    "transfer_table": lambda ax=None: figures.transfer_table(np.eye(2), ["a", "b"], ["x", "y"], ax=ax),
    "condition_bars": lambda ax=None: figures.condition_bars(SEEDS, ax=ax),
    "image_strip": lambda ax=None: figures.image_strip(PIXELS, ["a", "b", "c"], ax=ax),
    "layer_timestep_map": lambda ax=None: figures.layer_timestep_map(RANDOM.random((3, 4)), [-1, 60, 160], ax=ax),
    "matched_points": lambda ax=None: figures.matched_points(*PIXELS[:2], [[1, 2]], [[3, 4]], correct=[False], ax=ax),
    "pck_bars": lambda ax=None: figures.pck_bars({"a": {"img": Interval(0.5, 0.4, 0.6)}}, ax=ax),
    "head_errors": lambda ax=None: figures.head_errors(ERRORS, ax=ax),
    "readout_map": lambda ax=None: figures.readout_map(CELLS, ax=ax),
    "training_curves": lambda ax=None: figures.training_curves(HISTORY, ax=ax),
    "trial_dots": lambda ax=None: figures.trial_dots({"unguided": [3.0, 5.0], "guided": [1.0, 2.0]}, ax=ax),
    "effect_map": lambda ax=None: figures.effect_map(np.eye(2), ["a", "b"], ["0", "1"], ax=ax),
    "effect_line": lambda ax=None: figures.effect_line([0.0, 1.0], ["0", "1"], controls={"random": [0.1]}, ax=ax),
    "image_heat": lambda ax=None: figures.image_heat(PIXELS[0], np.eye(2), ax=ax),
    "agreement_scatter": lambda ax=None: figures.agreement_scatter([0.0, 1.0], [0.1, 0.9], ax=ax),
    "warp_panel": lambda ax=None: figures.warp_panel(*PIXELS, *PIXELS[:2], ax=ax),
}


def line(ax: Axes, label: str) -> np.ndarray:
    (found,) = [artist for artist in ax.lines if artist.get_label() == label]
    return found.get_xydata()


def band(ax: Axes, label: str) -> np.ndarray:
    (found,) = [artist for artist in ax.collections if artist.get_label() == f"_band {label}"]
    vertices = found.get_paths()[0].vertices
    places = np.unique(vertices[:, 0])
    heights = [vertices[vertices[:, 0] == place, 1] for place in places]
    return np.array([[column.min(), column.max()] for column in heights]).T


def words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_every_figure_is_drawn_here():
    # Of several axes each: these return a figure, and have tests of their own.
    whole = {"film_strip", "panels", "readout_panels", "style"}
    functions = {name for name in figures.__all__ if callable(getattr(figures, name))} - whole
    assert functions == set(DRAW)


@pytest.mark.parametrize("name", DRAW)
def test_axes_given_are_axes_returned(name: str):
    figure, axes = figures.panels(1, 2)
    assert DRAW[name](ax=axes[0, 1]) is axes[0, 1]
    assert axes[0, 1].has_data()
    assert not axes[0, 0].has_data()
    figure.canvas.draw()


@pytest.mark.parametrize("name", DRAW)
def test_without_axes_a_figure_of_its_own_and_no_trace(name: str):
    before = matplotlib.rcParams.copy()
    ax = DRAW[name]()
    assert isinstance(ax.figure, Figure)
    assert ax.has_data()
    ax.figure.canvas.draw()
    assert matplotlib.rcParams == before
    assert plt.get_fignums() == []


def test_lines_are_means_and_bands_are_ranges():
    ax = figures.accuracy_by_layer(SEEDS, layers=[0, 2, 4, 6, 8])
    for label, values in SEEDS.items():
        np.testing.assert_allclose(line(ax, label).T, [[0, 2, 4, 6, 8], values.mean(axis=0)], rtol=1e-12)
        np.testing.assert_allclose(band(ax, label), [values.min(axis=0), values.max(axis=0)], rtol=1e-12)
    assert set(words(ax)) == set(SEEDS)


def test_given_bands_replace_the_range():
    given = np.stack([np.full(5, 0.1), np.full(5, 0.6)])
    ax = figures.accuracy_by_layer(SEEDS, bands={"image → text": given})
    np.testing.assert_allclose(band(ax, "image → text"), given)
    values = SEEDS["text → image"]
    np.testing.assert_allclose(band(ax, "text → image"), [values.min(axis=0), values.max(axis=0)])


def test_chosen_layers_are_ringed():
    ax = figures.accuracy_by_layer(SEEDS, chosen={"image → text": 3})
    expected = [[3, SEEDS["image → text"].mean(axis=0)[3]]]
    np.testing.assert_allclose(line(ax, "_chosen image → text"), expected)
    assert not [artist for artist in ax.lines if artist.get_label() == "_chosen text → image"]
    both = figures.accuracy_by_layer(SEEDS, chosen=1)
    np.testing.assert_allclose(line(both, "_chosen text → image")[0, 0], 1)


def test_references_are_dashed_levels():
    ax = figures.accuracy_by_layer(SEEDS, references={"chance": 0.25})
    np.testing.assert_allclose(line(ax, "_reference chance")[:, 1], [0.25, 0.25])
    assert "chance" in words(ax)


def test_lens_bands_are_the_middle_half():
    values = np.linspace(0, 1, 5)[:, None] * np.ones((1, 4))
    ax = figures.lens_phases({"task": values})
    np.testing.assert_allclose(band(ax, "task"), [[0.25] * 4, [0.75] * 4])
    np.testing.assert_allclose(line(ax, "task")[:, 1], 0.5)


def test_sample_counts_are_the_ticks():
    ax = figures.sample_efficiency([1, 2, 4, 8, 16], SEEDS)
    assert ax.get_xscale() == "log"
    np.testing.assert_allclose(line(ax, "text → image")[:, 0], [1, 2, 4, 8, 16])
    ax.figure.canvas.draw()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    linear = figures.sample_efficiency([0, 1, 2, 3, 4], SEEDS)
    assert linear.get_xscale() == "linear"


def test_scatter_colours_tasks_and_shapes_modalities():
    points = RANDOM.random((4, 2))
    ax = figures.embedding_scatter(
        points, TASKS, ["text", "text", "text", "image"], groups=["context", "context", "context", "vector"]
    )
    drawn = {artist.get_label(): artist for artist in ax.collections}
    assert set(drawn) == {
        "context capital text",
        "context young text",
        "context colour text",
        "vector capital image",
    }
    np.testing.assert_allclose(drawn["context young text"].get_offsets(), points[[1]])
    np.testing.assert_allclose(drawn["vector capital image"].get_offsets(), points[[3]])
    colour = {name: to_hex(artist.get_facecolor()[0]) for name, artist in drawn.items()}
    assert colour["context capital text"] == colour["vector capital image"] == figures.COLOURS[0].lower()
    assert colour["context young text"] == figures.COLOURS[1].lower()
    shape = {name: len(artist.get_paths()[0].vertices) for name, artist in drawn.items()}
    assert shape["context capital text"] != shape["vector capital image"]
    assert drawn["context capital text"].get_alpha() < drawn["vector capital image"].get_alpha()


def test_matrices_hold_and_show_their_values():
    values = np.array([[1.0, -0.25], [0.004, 0.5]])
    ax = figures.similarity_matrix(values, ["a", "b"], ["c", "d"])
    np.testing.assert_allclose(ax.images[0].get_array(), values)
    assert words(ax) == ["1.00", "−0.25", "0.00", "0.50"]
    assert ax.images[0].get_clim() == (-1, 1)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["c", "d"]
    plain = figures.similarity_matrix(abs(values), ["a", "b"], annotate=False)
    assert words(plain) == []
    assert plain.images[0].get_clim() == (0, 1)
    assert len(plain.figure.axes) == 2  # the colour bar


def test_text_in_cells_can_be_read():
    ax = figures.similarity_matrix(np.linspace(0, 1, 9).reshape(3, 3), ["a", "b", "c"])
    ax.figure.canvas.draw()
    image = ax.images[0]
    for text in ax.texts:
        column, row = (int(place) for place in text.get_position())
        cell = image.cmap(image.norm(image.get_array()[row, column]))[:3]
        # WCAG's contrast ratio for large text.
        assert contrast(cell, to_rgb(text.get_color())) > 3


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_the_table_has_a_mean_in_percent():
    ax = figures.transfer_table([[1.0, 0.5], [0.25, 0.0]], ["prompt", "control"], ["x", "y"])
    np.testing.assert_allclose(ax.images[0].get_array(), [[1, 0.5, 0.75], [0.25, 0, 0.125]])
    assert words(ax) == ["100", "50", "75", "25", "0", "12"]
    assert words(figures.transfer_table([[0.5]], ["a"], ["x"], mean=False)) == ["50"]


def test_bars_are_means_with_intervals_and_tasks():
    scores = {"patch": RANDOM.random((3, 4)), "control": RANDOM.random((3, 4))}
    ax = figures.condition_bars(scores, intervals={"control": (0.1, 0.9)}, kinds={"patch": "p", "control": "c"})
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [values.mean() for values in scores.values()])
    by_seed = scores["patch"].mean(axis=1)
    np.testing.assert_allclose(line(ax, "_patch interval")[:, 0], [by_seed.min(), by_seed.max()])
    np.testing.assert_allclose(line(ax, "_control interval")[:, 0], [0.1, 0.9])
    np.testing.assert_allclose(line(ax, "_patch by task")[:, 0], scores["patch"].mean(axis=0))
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["p", "c"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["patch", "control"]
    assert ax.yaxis_inverted()


def test_errors_of_heads_are_means_by_timestep_and_bounds_are_lines():
    ax = figures.head_errors(ERRORS)
    np.testing.assert_allclose(line(ax, "2 samples"), [[5.0, 2.5], [9.0, 4.5]])
    np.testing.assert_allclose(line(ax, "mean")[:, 1], 6.0)
    with pytest.raises(InputError, match="no column 'samples'"):
        figures.head_errors(ERRORS.drop(columns="samples"))
    with pytest.raises(InputError, match="no row of the table has a timestep"):
        figures.head_errors(ERRORS[ERRORS["head"] == "mean"])


def test_maps_and_heat_write_what_they_show():
    values = np.array([[0.5, -0.251], [1.0, -0.001]])
    ax = figures.effect_map(values, ["a", "b"], ["0", "1"], annotate=True)
    assert words(ax) == ["0.50", "−0.25", "1.00", "0.00"]
    ax.figure.canvas.draw()
    image = ax.images[0]
    for text, value in zip(ax.texts, values.flatten(), strict=True):
        assert contrast(image.cmap(image.norm(value))[:3], to_rgb(text.get_color())) > 3
    heat = figures.image_heat(PIXELS[0], values, annotate=True, bar=False)
    assert words(heat) == words(ax) and len(heat.figure.axes) == 1
    assert len(figures.image_heat(PIXELS[0], values).figure.axes) == 2  # the colour bar
    # Of the same limits, the same value is as clear in one picture as in another.
    faint, strong = (figures.image_heat(PIXELS[0], [[0.2, most]], limits=(0.0, 1.0)) for most in (0.3, 1.0))
    assert faint.images[1].get_alpha()[0, 0] == strong.images[1].get_alpha()[0, 0] == pytest.approx(0.75 * 0.2)


def test_trials_are_dots_around_their_median():
    ax = figures.trial_dots({"unguided": [3.0, 5.0, 9.0], "guided": [1.0, 2.0, 2.5]}, label="pixels")
    np.testing.assert_allclose([points.get_offsets()[:, 0] for points in ax.collections], [[3, 5, 9], [1, 2, 2.5]])
    assert [artist.get_xdata()[0] for artist in ax.lines] == [5.0, 2.0]
    assert to_hex(ax.lines[1].get_color()) == to_hex(figures.COLOURS[0]) != to_hex(ax.lines[0].get_color())
    with pytest.raises(ShapeError, match="at least one trial"):
        figures.trial_dots({"unguided": []})
    with pytest.raises(InputError, match="not finite"):
        figures.trial_dots({"unguided": [np.nan]})


def test_film_strips_draw_readouts_over_frames_and_targets_beside_them():
    images = torch.full((2, 3, 3, 8, 8), 0.5)
    readouts = torch.zeros(2, 3, 1, 4, 4)
    readouts[1, 2] = 1.0
    figure = figures.film_strip(images, ["0", "1", "2"], ["a", "b"], readouts=readouts, targets=[None, readouts[1, 2]])
    shown = np.array([ax.images[0].get_array() for ax in figure.axes]).reshape(2, 4, 8, 8, 3)
    assert (shown[0, 0] == 1).all() and not (shown[1, 0] == 1).all()  # no target, a target
    np.testing.assert_allclose(shown[0, 1:], 0.45 * 0.5 + 0.55, atol=1e-6)  # nothing is read: a paler frame
    np.testing.assert_allclose(shown[1, 3], shown[1, 0], atol=1e-6)  # read everywhere: its colour alone
    with pytest.raises(ShapeError, match="3 rows and 3 steps are named; there are 2 and 3"):
        figures.film_strip(images, ["0", "1", "2"], ["a", "b", "c"])


def test_strips_show_images_of_every_kind(tmp_path: Path):
    file = tmp_path / "image.png"
    Image.fromarray(PIXELS[2]).save(file)
    images = [PIXELS[0], Image.fromarray(PIXELS[1]), file]
    ax = figures.image_strip(images, ["Paris", "Rome", "Oslo"], correct=[True, False, True], columns=2)
    for shown, pixels in zip(ax.images, PIXELS, strict=True):
        np.testing.assert_array_equal(shown.get_array(), pixels)
    assert words(ax) == ["✓ Paris", "✗ Rome", "✓ Oslo"]
    first, second, third = (shown.get_extent() for shown in ax.images)
    assert first[2:] == second[2:]
    assert first[:2] == third[:2]
    assert ax.texts[0].get_color() != ax.texts[1].get_color()
    ax.figure.canvas.draw()  # warns, and so fails, when the font lacks the tick or the cross


def test_labels_at_line_ends_do_not_touch():
    heights = np.array([0.5, 0.5, 0.51, 0.9])
    placed = np.array(curves._spread(heights, 0.1, 0.0, 1.0))
    assert np.diff(placed).min() > 0.1 - 1e-9  # rounding
    assert placed[-1] == 0.9
    np.testing.assert_allclose(placed[:3].mean(), heights[:3].mean())
    low = curves._spread(np.array([0.0, 0.0, 0.0]), 0.1, 0.0, 1.0)
    np.testing.assert_allclose(low, [0.0, 0.1, 0.2], atol=1e-12)


def test_colours_differ_however_many():
    for n in (1, 8, 20):
        colours = {to_hex(colour) for colour in drawing.colours_for(n)}
        assert len(colours) == n


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            lambda: figures.accuracy_by_layer({"a": np.zeros((2, 2, 2))}),
            ShapeError,
            r"'a' must be \[seed, layer\]",
        ),
        (lambda: figures.accuracy_by_layer({"a": [0.0] * 3, "b": [0.0] * 4}), ShapeError, "'a': 3, 'b': 4"),
        (
            lambda: figures.accuracy_by_layer({"a": [np.nan]}),
            InputError,
            "'a' holds values that are not finite",
        ),
        (lambda: figures.accuracy_by_layer(SEEDS, chosen=7), InputError, "Chosen layer 7 of 'text → image'"),
        (lambda: figures.accuracy_by_layer(SEEDS, layers=[1, 2]), ShapeError, "2 layers, but curves of 5"),
        (
            lambda: figures.accuracy_by_layer(SEEDS, chosen={"text → imag": 1}),
            UnknownNameError,
            "Did you mean",
        ),
        (
            lambda: figures.accuracy_by_layer(SEEDS, bands={"x": [[0], [1]]}),
            UnknownNameError,
            "bands names 'x'",
        ),
        (
            lambda: figures.lens_phases({"a": [0.1, 0.2]}, bands={"a": [0.0, 1.0]}),
            ShapeError,
            r"band of 'a' must be \[2, 2\]",
        ),
        (lambda: figures.accuracy_by_layer({}), ShapeError, "no curves"),
        (lambda: figures.sample_efficiency([4, 2], {"a": [0.1, 0.2]}), InputError, "must increase"),
        (lambda: figures.embedding_scatter(np.zeros((2, 3)), ["a"] * 2, ["b"] * 2), ShapeError, r"\[2, 3\]"),
        (
            lambda: figures.embedding_scatter(np.zeros((2, 2)), ["a"], ["b"] * 2),
            ShapeError,
            "2 points, but 1 tasks",
        ),
        (
            lambda: figures.similarity_matrix(np.eye(3), ["a", "b"]),
            ShapeError,
            r"\[3, 3\], but there are 2 names",
        ),
        (lambda: figures.condition_bars({"a": [0.1]}, kinds={}), InputError, r"no kind: \['a'\]"),
        (lambda: figures.condition_bars({}), ShapeError, "no conditions"),
        (lambda: figures.image_strip([]), ShapeError, "no images"),
        (lambda: figures.image_strip(PIXELS, ["a"]), ShapeError, "3 images, but 1 titles"),
        (lambda: figures.image_strip(["/absent.png"]), InputError, "'/absent.png' cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused(draw: Callable[[], Axes], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        draw()


def test_shape_annotations_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        curves._spread(np.zeros((2, 2)), 0.1, 0.0, 1.0)
