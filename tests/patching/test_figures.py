"""Figures of patching: what is drawn is what was measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from interp.errors import InputError, ShapeError
from interp.figures.patching import agreement_scatter, effect_line, effect_map, image_heat
from interp.patching.result import PatchingResult
from tests import worded
from tests.patching.test_result import result


def image_of(ax):
    (image,) = ax.images
    return image


def test_a_map_shows_each_mean_and_is_white_where_nothing_happens() -> None:
    values = np.array([[0.0, 0.5, 1.0], [-0.25, 0.0, 0.0]])
    ax = effect_map(values, ["a", "b"], ["0", "1", "2"])
    image = image_of(ax)
    np.testing.assert_allclose(np.asarray(image.get_array()), values)
    assert image.cmap(image.norm(0.0))[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert image.norm(0.5) - 0.5 == pytest.approx(0.5 - image.norm(-0.5))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b"]
    panels = effect_map(np.stack([values, values + 1]), ["a", "b"], ["0", "1", "2"], panels=["x", "y"], center=1.0)
    shown = np.ma.masked_invalid(image_of(panels).get_array())
    np.testing.assert_allclose(shown[:, :3], values)
    np.testing.assert_allclose(shown[:, -3:], values + 1)
    assert [text.get_text() for text in panels.texts] == ["x", "y"]
    with pytest.raises(ShapeError, match="2 rows and 2 columns"):
        effect_map(values, ["a", "b"], ["0", "1"])
    with pytest.raises(InputError, match="finite"):
        effect_map(values * np.nan, ["a", "b"], ["0", "1", "2"])


def test_results_draw_themselves_by_their_number_of_axes() -> None:
    found = result()
    ax = found.plot()
    # Tokens are rows, layers columns.
    np.testing.assert_allclose(np.asarray(image_of(ax).get_array()), found.mean().T.numpy(), atol=1e-6)
    line = found.select(position="last").plot()
    drawn = {one.get_label(): one for one in line.get_lines()}
    np.testing.assert_allclose(drawn["patched"].get_ydata(), found.mean()[:, 2].numpy(), atol=1e-6)
    np.testing.assert_allclose(
        drawn["random vector"].get_ydata(), found.control("random vector")[:, 2].numpy(), atol=1e-6
    )
    sites = {"site": ("hook_resid_post",)} | found.axes
    three = PatchingResult("x", "m", found.values[None], sites, found.clean, found.corrupt)
    assert [text.get_text() for text in three.plot().texts] == ["residual"]
    raw = PatchingResult("x", "m", found.values, {"layer": ("0", "1"), "head": ("0", "1", "2")}).plot()
    np.testing.assert_allclose(np.asarray(image_of(raw).get_array()), found.values.mean(-1).numpy(), atol=1e-6)
    # Layers go up.
    assert raw.get_ylim()[0] < raw.get_ylim()[1]
    with pytest.raises(InputError, match="select"):
        PatchingResult("x", "m", found.values[None, None], {"a": ("0",)} | sites).plot()


def test_heat_lies_on_the_image_and_is_clear_where_nothing_happens() -> None:
    values = torch.tensor([[0.0, 0.5], [0.0, -1.0]])
    ax = image_heat(worded.image("fox"), values)
    picture, heat = ax.images
    assert picture.get_extent() == heat.get_extent() == [-0.5, 15.5, 15.5, -0.5]
    np.testing.assert_allclose(np.asarray(heat.get_alpha()), [[0, 0.375], [0, 0.75]])
    (frame,) = (line for line in ax.get_lines() if line.get_label() == "_strongest")
    assert (min(frame.get_xdata()), min(frame.get_ydata())) == (7.5, 7.5)
    with pytest.raises(ShapeError, match=r"\[row, column\]"):
        image_heat(worded.image("fox"), torch.zeros(4))


def test_lines_and_agreement_refuse_what_does_not_fit() -> None:
    ax = effect_line([0.1, 0.2], ["0", "1"], interval=([0.0, 0.1], [0.2, 0.3]), controls={"random": [0.1]})
    assert {line.get_label() for line in ax.get_lines()} == {"random", "patched"}
    with pytest.raises(ShapeError, match="2 names"):
        effect_line([0.1, 0.2, 0.3], ["0", "1"])
    scatter = agreement_scatter([0.0, 1.0, 0.5], [0.1, 0.9, 0.5], groups=["a", "a", "b"], rank_correlation=1.0)
    assert [len(one.get_offsets()) for one in scatter.collections] == [2, 1]
    with pytest.raises(ShapeError, match="3 exact values, 2 estimates"):
        agreement_scatter([0.0, 1.0, 0.5], [0.1, 0.9])


def middle(ax) -> float:
    return float(image_of(ax).norm.vcenter)


def test_white_is_the_run_without_a_patch() -> None:
    found = result()
    assert middle(found.plot()) == 0
    assert middle(found.plot(normalised=False)) == pytest.approx(float(found.corrupt.mean()))
    noised = result(about={"direction": "noise"})
    assert middle(noised.plot()) == 1
    assert middle(noised.plot(normalised=False)) == pytest.approx(float(found.clean.mean()))
    # As attention knockout gives: there is a clean run alone.
    knocked = result(corrupt=None, about={})
    assert middle(knocked.plot()) == pytest.approx(float(found.clean.mean()))
    both = {float(found.clean.mean()), float(found.corrupt.mean())}
    for one, want in ((knocked, {float(found.clean.mean())}), (found, both)):
        lines = one.select(layer="0").plot(normalised=False).get_lines()
        assert {line.get_ydata()[0] for line in lines if line.get_linestyle() == ":"} == want


def test_sets_of_heads_are_drawn_as_effects() -> None:
    found = result()
    tests = {"sufficiency": "denoise", "necessity": "noise"}
    sets = PatchingResult("head sets", "m", found.values, {"test": tuple(tests), "size": ("1", "2", "3")}, found.clean,
                          found.corrupt, about={"direction": "both", "directions": tests})  # fmt: skip
    ax = sets.plot()
    want = torch.stack([sets.mean()[0], 1 - sets.mean()[1]])
    np.testing.assert_allclose(np.asarray(image_of(ax).get_array()), want.numpy(), atol=1e-6)
    assert middle(ax) == 0
    raw = sets.plot(normalised=False)
    want = torch.stack([found.values[0] - found.corrupt, found.clean - found.values[1]]).mean(-1)
    np.testing.assert_allclose(np.asarray(image_of(raw).get_array()), want.numpy(), atol=1e-6)
    picked = sets.select(test="necessity")
    needed = replace(picked, values=picked.values[None], axes={"a": ("b",), **picked.axes})
    assert middle(needed.plot()) == 1


def test_results_over_patches_are_drawn_on_their_image() -> None:
    found = result()
    axes = {"site": ("hook_resid_post",), "layer": ("0", "1"), "position": tuple("abcd")}
    about = {"direction": "noise", "grid": {"image": 0, "rows": 2, "columns": 2}}
    values = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    grid = PatchingResult("x", "m", values, axes, found.clean, found.corrupt, about=about)
    picture = worded.image("fox")
    ax = grid.select(layer="1").plot(image=picture)
    shown, heat = ax.images
    assert shown.get_extent() == [-0.5, 15.5, 15.5, -0.5]
    np.testing.assert_allclose(np.asarray(heat.get_array()), grid.mean()[0, 1].reshape(2, 2).numpy(), atol=1e-6)
    assert heat.norm.vcenter == 1
    with pytest.raises(InputError, match=r"select\(layer="):
        grid.plot(image=picture)
    with pytest.raises(InputError, match="no grid"):
        found.plot(image=picture)
