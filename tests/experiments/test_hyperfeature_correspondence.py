"""The comparison of hyperfeatures as a command: on a pair list in the authors' format and a small random pipeline."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from interp.cli import load_experiment
from interp.errors import InputError
from interp.hyperfeatures import comparison, load
from interp.runs import Run
from tests.correspondence.test_pairs import spair
from tests.tiny_diffusion import stable_diffusion

run = load_experiment("hyperfeature-correspondence")
DEFAULTS = {
    "image_size": 16,
    "match_size": 16,
    "hold": 2,
    "process_steps": 3,
    "folds": 1,
    "train_pairs": 1,
    "test_pairs": 1,
    "grid": 0,
    "seeds": 1,
    "steps": 2,
    "lr": 1e-3,
    "mixing_lr": 1e-2,
    "dim": 48,
    "device": "",
    "resume": "",
}
TABLES = ("pck", "pck-by-seed", "pck-by-category", "single-cells-table", "mixing-weights-table")
FIGURES = ("pck-bars", "single-cells", "mixing-weights", "matched-points", "dense-correspondence")
SIZES = {"one.png": (40, 30), "two.png": (30, 30)}  # width, height


def entry(**changes):
    """A pair as the authors' lists have it: (x, y) points, boxes left, top, right, bottom."""
    return {
        "source_path": "one.png",
        "target_path": "two.png",
        "source_points": [[5, 6], [35, 20]],
        "target_points": [[4, 7], [25, 21]],
        "category": "cat",
        "source_bounding_box": [2, 2, 38, 28],
        "target_bounding_box": [1, 3, 28, 27],
        "mirror": 0,
    } | changes


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A saved pipeline, two pictures, and two lists of them."""
    home = tmp_path_factory.mktemp("given")
    stable_diffusion().save_pretrained(home / "model")
    (home / "images").mkdir()
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(home / "images" / name)
    forth, back = (f"{side}_{what}" for side in ("source", "target") for what in ("path",))
    other = entry(**{forth: "two.png", back: "one.png"}, source_points=[[3, 3]], target_points=[[9, 9]], category="dog")
    (home / "test.json").write_text(json.dumps([entry(), other]))
    (home / "few.json").write_text(json.dumps([entry()]))
    lists = {"pairs": "test.json", "training": "few.json", "validation": "few.json", "images": "images"}
    return DEFAULTS | {"model": str(home / "model")} | {name: str(home / file) for name, file in lists.items()}


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    """One run that is cut off while it draws, and goes on."""
    root = tmp_path_factory.mktemp("runs")
    trained = []
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setitem(run.__globals__, "draw_all", stop)
        with pytest.raises(KeyboardInterrupt):
            run(**settings, out=str(root))
    (made,) = root.iterdir()
    assert Run.open(made).provenance["status"] == "failed"
    with pytest.MonkeyPatch.context() as patch:
        fit = comparison.fit
        patch.setattr(comparison, "fit", lambda *given, **named: trained.append(fit(*given, **named)) or trained[-1])
        run(**settings | {"resume": str(made)}, out=str(root))
    assert [one.name for one in root.iterdir()] == [made.name]
    # What was trained before was read, not made again: the states are those of the first run.
    assert len(trained) == 2 and all(training.steps == 2 for _, training in trained)
    return made


def test_the_folder_holds_tables_figures_and_networks(folder):
    for name in TABLES:
        assert (folder / f"{name}.csv").stat().st_size and (folder / f"{name}.json").stat().st_size
    for name in FIGURES:
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "provenance.json").read_text())["status"] == "done"
    chosen = json.loads((folder / "chosen.json").read_text())
    # Both test pairs are of the two pictures that the training pair is of.
    assert chosen["test_pairs_seen"] == 2
    assert chosen["reconstruction_mse"] >= 0
    assert comparison.SINGLE in chosen["chosen"][0]


def test_the_table_has_every_method_by_both_bases(folder):
    table = pd.read_csv(folder / "pck.csv")
    assert set(table["base"]) == {"img", "bbox"}
    others = {"BASES", "BATCH", "GENERATION", "TEST", "FAMILIAR"}
    assert set(table["method"]) == {getattr(comparison, name) for name in vars(comparison) if name.isupper()} - {
        getattr(comparison, name) for name in others
    }
    assert set(table["part"]) == {"test"}
    assert (table["n_points"] == 3).all() and (table["n_pairs"] == 2).all()
    # Three points: every PCK is a number of thirds.
    assert np.allclose(table["pck"] * 3, (table["pck"] * 3).round(), atol=1e-9)


def test_cells_and_shares_are_tables_of_layers_and_timesteps(folder):
    cells = pd.read_csv(folder / "single-cells-table.csv")
    assert list(cells["timestep"].unique()) == [-1, 0, 333] and len(cells) == 36
    chosen = json.loads((folder / "chosen.json").read_text())["chosen"][0][comparison.SINGLE]
    site, timestep = chosen.split(", t = ")
    (row,) = cells[(cells["layer"] == site) & (cells["timestep"] == float(timestep))].to_dict("records")
    table = pd.read_csv(folder / "pck.csv").set_index(["method", "base"])["pck"]
    assert row["pck_bbox"] == pytest.approx(table[comparison.SINGLE, "bbox"], abs=1e-12)
    shares = pd.read_csv(folder / "mixing-weights-table.csv").set_index("timestep")
    assert shares.shape == (3, 12)
    assert shares.to_numpy().sum() == pytest.approx(1.0, abs=1e-5)


def test_networks_say_what_they_are_for(folder, settings):
    checkpoint = load(folder / "aggregation-fold-0-seed-0")
    # The groups of the paper: three channels each of the inner width, 32 of them at 384.
    assert (checkpoint.net.dim, checkpoint.net.width, checkpoint.net.n_groups) == (48, 12, 4)
    assert checkpoint.spec.load_size == (16, 16) and len(checkpoint.spec.timesteps) == 3
    assert checkpoint.about.model == settings["model"] and checkpoint.about.data == settings["training"]
    assert not torch.equal(checkpoint.net.mixing_weights, torch.ones(36))


def test_going_on_with_other_options_or_a_whole_run_is_refused(folder, settings):
    with pytest.raises(InputError, match=r"was made with --steps 2, not 3"):
        run(**settings | {"resume": str(folder), "steps": 3})
    with pytest.raises(InputError, match="nothing to go on with"):
        run(**settings | {"resume": str(folder)})
    with pytest.raises(InputError, match="no such folder"):
        run(**settings | {"resume": str(folder / "missing")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 40}, "multiple of 16"),
        ({"dim": 0}, "multiple of 16"),
        ({"images": ""}, "needs --images"),
        ({"training": ""}, "needs --training"),
        ({"validation": ""}, "needs --validation"),
        ({"pairs": "/nonexistent.json"}, "no file"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(settings, tmp_path, monkeypatch, change, words):
    monkeypatch.setitem(run.__globals__, "compare_methods", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(InputError, match=words):
        run(**settings | change, out=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_the_published_folder_has_its_own_splits(tmp_path):
    root = spair(tmp_path / "SPair-71k")
    lines = (root / "Layout/large/test.txt").read_text().split()
    for name, line in (("trn", lines[0]), ("val", lines[1])):
        (root / f"Layout/large/{name}.txt").write_text(line)
        (root / "PairAnnotation" / name).mkdir()
        annotation = (root / f"PairAnnotation/test/{line}.json").read_text()
        (root / f"PairAnnotation/{name}/{line}.json").write_text(annotation)
    split = run.__globals__["published"](str(root))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [1, 1, 3]
    assert {file.name for file in split.images.values()} == {"a.jpg", "b.jpg", "c.jpg"}


def test_points_outside_an_image_are_refused(settings, tmp_path):
    listed = tmp_path / "outside.json"
    listed.write_text(json.dumps([entry(target_points=[[4, 7], [35, 21]])]))
    with pytest.raises(InputError, match=r"target of .*'one.png' -> 'two.png'.*y=21, x=35"):
        run(**settings | {"pairs": str(listed)}, out=str(tmp_path / "runs"))
