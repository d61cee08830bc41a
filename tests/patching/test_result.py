"""Results: scales, intervals, selections, tables, files."""

import numpy as np
import pytest
import torch

from interp.errors import InputError, ShapeError, UnknownNameError
from interp.metrics import bootstrap_interval
from interp.patching.result import PatchingResult


def result(**changes) -> PatchingResult:
    """Two layers, three positions, five examples."""
    g = torch.Generator().manual_seed(0)
    given = {
        "name": "activation",
        "metric": "logit difference",
        "values": torch.randn(2, 3, 5, generator=g),
        "axes": {"layer": ("0", "1"), "position": ("image[0]", "question", "last")},
        "clean": 3 + torch.rand(5, generator=g),
        "corrupt": -1 - torch.rand(5, generator=g),
        "controls": {
            "random vector": torch.randn(2, 3, 5, generator=g),
            "random site": torch.randn(4, 2, 1, 5, generator=g),
        },
        "about": {"direction": "denoise", "seed": 3},
    }
    return PatchingResult(**(given | changes))


def test_corrupt_is_zero_and_clean_is_one_example_by_example() -> None:
    found = result()
    want = (found.values - found.corrupt) / (found.clean - found.corrupt)
    torch.testing.assert_close(found.normalised(), want)
    torch.testing.assert_close(found.mean(), want.mean(-1))
    torch.testing.assert_close(found.mean(normalised=False), found.values.mean(-1))
    flat = result(values=found.clean.expand(2, 3, 5))
    torch.testing.assert_close(flat.normalised(), torch.ones(2, 3, 5))
    torch.testing.assert_close(
        found.control("random site"), found.normalised(found.controls["random site"]).mean((0, -1))
    )
    assert found.control("random site").shape == (2, 1)
    with pytest.raises(InputError, match=r"same logit difference in example\(s\) \[1\]"):
        clean = found.clean.clone()
        clean[1] = found.corrupt[1]
        result(clean=clean).normalised()
    with pytest.raises(InputError, match="no scale"):
        result(clean=None).mean()
    with pytest.raises(UnknownNameError, match="no control 'random'"):
        found.control("random")


def test_intervals_are_percentiles_of_means_over_drawn_examples() -> None:
    found = result()
    mean, low, high = found.interval(0.9, seed=1)
    torch.testing.assert_close(mean, found.mean())
    assert (low < mean).all() and (mean < high).all()
    other = bootstrap_interval(found.normalised()[1, 2].numpy(), seed=0, confidence=0.9)
    # Both draw 2000 times; quantiles of such means vary by some hundredths of the interval.
    assert abs(float(low[1, 2]) - other.low) < 0.15 * (other.high - other.low)
    assert abs(float(high[1, 2]) - other.high) < 0.15 * (other.high - other.low)
    assert torch.equal(found.interval(0.9, seed=1).low, low) and not torch.equal(found.interval(0.9, seed=2).low, low)
    with pytest.raises(InputError, match="two or more"):
        PatchingResult("x", "m", torch.zeros(1, 1), {"layer": ("0",)}).interval(normalised=False)
    with pytest.raises(InputError, match="level=95"):
        found.interval(95.0)


def test_select_keeps_one_name_and_its_controls() -> None:
    found = result()
    picked = found.select(position="last")
    assert picked.axes == {"layer": ("0", "1")} and torch.equal(picked.values, found.values[:, 2])
    assert torch.equal(picked.controls["random vector"], found.controls["random vector"][:, 2])
    assert torch.equal(picked.controls["random site"], found.controls["random site"][:, :, 0])
    assert torch.equal(found.select(layer=-1, position=0).values, found.values[1, 0])
    with pytest.raises(UnknownNameError, match="the axes are layer, position"):
        found.select(head=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'question'"):
        found.select(position="questions")


def test_tables_hold_every_cell_or_every_example() -> None:
    found = result()
    table = found.to_dataframe()
    assert list(table.columns) == ["layer", "position", "value", "normalised", "low", "high", "control random vector",
                                   "control random site"]  # fmt: skip
    row = table[(table.layer == "1") & (table.position == "last")].iloc[0]
    assert np.isclose(row.normalised, found.mean()[1, 2]) and np.isclose(row.value, found.values[1, 2].mean())
    assert np.isclose(row["control random site"], found.control("random site")[1, 0])
    by_example = found.to_dataframe(examples=True)
    assert len(by_example) == 30
    one = by_example[(by_example.layer == "1") & (by_example.position == "question") & (by_example.example == 3)]
    assert np.isclose(one.value.item(), found.values[1, 1, 3])
    single = PatchingResult("x", "m", torch.tensor([[2.0]]), {"layer": ("0",)}).to_dataframe()
    assert np.isnan(single.low.item()) and single.value.item() == 2


def test_saved_results_come_back_and_damage_is_named(tmp_path) -> None:
    found = result()
    found.save(tmp_path / "run.v1")
    loaded = PatchingResult.load(tmp_path / "run.v1")
    assert loaded.axes == found.axes and loaded.about == found.about and loaded.metric == found.metric
    for name in ("values", "clean", "corrupt"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert {name: x.shape for name, x in loaded.controls.items()} == {
        name: x.shape for name, x in found.controls.items()
    }
    with pytest.raises(InputError, match="no patching result"):
        PatchingResult.load(tmp_path / "other")
    (tmp_path / "run.v1.json").write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        PatchingResult.load(tmp_path / "run.v1")
    with pytest.raises(InputError, match="JSON cannot"):
        result(about={"model": object()}).save(tmp_path / "bad")


def test_what_does_not_fit_is_refused() -> None:
    assert "2 layer × 3 position × 5 examples" in repr(result())
    with pytest.raises(ShapeError, match="axes say"):
        result(values=torch.zeros(3, 2, 5))
    with pytest.raises(ShapeError, match="clean has shape"):
        result(clean=torch.zeros(4))
    with pytest.raises(ShapeError, match="control 'random'"):
        result(controls={"random": torch.zeros(2, 2, 5)})
    with pytest.raises(InputError, match="NaN"):
        result(values=torch.full((2, 3, 5), float("nan")))
    with pytest.raises(InputError, match="repeats"):
        result(axes={"layer": ("0", "0"), "position": ("a", "b", "c")})


def test_tables_of_raw_values_need_no_scale() -> None:
    clean = result().clean.clone()
    clean[1] = result().corrupt[1]
    found = result(clean=clean)
    with pytest.raises(InputError, match="normalised=False"):
        found.to_dataframe()
    table = found.to_dataframe(normalised=False)
    assert "normalised" not in table and len(table) == 6
    low = found.interval(normalised=False).low
    assert np.isclose(table.low[0], low[0, 0])
    assert np.isclose(table["control random site"][0], found.control("random site", False)[0, 0])
    by_example = found.to_dataframe(examples=True, normalised=False)
    assert list(by_example.columns) == ["layer", "position", "example", "value"]
    with pytest.raises(InputError, match="no scale"):
        result(clean=None).to_dataframe(normalised=True)


def test_numbers_select_names_where_names_are_numbers() -> None:
    late = result(axes={"layer": ("2", "3"), "position": ("image[0]", "question", "last")})
    assert torch.equal(late.select(layer=2).values, late.values[0])
    assert torch.equal(late.select(layer=-1, position=1).values, late.values[1, 1])
    for wrong in (0, 1, -3):
        with pytest.raises(UnknownNameError, match=f"no {wrong}"):
            late.select(layer=wrong)
    with pytest.raises(UnknownNameError, match="no 3"):
        late.select(position=3)
    assert late.select(position="last").select(layer=3).about["selected"] == {"position": "last", "layer": "3"}


def test_intervals_need_resamples() -> None:
    with pytest.raises(InputError, match="n_resamples=0"):
        result().interval(n_resamples=0)
