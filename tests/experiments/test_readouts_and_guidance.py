"""Experiments of readouts and guidance as commands, as small as they come: tables, figures and what they hold."""

import numpy as np
import pandas as pd
import pytest

import interp
from interp.cli import load_experiment, main
from interp.errors import InputError, UnknownNameError
from interp.guidance.creature_trials import draw_goals, errors_by
from interp.guidance.trials import Arm, run_trials
from interp.readouts.head_study import HEAD, MEAN, PIXELS
from interp.runs import Run
from interp.zoo.readouts import estimator

MODEL = "zoo:tiny-diffusion"
MEASURES = ("colour-histogram", "creatures-colours", "embedding", "creature", "pose-apart")


def only_run(out) -> Run:
    (folder,) = out.iterdir()
    found = Run.open(folder)
    assert found.provenance["status"] == "done"
    return found


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", *words])
    assert stopped.value.code == 0


def figures_of(run: Run) -> set[str]:
    return {file.stem for file in run.folder.rglob("*.png")}


def test_heads_are_trained_measured_and_saved(tmp_path, capsys):
    options = ["--samples", "4,8", "--held-out", "4", "--steps", "2", "--batch", "2", "--dim", "16"]
    command("readout-heads", "--properties", "depth,appearance", *options, "--out", str(tmp_path))
    run = only_run(tmp_path)
    errors = run.load_table("errors")
    assert set(errors["head"]) == {HEAD, MEAN, PIXELS} and set(errors["samples"]) == {4, 8}
    assert set(errors["property"]) == {"depth", "appearance"}
    assert {"depth-errors", "depth-loss", "depth-readouts", "appearance-errors", "appearance-loss"} <= figures_of(run)
    loaded = interp.readouts.load(run.folder / "heads" / "depth-8", interp.Diffusion.from_pretrained(MODEL))
    assert loaded.name == "depth"
    shown = capsys.readouterr().out
    largest = errors[(errors["property"] == "depth") & (errors["head"] == MEAN) & (errors["samples"] == 8)]
    assert f"{largest['error'].mean():.4f}" in shown and "8 samples" in shown
    experiment = load_experiment("readout-heads")
    with pytest.raises(InputError, match="whole numbers with commas"):
        experiment(samples="100,many")
    with pytest.raises(UnknownNameError, match="no head 'poze'"):
        experiment(properties="poze")
    with pytest.raises(InputError, match="made with other options"):
        experiment(samples="4", resume=str(run.folder))


def test_spatial_guidance_is_measured_by_the_estimator(tmp_path, capsys):
    options = ["--trials", "2", "--steps", "4", "--seed", "3", "--batch", "2"]
    command("guidance-spatial", "--properties", "edge", *options, "--out", str(tmp_path))
    run = only_run(tmp_path)
    errors = run.load_table("edge-errors")
    assert list(errors) == ["unguided", "guided", "shuffled head", "reversed gradient"] and len(errors) == 2
    sd, goals = interp.Diffusion.from_pretrained(MODEL), draw_goals(2, 3)
    plain = run_trials(sd, goals.prompts, [Arm("unguided")], seeds=[3, 4], steps=4, progress=False)
    own = errors_by(estimator(), plain.images, goals, "edge")["unguided"]
    np.testing.assert_allclose(errors["unguided"], own, rtol=1e-3)
    assert not np.allclose(errors["guided"], own, rtol=1e-3)
    assert figures_of(run) == {"edge-trials", "edge-samples", "edge-film"}
    assert f"{errors['guided'].median():.3f}\t{errors['guided'].mean():.3f}" in capsys.readouterr().out
    with pytest.raises(UnknownNameError, match="no head 'poze'"):
        load_experiment("guidance-spatial")(properties="poze")


def test_a_shuffled_head_is_pushed_as_hard_where_steps_are_no_signed_ones(tmp_path, capsys):
    options = ["--trials", "2", "--steps", "4", "--seed", "3", "--batch", "2", "--rule", "latent_gradient"]
    command("guidance-spatial", "--properties", "edge", *options, "--step-size", "4", "--out", str(tmp_path))
    table = only_run(tmp_path).load_table("comparison").set_index("arm")
    longer, shuffled = "shuffled head, steps as long", "shuffled head"
    assert list(table.index) == ["unguided", "guided", shuffled, "reversed gradient", longer]
    assert np.isnan(table.loc["unguided", "gradient"]) and (table["gradient"].drop("unguided") > 0).all()
    # Longer steps move samples farther from where they were without a guide.
    assert abs(table.loc[longer, "difference"]) > abs(table.loc[shuffled, "difference"])
    assert longer in capsys.readouterr().out


def test_drags_are_measured_by_the_way_that_points_went(tmp_path):
    options = ["--trials", "2", "--steps", "4", "--seed", "3", "--batch", "2"]
    command("guidance-drag", *options, "--out", str(tmp_path))
    run = only_run(tmp_path)
    table = run.load_table("comparison")
    way = table[table["measure"] == "share of the way"].set_index("arm")
    arms = ["unguided", "drag", "without anti-ghosting", "without, heavier drag", "shuffled heads"]
    assert list(way.index) == arms
    assert way.loc["unguided", "mean"] == 0  # where the points were is what the unguided image shows
    assert set(table[table["measure"] == "change of the rest"]["arm"]) == set(way.index) - {"unguided"}
    assert figures_of(run) == {"moved", "rest", "samples"}
    drag = load_experiment("guidance-drag")
    with pytest.raises(InputError, match="give finite weights, of the drag more than 0"):
        drag(heavier=0.0)
    with pytest.raises(InputError, match="appearance=nan"):
        drag(appearance=float("nan"))
    with pytest.raises(InputError, match="give --step-size"):
        drag(rule="epsilon")


def test_looks_are_compared_with_those_of_the_references(tmp_path):
    options = ["--trials", "2", "--steps", "4", "--seed", "3", "--batch", "2"]
    command("guidance-appearance", *options, "--out", str(tmp_path))
    run = only_run(tmp_path)
    table = run.load_table("comparison")
    assert set(table["measure"]) == {"colour histogram", "creature's colours", "embedding", "creature", "pose apart"}
    arms = {"unguided", "its caption, unguided", "appearance", "cell by cell", "identity in boxes", "shuffled head"}
    assert set(table["arm"]) == arms
    trials = run.load_table("colour-histogram-trials")
    assert trials.shape == (2, 6) and ((trials >= 0) & (trials <= 1)).all().all()
    assert figures_of(run) == {*MEASURES, "samples"}


def test_the_sweep_names_the_best_cell_of_each_property(tmp_path, capsys):
    options = ["--sites", "up.[13].resnets.0.hook_branch", "--timesteps", "1,900", "--properties", "depth,species"]
    small = ["--train", "12", "--held-out", "6", "--steps", "3", "--out", str(tmp_path)]
    command("readout-sweep", *options, *small)
    run = only_run(tmp_path)
    scores = run.load_table("scores")
    assert len(scores) == 8 and set(scores["task"]) == {"depth", "species"}
    best = scores[scores["task"] == "depth"].sort_values("score").iloc[-1]
    shown = capsys.readouterr().out
    assert f"{best['score']:.3f}" in shown and best["site"] in shown
    assert figures_of(run) == {"depth-map", "species-map"}
    assert isinstance(scores, pd.DataFrame)
    with pytest.raises(InputError, match="no property 'colour'"):
        load_experiment("readout-sweep")(properties="colour")
