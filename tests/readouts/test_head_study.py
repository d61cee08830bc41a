"""Heads of the creatures: recipes, errors, bounds, the study of all of them, and what ships."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.errors import InputError, ShapeError, UnknownNameError
from interp.readouts import InMemory, PointPair, ReadoutHead, checkpoints, evaluate
from interp.readouts.creature_heads import (
    HEADS,
    creature_examples,
    creature_readout,
    error_of,
    error_of_the_mean,
    recipe_of,
)
from interp.readouts.head_study import HEAD, MEAN, PIXELS, HeadStudy, study_head
from interp.readouts.pixels import evaluate_on_pixels, pixel_head, train_on_pixels
from interp.zoo.creatures import draw_scenes, render
from interp.zoo.readouts import estimator, head, head_about, head_names, heads_folder
from interp.zoo.readouts.card import markdown
from interp.zoo.readouts.estimator_training import accuracy
from interp.zoo.readouts.train import SHIPPED


@pytest.fixture(scope="module")
def sd() -> interp.Diffusion:
    return interp.Diffusion.from_pretrained("zoo:tiny-diffusion")


def test_errors_are_what_they_say():
    maps = torch.zeros(2, 1, 1, 4, 4)
    targets = [torch.full((1, 4, 4), 2.0), torch.full((1, 4, 4), 3.0)]
    assert error_of("depth")(maps, targets).tolist() == [4.0, 9.0]
    # Two maps of one-hot descriptors: cell (1, 2) of the first looks like cell (3, 0) of the second.
    pair = torch.eye(16).reshape(1, 1, 16, 4, 4).repeat(1, 2, 1, 1, 1)
    pair[0, 1] = pair[0, 1].roll((2, -2), dims=(1, 2))
    points = PointPair(torch.tensor([[1.0, 2.0]]) / 4, torch.tensor([[3.0, 0.0]]) / 4)
    elsewhere = PointPair(points.points_a, torch.tensor([[0.0, 0.0]]))
    assert error_of("correspondence")(torch.cat([pair, pair]), [points, elsewhere]).tolist() == [0.0, 1.0]
    triplet = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])[None, :, :, None, None].repeat(1, 1, 1, 2, 2)
    both = torch.cat([triplet, triplet[:, [0, 2, 1]]])
    assert error_of("identity")(both, [None, None]).tolist() == [0.0, 1.0]


def test_the_mean_is_the_bound_that_it_claims_to_be():
    seen = InMemory(torch.zeros(2, 1, 3, 8, 8), [torch.full((1, 4, 4), v) for v in (0.0, 1.0)])
    held_out = InMemory(torch.zeros(1, 1, 3, 8, 8), [torch.full((1, 4, 4), 2.0)])
    assert error_of_the_mean("depth", seen, held_out) == pytest.approx(1.5**2)
    assert error_of_the_mean("appearance", seen, held_out) == 0.5
    pairs = [PointPair(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.5, 0.52]]))]
    points = InMemory(torch.zeros(1, 2, 3, 8, 8), pairs)
    far = InMemory(torch.zeros(1, 2, 3, 8, 8), [PointPair(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.9, 0.5]]))])
    assert error_of_the_mean("correspondence", points, far) == 0.5


def test_pixel_heads_have_the_size_of_the_readout_and_learn(sd: interp.Diffusion):
    readout = creature_readout(sd, "depth", dim=16, width=16)
    source = creature_examples("depth", 16, seed=3)
    own = pixel_head(readout, source.images)
    assert isinstance(readout.head, ReadoutHead)
    assert own.n_layers == readout.head.n_layers and own.channels == (48,) * 12
    before = evaluate_on_pixels(own, readout, source, error_of("depth"))["value"].mean()
    train_on_pixels(own, readout, source, "mse", steps=40, batch=8, lr=3e-3, progress=False)
    after = evaluate_on_pixels(own, readout, source, error_of("depth"), batch=5)["value"]
    assert len(after) == 16 and after.mean() < 0.6 * before
    with pytest.raises(ShapeError, match="do not divide into 16 × 16 cells"):
        pixel_head(readout, torch.zeros(1, 1, 3, 60, 60))


def test_a_study_measures_every_head_between_its_bounds(sd: interp.Diffusion, tmp_path):
    study = HeadStudy((4, 8), held_out=6, timesteps=(1, 900), steps=3, batch=2, dim=16, width=16)
    found = study_head(sd, "edge", study, tmp_path)
    counts = found.errors.groupby(["head", "samples"]).size().to_dict()
    assert counts == {(HEAD, 4): 12, (HEAD, 8): 12, (MEAN, 8): 6, (PIXELS, 8): 6}
    loaded = interp.readouts.load(tmp_path / "edge-8", sd)
    held_out = creature_examples("edge", 6, study.test_seed).encoded(sd)
    again = evaluate(sd, loaded, held_out, error_of("edge"), [900], latents=True, progress=False)["value"]
    own = found.errors[(found.errors["samples"] == 8) & (found.errors["timestep"] == 900)]["error"]
    np.testing.assert_allclose(again, own, rtol=1e-4)
    assert checkpoints.about(tmp_path / "edge-8").notes == "loss: sparse_mse"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "heads").symlink_to(tmp_path)
    assert head("edge", sd, tmp_path / "run").name == "edge"  # of the most samples
    (tmp_path / "run" / "other").mkdir()
    (tmp_path / "depth").symlink_to(tmp_path / "edge-8")
    with pytest.raises(InputError, match="holds a head of 'edge', not of 'depth'"):
        head("depth", sd, tmp_path)
    with pytest.raises(InputError, match="train_seed"):
        study_head(sd, "edge", replace(study, train_seed=99), tmp_path)
    with pytest.raises(InputError, match="give different ones"):
        HeadStudy(train_seed=52)
    with pytest.raises(UnknownNameError, match="no head 'poze': there are pose"):
        recipe_of("poze")


def test_triplets_are_trained_for_longer(sd: interp.Diffusion, tmp_path):
    study = HeadStudy((4,), held_out=4, timesteps=(1,), steps=2, batch=2, dim=16, width=16)
    found = study_head(sd, "identity", study, tmp_path)
    about = checkpoints.about(tmp_path / "identity-4")
    assert len(found.trainings[4].history) == about.training_steps == 6
    assert about.notes == "loss: pooled_appearance"


def test_heads_that_ship_read_as_their_card_says(sd: interp.Diffusion):
    card = json.loads((heads_folder() / "card.json").read_text())
    assert head_names() == sorted(SHIPPED) == sorted(card["heads"])
    assert set(SHIPPED) < set(HEADS)
    assert (heads_folder() / "README.md").read_text() == markdown(card)
    largest = str(max(card["study"]["samples"]))
    for name, stated in card["heads"].items():
        about = head_about(name)
        assert about.training_steps == stated["steps"] == card["study"]["steps"] * recipe_of(name).longer
        read = stated["by samples and timestep"][largest]
        # Below a middling noise level every head knows more than the mean does.
        assert max(read[time] for time in ("1", "100", "250")) < stated[MEAN]
    for name in ("pose", "correspondence"):
        held_out = creature_examples(name, card["study"]["held_out"], card["study"]["test_seed"])
        some = InMemory(held_out.images[:48], list(held_out.targets)[:48]).encoded(sd)
        errors = evaluate(sd, head(name, sd), some, error_of(name), [250], latents=True, progress=False)["value"]
        stated = card["heads"][name]["by samples and timestep"][largest]["250"]
        # 48 of the 128 renders that the card was measured on: within four standard errors.
        assert abs(errors.mean() - stated) < 4 * errors.std() / 48**0.5
    with pytest.raises(UnknownNameError, match="no head 'poze'"):
        head("poze")


def test_the_estimator_sees_as_its_card_says():
    card = json.loads((heads_folder() / "card.json").read_text())["estimator"]
    rendered = render(draw_scenes(128, card["held_out_seed"]))
    stated = card["accuracy"]["held-out renders"]
    for name, value in accuracy(estimator(), rendered, rendered.images).items():
        assert value == pytest.approx(stated[name], rel=0.15)  # a quarter of the card's renders
    with pytest.raises(InputError, match=r"expected \[3, 64, 64\]"):
        estimator().estimate(torch.zeros(1, 3, 32, 32))
