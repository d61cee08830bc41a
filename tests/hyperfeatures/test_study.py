"""The comparison of methods: its data, its matching, its choices, and a whole run in miniature."""

import dataclasses
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from interp.correspondence import Pair, match, pck_interval
from interp.errors import InputError
from interp.hyperfeatures import AggregationNetwork, prepare, presets, single, stack
from interp.hyperfeatures.comparison import (
    AGGREGATED,
    CONCATENATED,
    DIFT,
    ONE_STEP,
    PIXELS,
    SINGLE,
    SINGLE_ON_TEST,
    TRANSFER,
    Generation,
    compare_methods,
)
from interp.hyperfeatures.comparison_figures import draw_all
from interp.hyperfeatures.creature_pairs import FOLDS, creature_splits
from interp.hyperfeatures.study import Recipe, Split, Stacks, aggregated, best, fit, patches, score, score_many
from interp.models.diffusion import Diffusion
from interp.zoo.creatures import SPECIES
from tests.tiny_diffusion import stable_diffusion

RECIPE = Recipe(dim=32, width=8, n_groups=8, steps=3, validate_every=2)


def test_every_species_is_held_out_once_and_never_trained_on():
    splits = creature_splits(2, 1, 2)
    assert sorted(name for split in splits for name in split.held_out) == sorted(SPECIES)
    for split, held_out in zip(splits, FOLDS, strict=True):
        assert {pair.category for pair in split.test} == set(held_out)
        assert {pair.category for pair in (*split.train, *split.validation)} == set(SPECIES) - set(held_out)
        assert (len(split.train), len(split.validation), len(split.test), len(split.familiar)) == (8, 4, 4, 4)
        assert {pair.category for pair in split.familiar}.isdisjoint(held_out)
        assert {pair.source for pair in split.familiar}.isdisjoint(pair.source for pair in split.train)
    assert sorted({pair.category for split in splits for pair in split.familiar}) == sorted(SPECIES)
    assert splits[0].images is splits[1].images


def test_training_validation_and_test_pictures_differ():
    (split,) = creature_splits(2, 2, 2, folds=[("dog",)])
    pictures = torch.stack([split.images[key] for key in split.images])
    apart = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + 1e6 * torch.eye(len(pictures))
    assert apart.min() > 1.0  # of 64 × 64 × 3 values; copies would be 0 apart


def test_a_split_refuses_missing_images_and_held_out_categories_in_training():
    (split,) = creature_splits(1, 1, 1, folds=[("dog",)])
    with pytest.raises(InputError, match="held-out category"):
        dataclasses.replace(split, train=split.test)
    with pytest.raises(InputError, match="held-out category"):
        dataclasses.replace(split, familiar=split.test)
    with pytest.raises(InputError, match="not among the 0"):
        dataclasses.replace(split, images={})
    with pytest.raises(InputError, match="no species to train on"):
        creature_splits(1, 1, 1, folds=[SPECIES])


def places(height: int, width: int) -> torch.Tensor:
    """One direction of its own for every pixel."""
    return rearrange(torch.eye(height * width), "(h w) channel -> channel h w", h=height)


def planted(shift: int) -> Split:
    """Two images of 8 × 12 pixels, the second of which is the first moved to the right."""
    points = torch.tensor([[1.0, 2.0], [6.0, 3.0], [3.0, 5.0]])
    target = points + torch.tensor([0.0, shift])
    pair = Pair("a", "b", "thing", points, target, (0, 0, 8, 12), (0, 0, 8, 12))
    images = {"a": torch.zeros(3, 8, 12), "b": torch.ones(3, 8, 12)}
    return Split(images, (), (), (pair,))


def test_score_finds_planted_points_and_score_many_agrees():
    split = planted(4)
    maps = {"a": places(8, 12), "b": places(8, 12).roll(4, dims=2)}
    found = score(maps.__getitem__, split, split.test)
    assert torch.equal(found.results[0].predicted, split.test[0].target_points.double())
    wrong = {"a": places(8, 12), "b": places(8, 12)}
    many = score_many(lambda key: {"right": maps[key], "unmoved": wrong[key]}, split, split.test)
    assert pck_interval(many["right"], base="bbox", threshold=0.05, n_resamples=1).mean == 1.0
    assert torch.equal(many["unmoved"].results[0].predicted, split.test[0].source_points.double())
    assert best(many) == "right"


def test_score_carries_points_to_the_size_that_is_matched_at():
    split = planted(4)
    maps = {"a": places(8, 12), "b": places(8, 12).roll(4, dims=2)}
    result = score(maps.__getitem__, split, split.test, (16, 24)).results[0]
    predicted, true = result.points()
    # Bilinear enlargement by two puts the peak of a cell half a pixel of the small image off at most.
    assert (predicted - true).abs().max() <= 0.5
    assert result.size == (16, 24) and result.image_size == (8, 12)


def test_patches_find_a_moved_picture():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = {"a": image, "b": image.roll(3, dims=2)}
    describe = patches(images, side=5)
    points = torch.tensor([[5.0, 4.0], [10.0, 8.0]])
    assert torch.equal(match(describe("a"), describe("b"), points), (points + torch.tensor([0, 3])).long())


@pytest.fixture(scope="module")
def sd():
    return Diffusion(stable_diffusion())


@pytest.fixture(scope="module")
def splits():
    return creature_splits(1, 1, 1, folds=FOLDS[:2])


@pytest.fixture(scope="module")
def spec(sd):
    return presets.hyperfeatures(sd, steps=4, indices=(3, 1, 0), load_size=(16, 16), vae="mode")


@pytest.fixture(scope="module")
def found(sd, splits, spec):
    return compare_methods(sd, splits, spec, RECIPE, [0, 1])


def test_stacks_hold_what_stack_gives_and_drop_the_oldest(sd, splits, spec):
    images = splits[0].images
    stacks = Stacks(sd, spec, images, hold=2, batch=2)
    keys = list(images)[:3]
    expected = stack(sd, images[keys[0]][None] * 2 - 1, spec)[0]
    # Half precision keeps 11 bits.
    assert torch.allclose(stacks[keys[0]].float(), expected, rtol=2**-10, atol=1e-3)
    for key in keys:
        assert stacks[key].shape == expected.shape
    assert list(stacks._held) == keys[1:]


def test_every_method_is_evaluated_on_the_pooled_test_pairs(found, splits):
    n_pairs = sum(len(split.test) for split in splits)
    for method in (AGGREGATED, TRANSFER, ONE_STEP, SINGLE, CONCATENATED, DIFT, PIXELS):
        runs = found.evaluations[method]
        assert len(runs) == (2 if method in (AGGREGATED, TRANSFER, ONE_STEP) else 1)
        assert all(len(run.results) == n_pairs for run in runs)
    assert set(found.familiar) == set(found.evaluations) - {TRANSFER, SINGLE_ON_TEST}
    (chosen,) = found.evaluations[SINGLE_ON_TEST]
    assert chosen is max(found.cells.values(), key=lambda one: pck_interval(one, base="bbox", n_resamples=1).mean)
    n_familiar = sum(len(split.familiar) for split in splits)
    assert all(len(run.results) == n_familiar for runs in found.familiar.values() for run in runs)
    whole = found.table()
    assert set(whole["part"]) == {"test", "familiar"}
    table = whole[whole["part"] == "test"]
    assert set(table["base"]) == {"img", "bbox"} and len(table) == 2 * len(found.evaluations)
    assert ((table["low"] <= table["pck"]) & (table["pck"] <= table["high"])).all()
    gains = table[table["method"] == SINGLE].set_index("base")["gain"]
    seeds = found.by_seed()
    by_seed = seeds[seeds["part"] == "test"].set_index(["method", "base"])["pck"]
    mean = by_seed.loc[(AGGREGATED, "img")].mean() - by_seed.loc[(SINGLE, "img")]
    assert math.isclose(gains["img"], mean, abs_tol=1e-9)


def near(predicted, expected):
    """The same pixels; another batch size rounds otherwise, which may exchange neighbours nearly equal."""
    apart = (predicted - expected).abs().amax(dim=1)
    return bool((apart <= 1).all()) and bool((apart == 0).float().mean() >= 0.8)


def test_the_main_method_is_the_network_on_the_stack(found, sd, splits, spec):
    split, fitted = splits[0], found.fitted[0]
    pair = split.test[0]
    with torch.no_grad():
        maps = [
            fitted.net(stack(sd, split.images[key][None] * 2 - 1, spec).half())[0] for key in (pair.source, pair.target)
        ]
    expected = match(*maps, pair.source_points, (64, 64))
    assert near(found.evaluations[AGGREGATED][0].results[0].predicted, expected)


def test_familiar_pairs_are_matched_by_the_same_network(found, sd, splits, spec):
    split, fitted = splits[0], found.fitted[0]
    pair = split.familiar[0]
    with torch.no_grad():
        maps = [
            fitted.net(stack(sd, split.images[key][None] * 2 - 1, spec).half())[0] for key in (pair.source, pair.target)
        ]
    assert near(found.familiar[AGGREGATED][0].results[0].predicted, match(*maps, pair.source_points, (64, 64)))


def test_single_cells_are_those_of_the_stack(found, sd, splits, spec):
    pair = splits[0].test[0]
    channels = sd.channels(list(spec.sites))
    maps = [stack(sd, splits[0].images[key][None] * 2 - 1, spec).half().float() for key in (pair.source, pair.target)]
    for step, layer in ((0, 0), (2, 11)):
        source, target = (single(one, channels, layer, step)[0] for one in maps)
        expected = match(source, target, pair.source_points, (64, 64))
        assert near(found.cells[step, layer].results[0].predicted, expected)
    assert found.cell_map().shape == (3, 12)


def test_transfer_reads_the_other_process(found):
    inversion, generation = (found.evaluations[method][0] for method in (AGGREGATED, TRANSFER))
    differ = [
        not torch.equal(a.predicted, b.predicted) for a, b in zip(inversion.results, generation.results, strict=True)
    ]
    assert any(differ)
    assert found.reconstruction is not None and found.reconstruction >= 0


def test_mixing_weights_are_a_named_table_that_sums_to_one(found, spec):
    table = found.mixing()
    assert list(table.columns) == list(spec.sites) and list(table.index) == list(spec.timesteps)
    assert math.isclose(table.to_numpy().sum(), 1.0, abs_tol=1e-5)


def test_every_figure_is_drawn(found, sd, splits, spec, tmp_path):
    drawn = draw_all(sd, splits, spec, found, ("a dog", "a bird"))
    assert len(drawn) == 7
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_run_goes_on_from_its_folder(sd, splits, spec, tmp_path):
    whole = compare_methods(sd, splits[:1], spec, RECIPE, [0], folder=tmp_path)
    again = compare_methods(sd, splits[:1], spec, RECIPE, [0], folder=tmp_path)
    assert again.by_seed().equals(whole.by_seed())
    assert again.fitted[0].training.history.equals(whole.fitted[0].training.history)


def test_features_of_generation_are_those_of_the_calls_that_stand_for_the_saved_ones(sd, splits, spec):
    generation = Generation(sd, spec, splits[0], 2)
    (pair, *_) = splits[0].test
    split = dataclasses.replace(splits[0], test=(pair,))
    stacks = generation.stacks(split)
    # Saved indices 3, 1, 0 of 4: each a step noisier than by inversion, -1, 250, 500.
    assert spec.timesteps == (-1, 250, 500) and stacks.spec.timesteps == (0, 500, 750)
    image = split.images[pair.source][None] * 2 - 1
    latents = sd.encode(prepare(image, (16, 16)), vae="mode")
    noise = sd.invert(latents, "", steps=4, convention="dhf", progress=False).final
    run = sd.generate(
        [""],
        latents=noise,
        steps=4,
        guidance_scale=1.0,
        convention="dhf",
        capture=list(spec.sites),
        decode=False,
        progress=False,
    )
    channels = sd.channels(list(spec.sites))
    for layer in (0, 11):
        maps = run.activations[spec.sites[layer]]
        for step, call in enumerate((3, 1, 0)):
            expected = F.interpolate(maps[call], size=spec.output_size, mode="bilinear", align_corners=False)
            found = single(stacks[pair.source][None].float(), channels, layer, step)
            # Half precision keeps 11 bits; the inversion ran in a batch of two.
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=5e-3)
    torch.testing.assert_close(stacks.clean[pair.source], run.clean[0], rtol=1e-3, atol=1e-3)
    errors = []
    for key in stacks.clean:
        there, here = (sd.decode(one[None]) for one in (stacks.clean[key], generation._encoded[key]))
        errors.append(float((there - here).square().mean()))
    assert errors and math.isclose(generation.error(), sum(errors) / len(errors), rel_tol=1e-6)
    torch.testing.assert_close(generation._encoded[pair.source], latents[0])


def test_a_training_goes_on_with_the_same_features_and_pairs_only(sd, splits, spec, tmp_path):
    split = dataclasses.replace(splits[0], validation=splits[0].validation[:1])
    fit(Stacks(sd, spec, split.images), split, RECIPE, 0, folder=tmp_path)
    other = dataclasses.replace(spec, load_size=(12, 12))
    with pytest.raises(InputError, match=r"features, load_size \[16, 16\], not \[12, 12\]"):
        fit(Stacks(sd, other, split.images), split, RECIPE, 0, folder=tmp_path)
    with pytest.raises(InputError, match="training pairs"):
        reordered = dataclasses.replace(split, train=split.train[::-1])
        fit(Stacks(sd, spec, split.images), reordered, RECIPE, 0, folder=tmp_path)
    with pytest.raises(InputError, match="holds a training with base 'bbox', not 'img'"):
        fit(Stacks(sd, spec, split.images), split, RECIPE, 0, base="img", folder=tmp_path)


def test_validation_matches_at_the_size_of_the_test(sd, splits, spec, monkeypatch):
    split = dataclasses.replace(splits[0], validation=splits[0].validation[:1])
    sizes = []
    plain = score_many

    def seen(describe, split, pairs, size=None, *rest):
        sizes.append(size)
        return plain(describe, split, pairs, size, *rest)

    monkeypatch.setattr("interp.hyperfeatures.study.score_many", seen)
    fit(Stacks(sd, spec, split.images), split, RECIPE, 0, size=(24, 24))
    assert sizes == [(24, 24), (24, 24)]  # after step 2 and after the last


def test_training_refuses_points_outside_an_image(sd, splits, spec):
    (first, *_) = splits[0].train
    wrong = dataclasses.replace(first, source_points=first.source_points + 64)
    split = dataclasses.replace(splits[0], train=(wrong,), validation=())
    with pytest.raises(InputError, match="outside the image of 64 rows"):
        fit(Stacks(sd, spec, split.images), split, RECIPE, 0)


def test_no_more_descriptors_than_stacks_are_held(sd, splits, spec):
    stacks = Stacks(sd, spec, splits[0].images, hold=2)
    net = AggregationNetwork(stacks.channels, spec.n_steps, 32, 8, n_groups=8)
    describe = aggregated(net, stacks)
    first, second, third = list(splits[0].images)[:3]
    held = weakref.ref(describe(first))
    assert describe(first) is held()
    describe(second)
    describe(third)
    assert held() is None


def test_a_comparison_needs_splits_and_seeds(sd, splits, spec):
    with pytest.raises(InputError, match="0 splits and 1 seeds"):
        compare_methods(sd, [], spec, RECIPE, [0])
