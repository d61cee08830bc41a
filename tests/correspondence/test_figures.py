"""Figures of correspondence hold what they were given, in marks that tell right from wrong without colour."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from interp import figures
from interp.errors import InputError, ShapeError
from interp.metrics import Interval

SOURCE, TARGET = torch.rand(3, 20, 30), torch.rand(3, 40, 40)
POINTS, PREDICTED = torch.tensor([[1.0, 2.0], [5.0, 9.0]]), torch.tensor([[3.0, 4.0], [39.0, 0.0]])


def drawn(ax: Axes, label: str) -> list:
    return [line for line in ax.lines if line.get_label() == label]


def test_matches_join_points_across_the_two_images():
    ax = figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED, true=PREDICTED - 3, correct=[True, False])
    right, wrong = drawn(ax, "_match")
    # The target is drawn at half its size, 0.9 pixels to the right of 30 columns: (p + 0.5) / 2 - 0.5 + 30.9.
    np.testing.assert_allclose(right.get_xydata(), [[2, 1], [32.65, 1.25]])
    np.testing.assert_allclose(wrong.get_xydata(), [[9, 5], [30.65, 19.25]])
    assert right.get_linestyle() != wrong.get_linestyle()
    assert right.get_color() != wrong.get_color()
    good, bad = drawn(ax, "_predicted")
    assert good.get_marker() != bad.get_marker()
    (place,) = drawn(ax, "_true")
    np.testing.assert_allclose(place.get_xydata(), [[29.15, 17.75]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["correct", "wrong", "true place"]
    ax.figure.canvas.draw()


def test_numbers_instead_of_lines():
    ax = figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED, lines=False)
    assert drawn(ax, "_match") == []
    assert [text.get_text() for text in ax.texts] == ["1", "1", "2", "2"]
    one, two = drawn(ax, "_source")
    assert one.get_markerfacecolor() != two.get_markerfacecolor()
    marked = figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED, lines=False, correct=[True, False])
    assert len({line.get_marker() for line in drawn(marked, "_predicted")}) == 2


def test_pictures_of_every_kind(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for picture in (pixels, pixels / 255, Image.fromarray(pixels), tmp_path / "a.png"):
        ax = figures.matched_points(picture, torch.from_numpy(pixels).permute(2, 0, 1), POINTS, POINTS)
        np.testing.assert_array_equal(ax.images[0].get_array(), pixels)
        np.testing.assert_array_equal(ax.images[1].get_array(), pixels)


def test_heat_map_is_layers_by_timesteps_with_the_models_t():
    values = np.random.default_rng(0).random((3, 4))
    values[1, 2] = 1.5
    ax = figures.layer_timestep_map(values, [-1, 60.0, 160])
    np.testing.assert_allclose(ax.images[0].get_array(), 100 * values.T)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["−1", "60", "160"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "2", "3", "4"]
    (frame,) = drawn(ax, "_best")
    np.testing.assert_allclose(frame.get_xydata().mean(axis=0), [0.9, 1.9])  # about column 1, row 2; closed
    assert [text.get_text() for text in ax.texts][2 * 3 + 1] == "150"
    weights = figures.layer_timestep_map(values / 10, [-1, 60, 160], [*"abcd"], percent=False, annotate=False)
    np.testing.assert_allclose(weights.images[0].get_array(), values.T / 10)
    assert list(weights.texts) == []
    ax.figure.canvas.draw()


def test_warp_panel_shows_five_pictures_in_proportion():
    warped = torch.rand(3, 8, 8)
    ax = figures.warp_panel(SOURCE, TARGET, warped, warped, warped)
    assert len(ax.images) == 5
    widths = [right - left for left, right, *_ in (image.get_extent() for image in ax.images)]
    assert widths == pytest.approx([1.5, 1.0, 1.0, 1.5, 1.0])
    np.testing.assert_allclose(ax.images[2].get_array(), warped.permute(1, 2, 0).numpy() * 255, atol=0.51)


def test_bars_and_intervals():
    missing = float("nan")
    scores = {
        "ours": {"img": Interval(0.7, 0.6, 0.8), "bbox": Interval(0.5, 0.4, 0.6)},
        "theirs": {"img": Interval(0.3, 0.2, 0.4), "bbox": Interval(0.2, missing, missing)},
    }
    ax = figures.pck_bars(scores, highlight="ours")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([70, 50, 30, 20])
    (interval,) = drawn(ax, "_ours img interval")
    assert interval.get_xdata() == pytest.approx([60, 80])
    assert drawn(ax, "_theirs bbox interval") == []
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["img", "bbox"]
    assert [text.get_text() for text in ax.texts] == ["70.0", "50.0", "30.0", "20.0"]
    assert [tick.get_fontweight() for tick in ax.get_yticklabels()] == ["bold", "normal"]


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED[:1]), ShapeError, "but 1 predicted"),
        (lambda: figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED, correct=[True]), ShapeError, "1 marks"),
        (lambda: figures.matched_points(SOURCE, TARGET, POINTS, PREDICTED, true=POINTS[0]), ShapeError, "must be"),
        (lambda: figures.matched_points(SOURCE[0], TARGET, POINTS, PREDICTED), ShapeError, "picture must be"),
        (lambda: figures.layer_timestep_map(np.ones((3, 4)), [1, 2]), ShapeError, "2 timesteps"),
        (lambda: figures.layer_timestep_map([[np.nan]], [1]), InputError, "not finite"),
        (lambda: figures.warp_panel(*[SOURCE] * 5, titles=["a"]), ShapeError, "5 panels, but 1 titles"),
        (lambda: figures.pck_bars({}), ShapeError, "no scores"),
        (lambda: figures.pck_bars({"a": {"img": Interval(1.0, 1.0, 1.0)}}, highlight="b"), InputError, "'b' is to be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(draw, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        draw()
